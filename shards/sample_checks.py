"""Whether a sample that a stranger wrote agrees with itself, before anything computes with it.

In: a decoded `Sample`. Out: nothing, or a ValueError that says what contradicts what. A token id outside the vocabulary
would be an IndexError on a CPU and a device assert, which ends the process, on a GPU; a control token inside a text would
open a turn that nobody wrote; a negative index would silently mean another text. The price is some ten microseconds a
sample. What stage one writes passes always: it refuses control tokens and counts by itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.mel import NUM_FRAMES, SAMPLES_PER_FRAME

if TYPE_CHECKING:
    from shards.sample import AudioFacts, Sample

NUM_TEXT_IDS = 128_000  # of the tokenizer; control tokens follow
SOUND_EVENT_IDS = range(128_022, 128_028)  # <SE>, </SE>, ...: written inside texts
SCENE_IDS = range(128_018, 128_022)  # <|scene_desc_start|> to <|generation_instruction_end|>: in system texts only
MAX_CODE = 1023
MAX_DEPTH = 200  # of what a row's `misc` and unknown keys hold; Python's own limit is near 1000 everywhere it is walked
MIN_MEL_SAMPLES = 321  # fewer are no row
MAX_MEL_SAMPLES = NUM_FRAMES * SAMPLES_PER_FRAME  # 30 s at 16 kHz


def check_sample(sample: Sample) -> None:
    """Raises ValueError naming the first contradiction."""
    check_codes("ref.codes.npy", sample.reference_codes, sample.facts.reference)
    check_codes("tgt.codes.npy", sample.target_codes, sample.facts.target)
    check_texts(sample)
    check_turns(sample)
    check_token_ids(sample)
    mel = sample.facts.mel
    if mel is not None and not (MIN_MEL_SAMPLES <= mel.num_samples <= MAX_MEL_SAMPLES and math.isfinite(mel.floor)):
        raise ValueError(
            f"mel of {mel.num_samples} samples with floor {mel.floor}, expected {MIN_MEL_SAMPLES} to {MAX_MEL_SAMPLES}"
        )
    for name, value in (("misc", sample.facts.misc), ("extra", sample.facts.extra)):
        if is_deeper(value, MAX_DEPTH):
            raise ValueError(f"{name} is nested deeper than {MAX_DEPTH} levels")


def check_codes(name: str, codes: np.ndarray, audio: AudioFacts) -> None:
    if codes.ndim != 2 or codes.shape[0] != 8 or codes.dtype != np.uint16 or (codes.size and codes.max() > MAX_CODE):
        raise ValueError(f"{name} is {codes.dtype}{list(codes.shape)}, expected uint16[8, T] of 0..{MAX_CODE}")
    if codes.shape[1] == 0 or codes.shape[1] != audio.num_frames:
        raise ValueError(f"{name} holds {codes.shape[1]} frames, json counts {audio.num_frames}")
    if not (math.isfinite(audio.duration_s) and audio.duration_s >= 0 and audio.sample_rate > 0):
        raise ValueError(f"{name}: {audio.duration_s} s at {audio.sample_rate} Hz cannot be")


def check_texts(sample: Sample) -> None:
    facts, counts = sample.facts, sample.facts.text_token_counts
    if sample.text_ids.dtype != np.int32 or sample.text_ids.ndim != 1:
        raise ValueError(f"ids.npy is {sample.text_ids.dtype}{list(sample.text_ids.shape)}, expected int32[n]")
    if len(counts) != len(facts.texts) or min(counts, default=0) < 0 or sum(counts) != sample.text_ids.size:
        raise ValueError(
            f"ids.npy holds {sample.text_ids.size} ids, json counts {sum(counts)} in {len(counts)} of {len(facts.texts)} texts"
        )
    named = {"system_text": facts.system_text, "reference_text": facts.reference_text, "target_text": facts.target_text}
    for name, item in named.items():
        if item is None:
            continue
        if not 0 <= item < len(counts):
            raise ValueError(f"{name} is text {item} of {len(counts)}")
        if counts[item] == 0 and name != "system_text":
            raise ValueError(f"{name} has no token")
    if facts.num_as_written_tokens < 0:
        raise ValueError(f"num_as_written_tokens is {facts.num_as_written_tokens}")


def check_turns(sample: Sample) -> None:
    facts = sample.facts
    items = [(turn.role, item) for turn in facts.turns for item in turn.items]
    strange = [item for _, item in items if isinstance(item, int) and not 0 <= item < len(facts.texts)]
    if strange:
        raise ValueError(f"turns name text {strange[0]} of {len(facts.texts)}")
    audios = sorted(item for _, item in items if not isinstance(item, int))
    if audios != ["reference", "target"] or ("assistant", "target") not in items:
        raise ValueError(f"turns hold {audios}, expected one reference and, in an assistant's turn, one target")


def check_token_ids(sample: Sample) -> None:
    """Every id is of a text's own letters; control tokens come from the sequence builder alone."""
    ids, facts = sample.text_ids, sample.facts
    if not ids.size or (ids.min() >= 0 and ids.max() < NUM_TEXT_IDS):
        return
    systems = {item for turn in facts.turns if turn.role == "system" for item in turn.items} | {facts.system_text}
    spoken = {item for turn in facts.turns if turn.role != "system" for item in turn.items}
    systems -= spoken | {facts.reference_text, facts.target_text}
    for item in range(len(facts.texts)):
        allowed = {*SOUND_EVENT_IDS, *(SCENE_IDS if item in systems else ())}
        for token in np.unique(sample.text_item_ids(item)).tolist():
            if not 0 <= token < NUM_TEXT_IDS and token not in allowed:
                raise ValueError(
                    f"text {item} holds token {token}: no text, but a control token or outside the vocabulary"
                )


def is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and dictionaries are nested more than `limit` levels; walked level by level, without recursion."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            part
            for holder in level
            if isinstance(holder, dict | list)
            for part in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return False
    return True


def check_whisper(frames: np.ndarray | None, states: np.ndarray | None, num_samples: int, num_rows: int) -> None:
    """Stored Whisper features of a reference: [128, Tm] frames or [W, d] states, float16. Raises ValueError."""
    if states is not None:
        if states.ndim != 2 or states.dtype != np.float16 or len(states) != num_rows or not np.isfinite(states).all():
            raise ValueError(
                f"ref.whisper.npy.zst is {states.dtype}{list(states.shape)}, expected finite float16[{num_rows}, d]"
            )
    elif frames is not None and (
        frames.ndim != 2
        or frames.dtype != np.float16
        or frames.shape[0] != 128
        or not 0 < frames.shape[1] <= NUM_FRAMES
        or not np.isfinite(frames).all()
    ):
        raise ValueError(
            f"ref.mel.npy.zst is {frames.dtype}{list(frames.shape)}, expected finite float16[128, 1..{NUM_FRAMES}] for "
            f"{num_samples} samples"
        )
