"""`loader = "plan"`, and the loader processes of both loaders.

    source (plan or stream) -> the stages of `train.data.stages` -> `LoadedPack`, one per micro-step

The stages form a `webdataset.DataPipeline`. The plan's source follows `train.data.plan` with random reads instead of streaming
tars, so that order, epoch length and resume do not depend on workers or ranks. Loader workers take packs in turn, and
the DataLoader hands them out in that order again. A fault that ends the run is passed on as a value: an exception crossing
the process border would arrive as a page of traceback.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from webdataset.pipeline import DataPipeline

from shards.errors import PipelineError, ShardError
from shards.printable import first_line
from shards.reader import SampleReader
from shards.sequence import SequenceBuilder
from train.data.loader_processes import (
    FULL_SHARED_MEMORY,
    dead_loader,
    kill_workers,
    only_the_parent_ends,
    require_semaphores,
)
from train.data.plan import Planner
from train.data.references import LISTED
from train.data.stages import BuiltSample, Donor, LoadedPack, RawSample, build_sequences, collate
from train.data.text_dropout import TextDropout
from train.heap import give_back_freed_memory


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
