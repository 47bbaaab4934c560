"""Steps on the device: loaded_packs of the loader go in, one `StepBatches` per optimizer step comes out.

The next pack is copied to the GPU on a stream of its own while the present one is computed. Targets are counted here, on
the CPU side, so that a step needs no synchronisation for them. Before a step is handed out the ranks exchange
whether all is well: a fault of one rank stops all of them with its message instead of leaving them in a collective. The
price is one exchange of short strings per step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import msgspec
import torch

from shards.errors import PipelineError
from train.data.stages import LoadedPack
from train.model.batch import PackedBatch
from train.model.loss import LossCounts
from train.world import World

MAX_LOGGED_FAULTS = 20  # faults logged one by one; then only counted
SMALLEST_STREAM = 10_000  # samples a stream is taken to have at least, when it is judged by its share of damaged ones

log = logging.getLogger("train")


@dataclass(frozen=True)
class StepBatches:
    """One rank's packs of a step."""

    epoch: int  # of a stream: passes that any reader has begun before this one
    batches: list[PackedBatch]  # on the device
    counts: LossCounts  # of the packs of all ranks, counted on the CPU
    num_samples: int


class WaitingEnded(BaseException):
    """A signal, raised out of a wait for data; no Exception, so that nothing on its way takes it for a fault of the data."""


class RankReport(msgspec.Struct, frozen=True):
    """What a rank sends the others before a step."""

    step: int
    epoch: int
    bad: int = 0
    too_long: int = 0
    fillers: int = 0
    samples: int = 0
    problem: str = ""  # "" = none
    stopped: bool = False  # by a signal while it waited for data


@dataclass(frozen=True)
class DamageLimits:
    """How much damage is borne, and what the ranks compare when an epoch begins."""

    max_bad_fraction: float
    epoch_samples: int | None = None  # None: a stream, where ranks pass at their own pace; then the samples seen so far
    epoch_facts: Callable[[int], dict[str, str]] | None = None


