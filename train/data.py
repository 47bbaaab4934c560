"""Packs in plan order: index rows -> raw members -> samples -> sequences -> PackedBatch.

The stages form a `webdataset.DataPipeline`; its source follows the plan with random reads instead of streaming tars, so
that order, epoch length and resume do not depend on workers or ranks. Loader workers take packs in turn, and the
DataLoader hands them out in that order again. A fault is passed on as a value: an exception crossing the process
border would arrive as a page of traceback.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset.pipeline import DataPipeline

from shards.errors import PipelineError
from shards.reader import SampleReader
from shards.sample import Sample, unpack_sample
from shards.sequence import Sequence, SequenceBuilder
from train.packing import PackedBatch, Planner, pack
from train.parallel import ALONE, World


class PlannedSamples(torch.utils.data.IterableDataset):
    """Source stage: raw samples of every step from `start_step` on, without end; worker w of W serves packs w, w + W, ..."""

    def __init__(self, dataset_dir: Path, index: np.ndarray, planner: Planner, start_step: int, world: World) -> None:
        self._world = world
        self._reader = SampleReader(dataset_dir)
        self._index = index
        self._planner = planner
        self._start_step = start_step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        packs = (
            pack
            for _, packs in self._planner.steps_from(self._start_step)
            for pack in packs[self._world.rank :: self._world.size]
        )
        for rows in itertools.islice(packs, worker, None, num_workers):
            for row in rows:
                raw = self._reader.read_raw(self._index[row])
                yield {**raw, "__pack_size__": len(rows), "__speaker__": int(self._index[row]["speaker"])}


def build_sequences(builder: SequenceBuilder):
    """Stage: raw members -> (key, speaker, pack size, sequence)."""

    def stage(raws: Iterable[dict[str, Any]]) -> Iterator[tuple[str, int, int, Sequence]]:
        for raw in raws:
            members = {name: value for name, value in raw.items() if not name.startswith("__")}
            sample: Sample = unpack_sample(raw["__key__"], members)
            yield sample.key, raw["__speaker__"], raw["__pack_size__"], builder.training(sample)

    return stage


def pack_planned(items: Iterable[tuple[str, int, int, Sequence]]) -> Iterator[PackedBatch | PipelineError]:
    """Stage: sequences -> packs of the planned size."""
    keys: list[str] = []
    speakers: list[int] = []
    sequences: list[Sequence] = []
    try:
        for key, speaker, pack_size, sequence in items:
            keys.append(key)
            speakers.append(speaker)
            sequences.append(sequence)
            if len(sequences) == pack_size:
                yield pack(sequences, speakers, keys)
                keys, speakers, sequences = [], [], []
    except PipelineError as error:
        yield error


def planned_batches(
    dataset_dir: Path,
    index: np.ndarray,
    planner: Planner,
    start_step: int,
    builder: SequenceBuilder,
    num_workers: int,
    world: World = ALONE,
) -> Iterator[PackedBatch]:
    """The packs of every step from `start_step` on, without end. Raises the PipelineError of an unreadable sample."""
    source = PlannedSamples(dataset_dir, index, planner, start_step, world)
    pipeline = DataPipeline(source, build_sequences(builder), pack_planned)
    loader = torch.utils.data.DataLoader(
        pipeline,  # pyright: ignore[reportArgumentType] - an IterableDataset in all but its annotation
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        collate_fn=_unchanged,
    )
    for batch in loader:
        if isinstance(batch, PipelineError):
            raise batch
        yield batch.pin() if torch.cuda.is_available() else batch


def read_pack(dataset_dir: Path, index: np.ndarray, rows: np.ndarray, builder: SequenceBuilder) -> PackedBatch:
    """One pack of these index rows, read here and now. Raises ShardError."""
    reader = SampleReader(dataset_dir)
    samples = [reader.read(index[row]) for row in rows]
    speakers = [int(index[row]["speaker"]) for row in rows]
    return pack([builder.training(sample) for sample in samples], speakers, [sample.key for sample in samples])


def _unchanged(batch: Any) -> Any:
    return batch
