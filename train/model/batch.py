"""A pack: the sequences of some samples side by side, as the tensors the model reads.

In: sequences, speakers and keys. Out: a `PackedBatch`. Which samples share a pack is decided in `train.data.plan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shards.delay_pattern import NUM_MARKER_COLUMNS
from shards.errors import ShardError
from shards.label_shift import IGNORE
from shards.mel import num_positions
from shards.sequence import AUDIO_OUT, WHISPER, Sequence, WhisperClip
from train.model.attention import Documents

ON_CPU = frozenset({"targets_per_codebook", "set_counts"})  # what the loop counts with


class WhisperRows(NamedTuple):
    """Where the embeddings of a pack's Whisper rows come from: C clips to run through the tower, or stored states."""

    rows: Tensor  # [Nw] int64 text rows, in sentence order
    mels: Tensor  # [C, 128, 2 m + 2] float32 for the tower; C = 0 where the shards hold states
    positions: Tensor  # [C] int64, each clip's own positions at 50 Hz among the m
    places: Tensor  # [Nw] int64 place of each row in the tower's flattened output [C * (m // 2)]
    states: Tensor  # [Nw, d] float16 stored states; [0, 0] where the tower runs


@dataclass(slots=True)
class PackedBatch:
    """The tensors of one pack. Rows are numbered text first: text row i is i, audio row j is Nt + j."""

    text_ids: Tensor  # [Nt] int64
    codes: Tensor  # [Na, K] int64, markers included
    positions: Tensor  # [R] int64, position inside the document
    documents: Documents  # which rows belong together, and in which order
    text_rows: Tensor  # [n] int64 rows that must predict a text token
    text_targets: Tensor  # [n] int64
    audio_rows: Tensor  # [m] int64 audio rows (without Nt) that must predict codes
    audio_targets: Tensor  # [m, K] int64, IGNORE in the staircases
    segments: Tensor  # [Na] int64, 2 s for sample s's reference columns, 2 s + 1 for its target's
    speakers: Tensor  # [S] int64
    text_sets: Tensor  # [n] int64, the data set that each learned text row is of
    audio_sets: Tensor  # [m] int64, the same of learned audio rows
    whisper: WhisperRows | None  # None without Whisper conditioning
    targets_per_codebook: Tensor  # [K] int64, stays on the CPU
    set_counts: (
        Tensor  # [D, 3 + K] int64, on the CPU: samples, target frames, text targets, targets per codebook of each set
    )
    num_pairs: int  # samples with another speaker beside them: what the contrastive loss counts
    num_attended: int  # pairs of positions that attention compares
    keys: list[str]  # [S]

    def to(self, device: torch.device) -> PackedBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def shared(self) -> PackedBatch:
        """In shared memory, for another process. Raises RuntimeError when there is not enough."""
        batch = self._each(lambda tensor: tensor.share_memory_())
        counts = {name: getattr(self, name).share_memory_() for name in ON_CPU}
        return dataclasses.replace(batch, **counts)

    def pin(self) -> PackedBatch:
        return self._each(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until what `stream` has been given so far is done."""
        self._each(lambda tensor: tensor.record_stream(stream) or tensor)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def with_codes(self, codes: Tensor) -> PackedBatch:
        """The same pack with other inputs [Na, K] and the old targets."""
        return dataclasses.replace(self, codes=codes)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in changed.items():
            if isinstance(value, Tensor) and name not in ON_CPU:
                changed[name] = change(value)
        order, place, bounds, longest = self.documents
        changed["documents"] = Documents(change(order), change(place), change(bounds), longest)
        if self.whisper is not None:
            changed["whisper"] = WhisperRows(*(change(tensor) for tensor in self.whisper))
        return PackedBatch(**changed)

    @property
    def num_tokens(self) -> int:
        return len(self.positions)


def pack(
    sequences: list[Sequence],
    speakers: list[int],
    keys: list[str],
    data_sets: list[int] | None = None,
    num_sets: int = 1,
) -> PackedBatch:
    """Lay sequences side by side. `speakers` are 64-bit hashes, one per sequence; `data_sets` the number of the data set
    among `num_sets` that each is of, None: all of the first."""
    ids = np.concatenate([sequence.token_ids for sequence in sequences])
    lengths = np.array([len(sequence) for sequence in sequences])
    is_audio = ids == AUDIO_OUT
    num_text = int((~is_audio).sum())
    row_of = np.where(is_audio, num_text + np.cumsum(is_audio) - 1, np.cumsum(~is_audio) - 1)  # sentence order -> row

    starts = np.cumsum(lengths) - lengths
    position = np.arange(len(ids)) - np.repeat(starts, lengths)
    positions, place = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
    positions[row_of] = position
    place[row_of] = np.arange(len(ids))
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)

    next_token = np.concatenate([sequence.next_token for sequence in sequences])
    says_text = np.flatnonzero(next_token != IGNORE)
    next_codes = np.concatenate([sequence.next_codes for sequence in sequences], axis=1).T  # [Na, K]
    speaker = np.array(speakers, np.uint64)
    data_set = np.array(data_sets or [0] * len(sequences))
    text_sets = np.repeat(data_set, lengths)[says_text]
    says_codes = np.flatnonzero((next_codes != IGNORE).any(axis=1))
    audio_sets = np.repeat(data_set, [sequence.codes.shape[1] for sequence in sequences])[says_codes]
    return PackedBatch(
        text_ids=_int64(ids[~is_audio]),
        codes=_int64(np.concatenate([sequence.codes for sequence in sequences], axis=1).T),
        positions=torch.from_numpy(positions),
        documents=Documents(
            _int64(row_of), torch.from_numpy(place), torch.from_numpy(bounds), longest=int(lengths.max())
        ),
        text_rows=_int64(row_of[says_text]),
        text_targets=_int64(next_token[says_text]),
        audio_rows=_int64(says_codes),
        audio_targets=_int64(next_codes[says_codes]),
        segments=torch.from_numpy(_segments(sequences)),
        speakers=torch.from_numpy(speaker.view(np.int64)),
        whisper=pack_whisper(
            _int64(row_of[ids == WHISPER]), [h for sequence in sequences for h in sequence.whisper_clips], keys
        ),
        targets_per_codebook=torch.from_numpy((next_codes != IGNORE).sum(axis=0)),
        text_sets=_int64(text_sets),
        audio_sets=_int64(audio_sets),
        set_counts=count_sets(num_sets, data_set, sequences, text_sets, next_codes[says_codes], audio_sets),
        num_attended=int((lengths * (lengths + 1) // 2).sum()),
        num_pairs=int((speaker[:, None] != speaker[None, :]).any(axis=1).sum()),
        keys=keys,
    )


def count_sets(
    num_sets: int,
    data_set: np.ndarray,
    sequences: list[Sequence],
    text_sets: np.ndarray,
    next_codes: np.ndarray,
    audio_sets: np.ndarray,
) -> Tensor:
    """`PackedBatch.set_counts` of sequences of these data sets [S], learned text rows [n] and audio rows [m]."""
    frames = np.array([end - start - NUM_MARKER_COLUMNS for start, end in (one.target_columns for one in sequences)])
    is_sample = frames > 0  # what fills up an empty pack is none
    counts = np.zeros((num_sets, 3 + next_codes.shape[1]), np.int64)
    for number, row in enumerate(counts):  # few sets; numpy's add.at takes ten times as long (7.6 ms for 12,000 rows)
        own = (data_set == number) & is_sample
        row[:3] = own.sum(), frames[own].sum(), (text_sets == number).sum()
        row[3:] = (next_codes[audio_sets == number] != IGNORE).sum(axis=0)
    return torch.from_numpy(counts)


def pack_whisper(rows: Tensor, clips: list[WhisperClip], keys: list[str]) -> WhisperRows | None:
    """rows [Nw] of the clips in `clips`. Raises ShardError when mels and states meet in one pack."""
    if not clips:
        return None
    mels = [clip.mel for clip in clips if clip.mel is not None]
    states = [clip.states for clip in clips if clip.states is not None]
    none = torch.zeros(0, dtype=torch.long)
    if not mels:
        return WhisperRows(rows, torch.zeros(0, 128, 0), none, none, torch.from_numpy(np.concatenate(states)))
    if states:
        raise ShardError(
            f"samples {keys[0]} to {keys[-1]}: some hold Whisper mels, some encoder states; one data set, one kind"
        )
    positions = np.array([num_positions(clip.num_samples) for clip in clips])
    longest = int(positions.max())
    features = np.zeros((len(mels), mels[0].shape[0], 2 * longest + 2), np.float32)
    for clip, mel in zip(features, mels, strict=True):
        clip[:, : mel.shape[1]] = mel[:, : clip.shape[1]]  # behind 30 s stand zeros, as the convolutions pad
    places = [clip * (longest // 2) + np.arange(len(one)) for clip, one in enumerate(clips)]
    return WhisperRows(
        rows, torch.from_numpy(features), _int64(positions), _int64(np.concatenate(places)), torch.zeros(0, 0)
    )


def _segments(sequences: list[Sequence]) -> np.ndarray:
    """[Na] int64: which pooled mean each audio column belongs to."""
    segments = []
    for number, sequence in enumerate(sequences):
        segment = np.full(sequence.codes.shape[1], 2 * number, np.int64)
        start, end = sequence.target_columns
        segment[start:end] += 1
        segments.append(segment)
    return np.concatenate(segments)


def _int64(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
