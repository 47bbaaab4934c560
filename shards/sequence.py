"""The one sequence builder: all that trains, speaks or counts lengths uses it.

In: a `Sample` (facts). Out: a `Sequence`, what the model reads at each position and what each position must predict.
The targets are stored already shifted (`next_token`, `next_codes`; `label_shift`), the codes already delayed
(`delay_pattern`). The price is that targets do not line up with `token_ids` when printed side by side.

With conditioning "whisper+codes" a reference becomes [Whisper rows at 25 Hz][columns]: the rows carry the id of
`<|AUDIO|>`, take the text path, and their embeddings come from a Whisper tower.

A voice whose words are not known (`sequence.reference_text_dropout`) stands in the system turn, in its scene, without a
turn of text before it: the released examples' form.

Letters: K = 8 codebooks, T = codec frames of one audio, A = T + K + 1 delayed columns, L = positions of the sequence,
W = Whisper rows of one reference.
Formats: prompt and labels of boson-ai/higgs-audio `prepare_chatml_sample` and its collator, the voice without text of its
examples/generation.py (--ref_audio_in_system_message), delay pattern of the released model; facts and measurements in
NOTES.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from shards.config import SequenceSection
from shards.delay_pattern import NUM_CODEBOOKS, NUM_MARKER_COLUMNS, delay
from shards.errors import ConfigError, ShardError
from shards.label_shift import IGNORE, next_columns, next_tokens
from shards.mel import num_rows, rebuild_mel
from shards.sample import Sample
from shards.sample_checks import check_whisper

SAMPLE_RATE = 24000  # of the waves that the codec encodes
FRAMES_PER_SECOND = 25  # of its codes: 960 samples each

BEGIN_OF_TEXT = 128000
EOM = 128008
EOT = 128009
AUDIO_BOS = 128011
AUDIO_EOS = 128012
AUDIO_OUT_BOS = 128013
WHISPER = 128015  # `<|AUDIO|>`: the id at every Whisper row; the embedding there comes from the tower
AUDIO_OUT = 128016  # the id at every audio column; the embedding there comes from the codes
SPECIAL_TOKENS = {
    "<|begin_of_text|>": BEGIN_OF_TEXT,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": EOM,
    "<|eot_id|>": EOT,
    "<|audio_bos|>": AUDIO_BOS,
    "<|audio_eos|>": AUDIO_EOS,
    "<|audio_out_bos|>": AUDIO_OUT_BOS,
    "<|AUDIO|>": WHISPER,
    "<|AUDIO_OUT|>": AUDIO_OUT,
}


SCENE_START, SCENE_END = "<|scene_desc_start|>", "<|scene_desc_end|>"
VOICE = "SPEAKER0: "  # before the audio of the first, here the only, speaker


@dataclass(frozen=True, slots=True)
class WhisperClip:
    """What Whisper makes of one reference: the mel its tower reads, or the states that stage one made of it."""

    num_samples: int  # at 16 kHz
    mel: np.ndarray | None = None  # [128, 3000] float32
    states: np.ndarray | None = None  # [W, d] float16

    def __len__(self) -> int:
        """W."""
        return int(num_rows(self.num_samples))


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sample as the model sees it. Audio columns appear in `codes` in the order of their positions."""

    token_ids: np.ndarray  # [L] int32, AUDIO_OUT at audio columns, WHISPER at Whisper rows
    codes: np.ndarray  # [K, A] int16, markers included; A over all audios of the sample
    next_token: np.ndarray  # [L] int32, what the text head must say at this position; IGNORE = not learned
    next_codes: np.ndarray  # [K, A] int16, what the audio head must say at this column; IGNORE = not learned
    target_columns: tuple[int, int]  # [start, end) of the target in A; empty in a prompt
    whisper_clips: tuple[WhisperClip, ...] = ()  # in the order of their positions; empty without Whisper conditioning

    def __len__(self) -> int:
        return len(self.token_ids)


# --- layouts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    ids: np.ndarray  # [n] int32
    learned: bool = False


