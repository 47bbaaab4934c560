"""What a stream's samples go through on their way into packs, each a stage of a webdataset pipeline.

In: lists of shards. Out: packs within the budgets, with what was skipped beside them. Each reader has its own share of the
shards in an order drawn anew for every pass. Between reading and packing stands the shuffle buffer, so whether a pass had a
usable sample is told by counting (`Passes`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from webdataset.filters import shuffle

from shards.errors import PipelineError, ShardError
from shards.label_shift import IGNORE
from train.config import TrainSection
from train.data.loader import LoaderShare
from train.data.packing import OPEN_PACKS, OnlinePacks, plan_settings
from train.data.shard_urls import read_shards
from train.data.stages import BuiltSample, Fault, LoadedPack, RawSample, collate

MAX_ASIDE = 1000  # samples too long for a pack that wait to be reported with the next one


class StreamedSamples(torch.utils.data.IterableDataset):
    """Source stage: raw samples of this reader's shards, pass after pass without end, each pass in another order."""

    def __init__(
        self, urls: list[str], seed: int, first_step: int, share: LoaderShare, passes: Passes | None = None
    ) -> None:
        self._urls = urls
        self._passes = passes
        self._key = [seed, first_step]
        self._share = share

    def __iter__(self) -> Iterator[RawSample]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        part, parts = self._share.rank * num_workers + worker, self._share.world_size * num_workers
        for number in itertools.count():
            generator = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, 0, number]))
            own = [self._urls[i] for i in generator.permutation(len(self._urls))[part::parts]]
            num_sound = num_read = 0
            reason = ""
            for raw in read_shards(own):
                num_read += 1
                reason = reason or raw.reason
                num_sound += not raw.reason
                yield raw._replace(epoch=number)
            if not num_sound:  # else the loop would go round for ever
                raise ShardError(f"no sample in {len(own)} shards, the first {own[0]}{': ' + reason if reason else ''}")
            if self._passes:
                self._passes.num_samples = max(self._passes.num_samples, num_read * parts)


def numbered(lists: list[list[str]]):
    """Stage: raw samples know the number of the data set that their shard is of; of a shard in two lists, the first."""
    numbers = {url: number for number, urls in reversed(list(enumerate(lists))) for url in urls}
    numbers |= {str(Path(url).absolute()): number for url, number in numbers.items() if "://" not in url}

    def stage(raws: Iterable[RawSample]) -> Iterator[RawSample]:
        for raw in raws:
            yield raw._replace(data_set=numbers.get(raw.shard, 0))

    return stage


def shuffled(size: int, seed: int, first_step: int, rank: int) -> Callable[[Iterable[RawSample]], Iterator[RawSample]]:
    """Stage: webdataset's shuffle buffer, the same order for the same reader of the same run."""

    def stage(raws: Iterable[RawSample]) -> Iterator[RawSample]:
        info = torch.utils.data.get_worker_info()
        rng = random.Random(f"{seed} {first_step} {rank} {info.id if info else 0}")
        yield from shuffle(size, initial=size, rng=rng)(iter(raws))

    return stage


@dataclass
class Passes:
    """Whether a stream gives anything to train on; one per reader, shared by the stage that reads and the one that packs.

    Between the two stands the shuffle buffer, from which a sample comes out after a random while: so a pass without a
    usable sample is told from the number of useless ones in a row.
    """

    num_samples: int = 0  # of a whole pass of all readers; 0 until this reader has ended its first one
    num_damaged: int = 0  # in a row, as the two below
    num_too_long: int = 0
    reason: str = ""  # of the first in the row

    def reason_of(self, item: BuiltSample, longest: int) -> str:
        """Why this sample cannot be used, "" if it can; counted."""
        if item.sequence is None:
            reason = item.reason
            self.num_damaged += 1
        elif len(item.sequence) > longest:
            reason = f"{len(item.sequence)} tokens: longer than a pack of {longest}"
            self.num_too_long += 1
        else:
            self.found_usable()
            return ""
        self.reason = self.reason or f"{item.shard}: sample {item.key}: {reason}"
        return reason

    def found_usable(self) -> None:
        self.num_damaged = self.num_too_long = 0
        self.reason = ""

    def is_over(self, buffer: int) -> bool:
        """Whether no usable sample can be left in the buffer: 20 times its size is a chance of 2e-9 for each."""
        useless = self.num_damaged + self.num_too_long
        return bool(self.num_samples) and useless > self.num_samples + 20 * buffer

    def message(self, num_shards: int = 0) -> str:
        where = f"a whole pass over {num_shards} shards" if num_shards else "a whole pass over the stream"
        return (
            f"{where} has no usable sample: {self.num_damaged} damaged, {self.num_too_long} longer than a pack "
            f"(the first: {self.reason}); raise train.batch_tokens or give other shards"
        )


def pack_online(section: TrainSection, passes: Passes, num_sets: int = 1):
    """Stage: sequences -> packs within the budgets; a sequence that fits no pack is skipped and logged."""

    def stage(items: Iterable[BuiltSample]) -> Iterator[LoadedPack | PipelineError]:
        packs = OnlinePacks[BuiltSample](plan_settings(section))
        aside: list[BuiltSample | Fault] = []  # logged with the next pack
        try:
            for item in items:
                reason = passes.reason_of(item, plan_settings(section).batch_tokens)
                if passes.is_over(section.shuffle_buffer):
                    raise ShardError(passes.message())
                if item.sequence is None:
                    aside.append(Fault(item.shard, item.key, reason))
                    if len(aside) >= OPEN_PACKS:  # a shard of damage only must be reported too
                        yield with_faults(collate([], item.epoch, num_sets), aside)
                    continue
                length = len(item.sequence)
                columns = int((item.sequence.next_codes != IGNORE).any(axis=0).sum())
                if reason or not packs.fits(length, columns):
                    too_long = f"{length} tokens, {columns} targets: longer than a pack"
                    aside.append(Fault(item.shard, item.key, too_long, is_damage=False))
                    if len(aside) >= MAX_ASIDE:
                        yield with_faults(collate([], item.epoch, num_sets), aside)
                    continue
                for group in packs.add(item, length, columns):
                    yield with_faults(collate(group, max(item.epoch for item in group), num_sets), aside)
        except PipelineError as error:
            yield error

    return stage


def with_faults(loaded: LoadedPack, aside: list) -> LoadedPack:
    loaded.faults.extend(aside)
    aside.clear()
    return loaded
