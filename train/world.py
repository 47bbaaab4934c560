"""Ranks: joining a launch, and agreeing.

In: torchrun's or Slurm's environment, or none. Out: a `World`. What ranks exchange goes through gloo, on the CPU, so
that it never waits for the GPU. One process on CPU needs none of this and runs without a process group.
"""

from __future__ import annotations

import atexit
import gc
import os
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shards.errors import ConfigError, PipelineError
from shards.printable import first_line

LONG_TIMEOUT = timedelta(minutes=30)  # until every rank has loaded and compiled
MAX_SHOWN_CHARACTERS = 16  # characters of a value in a message
SHORT_TIMEOUT = timedelta(minutes=5)  # afterwards: a rank that is gone must end the others soon


@dataclass(frozen=True)
class World:
    """This process among the others. `is_distributed` False: alone, without a process group."""

    rank: int
    size: int
    device: torch.device
    is_distributed: bool

    def __str__(self) -> str:
        return f"{self.size} rank{'s' if self.size > 1 else ''} on {self.device.type}"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks of a small CPU tensor, through gloo: it never waits for the GPU."""
        if self.is_distributed:
            try:
                dist.all_reduce(values)
            except RuntimeError as error:
                raise self.lost(error) or error from None
        return values

    def first(self, values: Tensor) -> Tensor:
        """The first rank's small tensor, on every rank's own device; every rank must call it, with equal shapes."""
        if self.size == 1:
            return values
        shared = values.cpu()
        try:
            dist.broadcast(shared, src=0)
        except RuntimeError as error:
            raise self.lost(error) or error from None
        return shared.to(values.device)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, in rank order; every rank must call it. Raises PipelineError when one is gone."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise self.lost(error) or error from None
        return values

    def require_equal(self, facts: dict[str, str]) -> None:
        """Raises PipelineError on every rank, naming both values, when a fact differs between ranks."""
        everybody = self.gather(facts)
        for rank, others in enumerate(everybody):
            differing = [
                f"{name} is {shortened(everybody[0][name])} on rank 0 and {shortened(others[name])} on rank {rank}"
                for name in facts
                if everybody[0][name] != others[name]
            ]
            if differing:
                raise PipelineError(
                    f"the ranks do not do the same: {'; '.join(differing)}; give every rank the same SHARDS and the "
                    "same configuration"
                )

    def lost(self, error: RuntimeError) -> PipelineError | None:
        """What an error of a collective means, ours or a sharded model's; None for any other.

        gloo has one kind of error, for a closed connection and for a timeout.
        """
        is_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not (self.is_distributed and is_collective):
            return None
        return PipelineError(
            f"rank {self.rank} of {self.size}: another rank has ended or has been silent for too long "
            f"({first_line(error)}); its own log says why; start the same command again to go on from the "
            "last checkpoint"
        )


def shortened(value: str) -> str:
    return value[:MAX_SHOWN_CHARACTERS]


ALONE = World(0, 1, torch.device("cpu"), is_distributed=False)


def join(device: str, timeout: timedelta = LONG_TIMEOUT) -> World:
    """Join the launch this process belongs to, or stay alone.

    Raises ConfigError when no such device is here, and PipelineError when the others do not come.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError('train.device = "cuda": torch finds no CUDA device here; use "auto" or "cpu"')
    where = torch.device("cpu")
    if kind == "cuda":
        # Slurm may show every task its own GPU only, which then is number 0.
        where = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(where)
    launched = "WORLD_SIZE" in os.environ
    if not launched and kind == "cpu":
        return World(0, 1, where, is_distributed=False)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if launched:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise PipelineError(
                f"rank {rank} of {size}: the ranks did not come together within {timeout.total_seconds():.0f} s "
                f"({first_line(error)}); start them with torchrun, all with the same number of processes"
            ) from None
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(leave)  # at the latest: else threads of gloo may abort the process on its way out
    return World(rank, size, where, is_distributed=True)


def leave() -> None:
    """Give the process group back; without this NCCL warns at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def release_frames(error: BaseException) -> None:
    """Free what the frames of a failed run hold, sharded models before all: groups that outlive `leave` abort the process."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()


def shorten_timeout() -> None:
    """After the first step nobody loads or compiles any more."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(SHORT_TIMEOUT, dist.group.WORLD)