@dataclass(frozen=True, slots=True)
class Audio:
    codes: np.ndarray  # [K, T] raw
    is_target: bool
    whisper: WhisperClip | None = None  # its Whisper rows come right before its columns


Segment = Text | Audio


class SequenceBuilder:
    """Builds sequences of one layout. Holds only token ids, so it is cheap to send to loader processes."""

    def __init__(self, tokenizer: Tokenizer, section: SequenceSection) -> None:
        """Raises ConfigError when the tokenizer does not have Higgs Audio v2's special tokens."""
        check_special_tokens(tokenizer)
        if section.reference_text_dropout and section.layout != "clone":
            raise ConfigError(
                f"sequence.reference_text_dropout = {section.reference_text_dropout:g} needs sequence.layout "
                f'"clone": turns of layout {section.layout!r} stay as they were written; set it to 0'
            )
        self.layout = section.layout
        self.reference_text_dropout = section.reference_text_dropout  # > 0: the model knows voices without their text
        self.reads_reference_text = section.reference_text_dropout < 1  # at 1 it knows no other: a text is left out
        self.uses_whisper = section.conditioning == "whisper+codes"  # "auto" is decided by whoever knows the checkpoint
        self._headers = {
            role: encode_text(tokenizer, f"<|start_header_id|>{role}<|end_header_id|>\n\n")
            for role in ("system", "user", "assistant")
        }
        # None: every row's own system text.
        self._system = encode_text(tokenizer, section.system_prompt) if section.system_prompt else None
        # Around the reference of a voice without text; the first holds the configured system text.
        self._before_voice, self._after_voice = (
            encode_text(tokenizer, part) for part in around_voice(section.system_prompt)
        )

    def training(self, sample: Sample, with_reference_text: bool = True) -> Sequence:
        """The whole sequence with its targets; without the reference's text in the form for voices without one."""
        return assemble(self._segments(sample, with_reference_text))

    def prompt(self, sample: Sample) -> Sequence:
        """The training sequence cut right before the target's first column: what generation continues.

        The sample's target codes are not read. Where the reference has no text, a model that was trained so gets the form
        that it knows; for another its place stays empty.
        """
        segments = self._segments(sample)
        cut = next(i for i, segment in enumerate(segments) if isinstance(segment, Audio) and segment.is_target)
        return assemble(segments[:cut])

    def lengths(self, index: np.ndarray, with_reference_text: np.ndarray | None = None) -> np.ndarray:
        """Sequence length [n] int64 of each index row, without reading a sample. with_reference_text [n] bool: all, if None."""
        if self.layout == "as_written":
            text = index["num_as_written_tokens"].astype(np.int64)
        else:
            system = index["num_system_tokens"] if self._system is None else len(self._system)
            texts = index["num_reference_text_tokens"].astype(np.int64) + index["num_target_text_tokens"]
            text = self._clone_fixed_tokens + system + texts
            if self.reference_text_dropout:
                has_text = index["num_reference_text_tokens"] > 0
                has_text = has_text if with_reference_text is None else has_text & with_reference_text
                has_text &= self.reads_reference_text
                own = index["num_system_tokens"].astype(np.int64) if self._system is None else 0
                without = self._voice_fixed_tokens + own + index["num_target_text_tokens"].astype(np.int64)
                text = np.where(has_text, text, without)
        whisper = num_rows(index["mel_samples"].astype(np.int64)) if self.uses_whisper else 0
        return text + whisper + index["reference_frames"] + index["target_frames"] + 2 * NUM_MARKER_COLUMNS

    def num_as_written_tokens(self, sample: Sample) -> int:
        """Token ids of the as_written layout without Whisper rows: a fact that stage one stores in the index."""
        return sum(len(segment.ids) for segment in self._as_written(sample) if isinstance(segment, Text))

    @property
    def _clone_fixed_tokens(self) -> int:
        headers = self._headers
        turns = len(headers["system"]) + 2 * len(headers["user"]) + 2 * len(headers["assistant"])
        return 1 + turns + 5 + 2 * 2  # begin of text, 5 end of turn, 2 x (audio_out_bos, audio_eos)

    @property
    def _voice_fixed_tokens(self) -> int:
        headers = self._headers
        turns = len(headers["system"]) + len(headers["user"]) + len(headers["assistant"])
        voice = len(self._before_voice) + len(self._after_voice)
        return (
            1 + turns + voice + 3 + 2 * 2
        )  # begin of text, 3 end of turn, 2 x (audio_bos or audio_out_bos, audio_eos)

    def _segments(self, sample: Sample, with_reference_text: bool = True) -> list[Segment]:
        if self.layout != "clone":
            return self._as_written(sample)
        has_text = self.reads_reference_text and bool(len(sample.text_item_ids(sample.facts.reference_text)))
        without = self.reference_text_dropout and not (has_text and with_reference_text)
        return self._clone_without_text(sample) if without else self._clone(sample)

    def _clone(self, sample: Sample) -> list[Segment]:
        """The released model's cloning prompt: the reference as an earlier assistant turn."""
        facts = sample.facts
        system = self._own_system(sample) if self._system is None else self._system
        return [
            Text(_ids(BEGIN_OF_TEXT)),
            Text(self._headers["system"]),
            Text(system),
            Text(_ids(EOT)),
            Text(self._headers["user"]),
            Text(sample.text_item_ids(facts.reference_text)),
            Text(_ids(EOT)),
            Text(self._headers["assistant"]),
            Text(_ids(AUDIO_OUT_BOS)),
            self._reference(sample),
            Text(_ids(AUDIO_EOS, EOT)),
            *self._asked_and_said(sample),
        ]

    def _clone_without_text(self, sample: Sample) -> list[Segment]:
        """The released examples' form for a voice without text: the reference in the scene of the system turn."""
        return [
            Text(_ids(BEGIN_OF_TEXT)),
            Text(self._headers["system"]),
            *([Text(self._own_system(sample))] if self._system is None else []),
            Text(self._before_voice),
            Text(_ids(AUDIO_BOS)),
            self._reference(sample),
            Text(_ids(AUDIO_EOS)),
            Text(self._after_voice),
            Text(_ids(EOT)),
            *self._asked_and_said(sample),
        ]

    def _asked_and_said(self, sample: Sample) -> list[Segment]:
        """The turns of the target, the same in both forms."""
        return [
            Text(self._headers["user"]),
            Text(sample.text_item_ids(sample.facts.target_text)),
            Text(_ids(EOT)),
            Text(self._headers["assistant"]),
            Text(_ids(AUDIO_OUT_BOS), learned=True),
            Audio(sample.target_codes, is_target=True),
            Text(_ids(AUDIO_EOS, EOT), learned=True),
        ]

    def _own_system(self, sample: Sample) -> np.ndarray:
        """Token ids [n] int32 of the row's own system text."""
        item = sample.facts.system_text
        return _ids() if item is None else sample.text_item_ids(item)

    def _as_written(self, sample: Sample) -> list[Segment]:
        """The ChatML turns as they stand, ids and text labels as boson's `prepare_chatml_sample`."""
        facts = sample.facts
        segments: list[Segment] = [Text(_ids(BEGIN_OF_TEXT))]
        for number, turn in enumerate(facts.turns):
            is_assistant = turn.role == "assistant"
            learned = is_assistant and number >= (facts.start_index or 0)
            segments.append(Text(self._headers[turn.role]))
            for item in turn.items:
                if isinstance(item, int):
                    segments.append(Text(sample.text_item_ids(item), learned))
                    continue
                opening = AUDIO_OUT_BOS if is_assistant else AUDIO_BOS
                segments.append(Text(_ids(opening), learned))
                is_target = item == "target"
                segments.append(Audio(sample.target_codes, True) if is_target else self._reference(sample))
                segments.append(Text(_ids(AUDIO_EOS), learned))
            goes_on = is_assistant and number + 1 < len(facts.turns) and facts.turns[number + 1].role == "assistant"
            segments.append(Text(_ids(EOM if goes_on else EOT), learned))
        return segments

    def _reference(self, sample: Sample) -> Audio:
        return Audio(
            sample.reference_codes, is_target=False, whisper=whisper_clip(sample) if self.uses_whisper else None
        )


