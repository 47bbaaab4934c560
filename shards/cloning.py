"""The cloning request as a user's ChatML writes it: the sentences around the texts, and a sample of them.

In: texts and codes of one request. Out: a `Sample` like those that stage one stores. Training data made by `preprocess convert`,
speech and serving share these sentences; another wording in one of them would give training and speech different prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shards.delay_pattern import NUM_CODEBOOKS
from shards.errors import DataError
from shards.sample import AudioFacts, Sample, SampleFacts, Turn
from shards.sequence import FRAMES_PER_SECOND, SAMPLE_RATE, encode_text

SYSTEM_TEXT = "You are a helpful assistant capable of generating speech in the voice of the provided reference audio."
INSTRUCTION = "Please generate speech for given text in reference audio's voice: "


def cloning_messages(reference_text: str, reference_audio: str, target_text: str, target_audio: str) -> list[dict]:
    """The `messages` of a ChatML row that asks for a clone."""
    return [
        {"role": "system", "content": SYSTEM_TEXT},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": reference_text},
                {"type": "audio", "audio_url": reference_audio},
                {"type": "text", "text": INSTRUCTION + target_text},
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": target_text}, {"type": "audio", "audio_url": target_audio}],
        },
    ]


def cloning_sample(
    tokenizer: Any,
    reference_text: str | None,
    reference_codes: np.ndarray,
    target_text: str,
    target_codes: np.ndarray | None = None,
    *,
    key: str = "speak",
    row: int = 0,
    speaker: str = "reference",
    system_text: str = SYSTEM_TEXT,
) -> Sample:
    """A sample with these texts and codes [8, T] uint16; without a target it is a request for speech.

    Without the reference's text (None) its place in the prompt stays empty. Raises DataError for a text that is empty.
    """
    said = None if reference_text is None else reference_text.strip()
    texts = [system_text, said or "", INSTRUCTION + target_text.strip(), target_text.strip()]
    if said == "" or not texts[3]:
        raise DataError("the reference's text and the text to say must not be empty")
    if target_codes is None:
        target_codes = np.zeros((NUM_CODEBOOKS, 0), np.uint16)
    ids: Sequence[np.ndarray] = [encode_text(tokenizer, item) for item in texts]
    facts = SampleFacts(
        id=key,
        row=row,
        speaker=speaker,
        turns=[Turn("system", [0]), Turn("user", [1, "reference", 2]), Turn("assistant", [3, "target"])],
        texts=texts,
        text_token_counts=[len(item) for item in ids],
        system_text=0,
        reference_text=1,
        target_text=3,
        num_as_written_tokens=0,
        reference=audio_facts("reference.wav", reference_codes),
        target=audio_facts("target.wav", target_codes),
    )
    return Sample(key, facts, np.concatenate(ids), reference_codes, target_codes)


def audio_facts(path: str, codes: np.ndarray) -> AudioFacts:
    """Of codes [8, T] without a file: the duration follows from their number."""
    num_frames = codes.shape[1]
    return AudioFacts(path, "", num_frames / FRAMES_PER_SECOND, SAMPLE_RATE, num_frames)
