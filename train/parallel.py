"""Ranks: joining a launch, sharding the model, and agreeing.

In: torchrun's or Slurm's environment, or none. Out: a `World`, and a model whose trainable weights and optimizer are
sharded over it (FSDP2). The surprising decision: the frozen base is replicated, because on a card that holds it nothing
needs to be gathered at every layer; `shard_base` shards it too, for small cards, at the price of a gather per layer and
pass. One process on CPU needs none of this and runs without a process group.
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
from torch import Tensor, nn

from shards.errors import ConfigError, PipelineError

LONG_TIMEOUT = timedelta(minutes=30)  # until every rank has loaded and compiled
SHOWN = 16  # characters of a value in a message
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
                f"{name} is {everybody[0][name][:SHOWN]} on rank 0 and {others[name][:SHOWN]} on rank {rank}"
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
            f"({str(error).splitlines()[0][:120]}); its own log says why; start the same command again to go on from the "
            "last checkpoint"
        )


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
                f"({str(error).splitlines()[0][:120]}); start them with torchrun, all with the same number of processes"
            ) from None
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(leave)  # at the latest: else threads of gloo may abort the process on its way out
    return World(rank, size, where, is_distributed=True)


def leave() -> None:
    """Give the process group back; without this NCCL warns at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def let_go(error: BaseException) -> None:
    """Free what the frames of a failed run hold, sharded models before all: groups that outlive `leave` abort the process."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()


def shorten_timeout() -> None:
    """After the first step nobody loads or compiles any more."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(SHORT_TIMEOUT, dist.group.WORLD)


def shard(model: nn.Module, blocks: nn.ModuleList, world: World, bf16: bool, shard_base: bool) -> None:
    """Shard trainable weights (and with `shard_base` all) over the ranks, one unit per block and one for the rest.

    Build the optimizer afterwards. Gradients are summed, not averaged: losses are divided by global counts instead.
    """
    if not world.is_distributed:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # it would round cos, sin and loss weights to bf16 without a word
    )
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    options: dict[str, Any] = {
        "mesh": init_device_mesh(world.device.type, (world.size,)),
        "mp_policy": policy,
        "ignored_params": set() if shard_base else frozen,
    }
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum; for NCCL it is the plain one
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "next_logits")  # speaking gathers weights as training does


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward passes reduce gradients over ranks: only the last one of a step need do so."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def whole(value: Tensor) -> Tensor:
    """The full tensor of a sharded one; every rank must call this."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
