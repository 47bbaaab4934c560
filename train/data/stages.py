"""What every loader shares: the forms that samples take on their way into a pack, and the stages that change them.

    raw members -> sequences -> packs -> `LoadedPack`, one per micro-step

A damaged sample keeps its place: nothing moves up, its pack goes on without it, and a pack without any sample is a
filler from which nothing is learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from shards.delay_pattern import NUM_CODEBOOKS, STREAM_BOS
from shards.errors import ShardError
from shards.index import hash64
from shards.label_shift import IGNORE
from shards.printable import printable
from shards.reader import SampleReader
from shards.sample import Sample, unpack_sample
from shards.sequence import AUDIO_OUT, BEGIN_OF_TEXT, Sequence, SequenceBuilder
from train.data.references import LISTED, with_reference
from train.data.text_dropout import TextDropout
from train.model.batch import PackedBatch, pack

# One text and one audio position without targets: every branch of the model runs, and nothing is learned.
FILLER = Sequence(
    token_ids=np.array([BEGIN_OF_TEXT, AUDIO_OUT], np.int32),
    codes=np.full((NUM_CODEBOOKS, 1), STREAM_BOS, np.int16),
    next_token=np.full(2, IGNORE, np.int32),
    next_codes=np.full((NUM_CODEBOOKS, 1), IGNORE, np.int16),
    target_columns=(1, 1),
)


class Donor(NamedTuple):
    """Another sample, of which one clip is the reference in this epoch."""

    key: str
    members: dict[str, bytes]
    is_target: bool  # which of its clips


class RawSample(NamedTuple):
    """One sample's members as they were stored, and what the source knows about it."""

    key: str
    members: dict[str, bytes]  # by suffix, as in `shards/__init__.py`; empty where it could not be read
    shard: str = ""
    speaker: int | None = None  # hash64 of the name, where an index knows it
    reason: str = ""  # why it could not be read
    length: int = 0  # positions that the plan counts on; 0 where there is no index
    epoch: int = 0
    pack_size: int = 1  # samples of the planned pack it belongs to; 0 marks an empty pack
    with_text: bool = True  # whether it keeps its reference's text in this epoch
    donor: Donor | None = None  # of its reference; None: its own
    data_set: int = 0  # its number among those of the run


class Fault(NamedTuple):
    """A sample that was skipped in its pack, and why."""

    shard: str
    key: str
    reason: str
    is_damage: bool = True  # False: too long for a pack

    def __str__(self) -> str:
        return printable(f"{self.shard}: sample {self.key}: {self.reason}")


@dataclass(frozen=True, slots=True)
class LoadedPack:
    """What the loader hands over for one micro-step."""

    batch: PackedBatch
    epoch: int
    faults: list[Fault] = field(default_factory=list)

    def pin_memory(self) -> LoadedPack:
        """Called by the DataLoader's pinning thread."""
        return replace(self, batch=self.batch.pin())


class BuiltSample(NamedTuple):
    """A sample on its way into a pack; a damaged one has no sequence."""

    key: str
    shard: str
    speaker: int  # hash64 of the name
    sequence: Sequence | None
    reason: str  # of the damage
    epoch: int
    pack_size: int  # samples of the planned pack it belongs to; 0 marks an empty pack
    data_set: int = 0  # its number among those of the run


# --- stages ---------------------------------------------------------------------------------------------------------


def with_donor(sample: Sample, donor: Donor | None) -> Sample:
    """The sample with its reference of this epoch. Raises ShardError."""
    if donor is None:
        return sample
    try:
        return with_reference(sample, unpack_sample(donor.key, donor.members), donor.is_target)
    except ShardError as error:
        raise ShardError(f"its reference of this epoch: {error}") from None


def build_sequences(builder: SequenceBuilder, dropout: TextDropout | None = None):
    """Stage: raw members -> `BuiltSample`. A sample whose members do not fit together is damaged.

    `dropout` decides for samples of a stream; of planned ones it is known already.
    """

    def stage(raws: Iterable[RawSample]) -> Iterator[BuiltSample]:
        for raw in raws:
            speaker, sequence, reason = raw.speaker, None, raw.reason
            if raw.pack_size and not reason:
                try:
                    sample = with_donor(unpack_sample(raw.key, raw.members), raw.donor)
                    drawn = dropout is not None and not dropout.with_text_of(raw.shard, raw.key, raw.epoch)
                    built = builder.training(sample, raw.with_text and not drawn)
                    if raw.length and len(built) != raw.length:  # a pack would be larger than memory was measured for
                        raise ShardError(f"{len(built)} positions, the index says {raw.length}")
                    sequence = built
                    speaker = hash64(sample.facts.speaker) if speaker is None else speaker
                except (ShardError, ValueError, IndexError) as error:  # the facts of a foreign sample may contradict it
                    reason = str(error)
            yield BuiltSample(
                raw.key, raw.shard, speaker or 0, sequence, reason, raw.epoch, raw.pack_size, raw.data_set
            )

    return stage


def collate(group: list[BuiltSample], epoch: int, num_sets: int = 1) -> LoadedPack:
    """The pack of a group's sound samples, and the faults of the others."""
    sound = [(item, item.sequence) for item in group if item.sequence is not None]
    faults = [Fault(item.shard, item.key, item.reason) for item in group if item.sequence is None]
    if not sound:
        return LoadedPack(pack([FILLER], [0], [], num_sets=num_sets), epoch, faults)
    sequences = [sequence for _, sequence in sound]
    keys = [item.key for item, _ in sound]
    speakers, data_sets = [item.speaker for item, _ in sound], [item.data_set for item, _ in sound]
    return LoadedPack(pack(sequences, speakers, keys, data_sets, num_sets), epoch, faults)


def read_pack(
    reader: SampleReader,
    index: np.ndarray,
    rows: np.ndarray,
    builder: SequenceBuilder,
    num_samples: int,
    with_text: bool = True,
    clips: np.ndarray | None = None,
) -> PackedBatch:
    """A pack of the first sound samples of these rows [m], read here and now. Raises ShardError when there is none.

    `clips` [m]: numbers of the clips (`SpeakerReferences`) that are their references; None: those of the list.
    """
    found, reasons = [], []
    for row, clip in zip(rows, itertools.repeat(LISTED) if clips is None else clips, strict=clips is not None):
        try:
            sample = reader.read(index[row])
            if clip != LISTED:
                sample = with_reference(sample, reader.read(index[clip >> 1]), is_target=clip % 2 == 1)
            sequence = builder.training(sample, with_text)
        except (ShardError, ValueError, IndexError) as error:
            reasons.append(str(error))
            continue
        found.append((sequence, int(index[row]["speaker"]), sample.key))
        if len(found) == num_samples:
            break
    if not found:
        raise ShardError(f"none of the first {len(rows)} samples is usable; the first: {reasons[0]}")
    sequences, speakers, keys = zip(*found, strict=True)
    return pack(list(sequences), list(speakers), list(keys))
