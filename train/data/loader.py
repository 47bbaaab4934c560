"""From shards to packs: the stages every loader shares, and `loader = "plan"`.

    source (plan or stream) -> raw members -> sequences -> packs -> `LoadedPack`, one per micro-step

The stages form a `webdataset.DataPipeline`. The plan's source follows `train.data.plan` with random reads instead of streaming
tars, so that order, epoch length and resume do not depend on workers or ranks. Loader workers take packs in turn, and
the DataLoader hands them out in that order again.

A damaged sample keeps its place: nothing moves up, its pack goes on without it, and a pack without any sample is a
filler from which nothing is learned. A fault that ends the run is passed on as a value: an exception crossing the
process border would arrive as a page of traceback.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from webdataset.pipeline import DataPipeline

from shards.delay_pattern import NUM_CODEBOOKS, STREAM_BOS
from shards.errors import PipelineError, ShardError
from shards.index import hash64
from shards.label_shift import IGNORE
from shards.printable import first_line, printable
from shards.reader import SampleReader
from shards.sample import Sample, unpack_sample
from shards.sequence import AUDIO_OUT, BEGIN_OF_TEXT, Sequence, SequenceBuilder
from train.data.loader_processes import (
    FULL_SHARED_MEMORY,
    dead_loader,
    kill_workers,
    only_the_parent_ends,
    require_semaphores,
)
from train.data.plan import Planner
from train.data.references import LISTED, with_reference
from train.data.text_dropout import TextDropout
from train.heap import give_back_freed_memory
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


class PlannedSamples(torch.utils.data.IterableDataset):
    """Source stage: raw samples of one rank's packs, without end; worker w of W serves packs w, w + W, ..."""

    def __init__(
        self,
        reader: SampleReader,
        index: np.ndarray,
        packs: Callable[[], Iterator[tuple[int, np.ndarray]]],
        planner: Planner,
        builder: SequenceBuilder,
        dropout: TextDropout | None,
        first_rows: tuple[int, ...] = (0,),
    ) -> None:
        """`first_rows`: where each data set begins in the index."""
        self._first_rows = np.array(first_rows)
        self._builder = builder
        self._dropout = dropout
        self._reader = reader
        self._index = index
        self._packs = packs
        self._planner = planner

    def __iter__(self) -> Iterator[RawSample]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        for epoch, rows in itertools.islice(self._packs(), worker, None, num_workers):
            if not len(rows):
                yield RawSample("", {}, epoch=epoch, pack_size=0)
            references, clips, found = self._planner.references, np.full(len(rows), LISTED), self._index[rows]
            if references:
                clips = references.clips(epoch, rows)
                found = references.with_clips(rows, clips)
            with_text = self._dropout.with_text(found, epoch) if self._dropout else np.ones(len(rows), bool)
            lengths = self._builder.lengths(found, with_text)
            data_sets = np.searchsorted(self._first_rows, rows, side="right") - 1
            planned = (rows, clips, lengths, with_text, data_sets)
            for number, clip, length, has_text, data_set in zip(*(values.tolist() for values in planned), strict=True):
                row = self._index[number]
                shard = self._reader.shard_name(row)
                known = {"shard": shard, "speaker": int(row["speaker"]), "epoch": epoch, "pack_size": len(rows)}
                known["data_set"] = data_set
                try:
                    members = self._reader.read_raw(row)
                    donor = self._read_donor(clip)
                except ShardError as error:
                    key = self._reader.key_of(row, self._planner.position_of(number))
                    yield RawSample(key, {}, reason=str(error), **known)
                else:
                    heard = {"with_text": has_text, "donor": donor}
                    yield RawSample(members.pop("__key__"), members, length=length, **heard, **known)

    def _read_donor(self, clip: int) -> Donor | None:
        """Raises ShardError."""
        if clip == LISTED:
            return None
        try:
            members = self._reader.read_raw(self._index[clip >> 1])
        except ShardError as error:
            raise ShardError(f"its reference of this epoch: {error}") from None
        return Donor(members.pop("__key__"), members, is_target=clip % 2 == 1)


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


def pack_planned(num_sets: int):
    """Stage: sequences of so many data sets -> packs of the planned size."""

    def stage(items: Iterable[BuiltSample]) -> Iterator[LoadedPack | PipelineError]:
        group: list[BuiltSample] = []
        try:
            for item in items:
                if item.pack_size:
                    group.append(item)
                if len(group) == item.pack_size:
                    yield collate(group, item.epoch, num_sets)
                    group = []
        except PipelineError as error:
            yield error

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


# --- loaders --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoaderShare:
    """Which part of the packs this process reads, and with how many loader processes."""

    rank: int = 0
    world_size: int = 1
    num_workers: int = 0


def load_planned_packs(
    reader: SampleReader,
    index: np.ndarray,
    planner: Planner,
    start_step: int,
    builder: SequenceBuilder,
    share: LoaderShare,
    on_window: Callable[[int, int], None] | None = None,
    dropout: TextDropout | None = None,
    first_rows: tuple[int, ...] = (0,),
) -> Iterator[LoadedPack]:
    """One rank's packs of every step from `start_step` on, without end. Raises PipelineError.

    `dropout`: the planner's; None: every sample has its text. `first_rows`: where each data set begins in the index.
    """

    def packs() -> Iterator[tuple[int, np.ndarray]]:
        return planner.rank_packs(start_step, share.rank, share.world_size, on_window)

    source = PlannedSamples(reader, index, packs, planner, builder, dropout, first_rows)
    stages = build_sequences(builder), pack_planned(len(first_rows))
    return run_pipeline(DataPipeline(source, *stages), share.num_workers)


def run_pipeline(pipeline: DataPipeline, num_workers: int) -> Iterator[LoadedPack]:
    """Deliveries of a pipeline, built in loader processes and pinned where there is a GPU. Raises PipelineError."""
    loader = torch.utils.data.DataLoader(
        pipeline,  # pyright: ignore[reportArgumentType] - an IterableDataset in all but its annotation
        batch_size=None,
        num_workers=num_workers,
        # Stages are closures, which other ways to start a process cannot send; Python 3.14 has another way by default.
        multiprocessing_context="fork" if num_workers else None,
        prefetch_factor=4 if num_workers else None,
        collate_fn=share_memory,  # pyright: ignore[reportArgumentType] - of one pack, since batch_size is None
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it would draw from the model's random numbers
        worker_init_fn=only_the_parent_ends if num_workers else None,
    )
    require_semaphores(num_workers)
    if num_workers:
        give_back_freed_memory()  # of the measured packs, which every loader process would keep
    iterator = iter(loader)
    try:
        for loaded in iterator:
            if isinstance(loaded, PipelineError):
                raise loaded
            yield loaded
    except (RuntimeError, ConnectionError, EOFError) as error:
        raise dead_loader(error) or error from None
    finally:
        kill_workers(iterator)


def share_memory(loaded: LoadedPack | PipelineError) -> LoadedPack | PipelineError:
    """In a loader process: move a pack's tensors into shared memory here, where a full /dev/shm can be reported.

    torch would do it in a thread of its queue, which prints the error and drops the pack, and the run would wait for it
    for ever.
    """
    if isinstance(loaded, PipelineError) or torch.utils.data.get_worker_info() is None:
        return loaded
    try:
        return replace(loaded, batch=loaded.batch.shared())
    except (RuntimeError, OSError) as error:
        return PipelineError(f"a loader process cannot hand over a pack: {first_line(error)}; {FULL_SHARED_MEMORY}")