def whisper_clip(sample: Sample) -> WhisperClip:
    """What Whisper makes of the sample's reference. Raises ShardError when the shard does not hold it."""
    mel = sample.facts.mel
    if mel is not None:
        try:
            states = sample.reference_whisper()
            frames = sample.reference_mel() if states is None else None
            check_whisper(frames, states, mel.num_samples, int(num_rows(mel.num_samples)))
        except Exception as error:  # numpy's and zstd's kinds, for bytes that are not theirs
            raise ShardError(f"sample {sample.key}: malformed member: {error}") from None
        if states is not None:
            return WhisperClip(mel.num_samples, states=states)
        if frames is not None:
            return WhisperClip(mel.num_samples, mel=rebuild_mel(frames, mel.floor, mel.num_samples)[0])
    raise ShardError(
        f'sample {sample.key}: no Whisper features of the reference, and sequence.conditioning is "whisper+codes"; run '
        'preprocess with features.whisper = "mel", or set sequence.conditioning = "codes"'
    )


def assemble(segments: list[Segment]) -> Sequence:
    """Concatenate segments and shift the labels by one."""
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    target_columns = (0, 0)
    num_columns = 0
    whisper_clips: list[WhisperClip] = []
    for segment in segments:
        if isinstance(segment, Text):
            ids.append(segment.ids)
            labels.append(segment.ids if segment.learned else np.full_like(segment.ids, IGNORE))
            continue
        if segment.whisper is not None:
            whisper_clips.append(segment.whisper)
            ids.append(np.full(len(segment.whisper), WHISPER, dtype=np.int32))
            labels.append(np.full(len(segment.whisper), IGNORE, dtype=np.int32))
        delayed = delay(segment.codes)
        if segment.is_target:
            target_columns = (num_columns, num_columns + delayed.shape[1])
        num_columns += delayed.shape[1]
        columns.append(delayed)
        targets.append(next_columns(segment.codes) if segment.is_target else np.full_like(delayed, IGNORE))
        ids.append(np.full(delayed.shape[1], AUDIO_OUT, dtype=np.int32))
        labels.append(np.full(delayed.shape[1], IGNORE, dtype=np.int32))
    return Sequence(
        token_ids=np.concatenate(ids),
        codes=np.concatenate(columns, axis=1) if columns else np.zeros((NUM_CODEBOOKS, 0), np.int16),
        next_token=next_tokens(np.concatenate(labels)),
        next_codes=np.concatenate(targets, axis=1) if targets else np.zeros((NUM_CODEBOOKS, 0), np.int16),
        target_columns=target_columns,
        whisper_clips=tuple(whisper_clips),
    )


# --- text -----------------------------------------------------------------------------------------------------------


def around_voice(system_prompt: str) -> tuple[str, str]:
    """The text before and behind a reference without text: inside the prompt's scene, or in one of its own behind it."""
    end = f"\n{SCENE_END}"
    if system_prompt.endswith(end) and SCENE_START in system_prompt:
        return f"{system_prompt.removesuffix(end)}\n\n{VOICE}", end
    return f"{system_prompt}\n\n{SCENE_START}\n{VOICE}", end


def encode_text(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids [n] int32 of one text item, without begin-of-text; items are tokenised apart and concatenated."""
    return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)


def check_special_tokens(tokenizer: Tokenizer) -> None:
    wrong = {
        token: tokenizer.token_to_id(token) for token, i in SPECIAL_TOKENS.items() if tokenizer.token_to_id(token) != i
    }
    if wrong:
        found = ", ".join(f"{token} is {found}, expected {SPECIAL_TOKENS[token]}" for token, found in wrong.items())
        raise ConfigError(f"model.base has a tokenizer that is not Higgs Audio v2's: {found}")


def _ids(*token_ids: int) -> np.ndarray:
    return np.asarray(token_ids, dtype=np.int32)