class Feed:
    """One step after another, without end. Counts what was skipped, over all ranks."""

    def __init__(
        self,
        loaded_packs: Iterator[LoadedPack],
        packs_per_step: int,
        first_step: int,
        world: World,
        limits: DamageLimits,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._loaded_packs = loaded_packs
        self._waiting = waiting
        self._batches = prefetch(loaded_packs, world.device)
        self._micro_steps = packs_per_step // world.size
        self._step = first_step
        self._world = world
        self._limits = limits
        self._epoch = -1
        self._bad_in_epoch = self._seen = self._num_logged = 0
        # Over all ranks, since this process started:
        self.num_bad = self.num_too_long = self.num_fillers = 0

    def __iter__(self) -> Iterator[StepBatches]:
        return self

    def __next__(self) -> StepBatches:
        """Ends on every rank when one of them got a signal while it waited. Raises PipelineError on all when one cannot go on."""
        problem, stopped = "", False
        found: list[tuple[LoadedPack, PackedBatch]] = []
        try:
            with self._waiting():
                found = list(islice(self._batches, self._micro_steps))
            if len(found) < self._micro_steps:
                problem = f"the loader gave {len(found)} of {self._micro_steps} packs of step {self._step + 1}"
        except PipelineError as error:
            problem = str(error)
        except WaitingEnded:
            stopped = True
        loaded_packs = [loaded for loaded, _ in found]
        faults = [fault for loaded in loaded_packs for fault in loaded.faults]
        for fault in faults:
            self._warn(f"skipped: {fault}")
        num_bad = sum(fault.is_damage for fault in faults)
        mine = RankReport(
            step=self._step,
            epoch=loaded_packs[0].epoch if loaded_packs else self._epoch,
            bad=num_bad,
            too_long=len(faults) - num_bad,
            fillers=sum(not loaded.batch.keys for loaded in loaded_packs),
            samples=sum(len(loaded.batch.keys) for loaded in loaded_packs),
            problem=problem,
            stopped=stopped,
        )
        epoch = self._share(mine)
        if epoch is None:
            raise StopIteration
        self._step += 1
        counts = LossCounts.of([loaded.batch for loaded in loaded_packs], self._world)
        counts = replace(counts, audio=counts.audio.to(self._world.device, non_blocking=True))
        return StepBatches(epoch, [batch for _, batch in found], counts, mine.samples)

    def close(self) -> None:
        """End the loader and its processes."""
        for one in (self._batches, self._loaded_packs):
            if isinstance(one, Generator):
                one.close()

    def values(self) -> dict[str, float]:
        """What was skipped so far, for the metrics."""
        return {
            "metrics/bad_samples": self.num_bad,
            "metrics/too_long_samples": self.num_too_long,
            "metrics/filler_packs": self.num_fillers,
        }

    def _share(self, mine: RankReport) -> int | None:
        """Exchange reports and return the epoch, None after a signal; raise on all ranks where one has a problem."""
        reports: list[RankReport] = self._world.gather(mine)
        several, is_stream = len(reports) > 1, self._limits.epoch_samples is None
        for rank, report in enumerate(reports):
            if report.problem:
                raise PipelineError(f"rank {rank}: {report.problem}" if several else report.problem)
            if any(report.stopped for report in reports):
                return None
            if report.step != reports[0].step or (report.epoch != reports[0].epoch and not is_stream):
                raise PipelineError(
                    f"the ranks do not do the same: rank 0 is at step {reports[0].step} of epoch {reports[0].epoch}, rank "
                    f"{rank} at step {report.step} of epoch {report.epoch}; this is a fault of the program"
                )
        if mine.epoch != self._epoch and not is_stream:
            self._epoch, self._bad_in_epoch = mine.epoch, 0
            if several and self._limits.epoch_facts:
                self._world.require_equal(self._limits.epoch_facts(mine.epoch))
        bad = sum(report.bad for report in reports)
        self._bad_in_epoch += bad
        self._seen += bad + sum(report.samples for report in reports)
        self.num_bad += bad
        self.num_too_long += sum(report.too_long for report in reports)
        self.num_fillers += sum(report.fillers for report in reports)
        whole = self._limits.epoch_samples or max(self._seen, SMALLEST_STREAM)
        if self._bad_in_epoch > self._limits.max_bad_fraction * whole:
            raise PipelineError(
                f"{self._bad_in_epoch} of {whole} samples are damaged, more than train.max_bad_fraction = "
                f"{self._limits.max_bad_fraction:g}; the log names them and `inspect-shards verify` checks every byte; "
                "fix the shards or raise the limit"
            )
        return max(report.epoch for report in reports)

    def _warn(self, line: str) -> None:
        if self._num_logged < MAX_LOGGED_FAULTS:
            log.warning("%s", line)
        elif self._num_logged == MAX_LOGGED_FAULTS:
            log.warning("more samples are skipped; from here on they are only counted (metrics/bad_samples)")
        self._num_logged += 1


def prefetch(loaded_packs: Iterator[LoadedPack], device: torch.device) -> Iterator[tuple[LoadedPack, PackedBatch]]:
    """(loaded on the CPU, its batch on the device), the copy running one pack ahead on a side stream."""
    if device.type != "cuda":
        for loaded in loaded_packs:
            yield loaded, loaded.batch.to(device)
        return
    side = torch.cuda.Stream(device)

    def begin() -> tuple[LoadedPack, PackedBatch] | None:
        loaded = next(loaded_packs, None)
        if loaded is None:
            return None
        with torch.cuda.stream(side):
            return loaded, loaded.batch.to(device)

    waiting = begin()
    while waiting is not None:
        present = torch.cuda.current_stream(device)
        present.wait_stream(side)
        loaded, batch = waiting
        batch.record_stream(present)  # else its memory could be given away while a kernel still reads it
        waiting = begin()
        yield loaded, batch
