"""How large a pack may be: what a step needs is measured here, on this device, before training.

In: the model ready to train, and for any pack budget the heaviest of the packs planned with it. Out: the budget in force
(`train.batch_tokens = "auto"` takes the largest that fits) and whether layers are recomputed; or an error naming the
largest budget that does fit. The surprising decision: no probe tries what the ones before it say will not fit, because a
rank that runs out of memory leaves the others waiting in a collective. So budgets are approached from below, and the
last probe is the budget itself. The price is the time of two to five steps at the start.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from shards.errors import ConfigError
from train.config import TrainConfig
from train.data.heaviest_pack import PackCosts, PackSource
from train.heap import give_back_freed_memory
from train.model.batch import PackedBatch
from train.model.build import compile_backend
from train.model.decoder import DecoderLayer, HiggsAudio
from train.model.fsdp import own_numel, sync_gradients
from train.model.lora import lora_parameters
from train.model.loss import LossCounts, step_losses
from train.world import World

MOST_TOKENS = 32768  # "auto" goes no further: matrix products are as fast from 8k rows on (arithmetic)
FIRST_TOKENS = 2048  # the first probe, if no sample is longer
MAX_GROWTH = 4  # at most so many times the last budget that fitted: what grows faster than tokens must not surprise
BUDGET_MULTIPLE = 128
CLOSE_ENOUGH = 1.05  # two budgets nearer to each other are not worth telling apart
# Per trainable weight, and not there yet while probing: two fp32 moments of this rank's part, which come with the first
# update, and the gradients that micro-steps before the last one leave unsharded.
MOMENTS_BYTES = 8
GRADIENT_BYTES = 4

log = logging.getLogger("train")


@dataclass(frozen=True)
class Budget:
    """What is in force."""

    batch_tokens: int
    recomputes: bool


def find_budget(model: HiggsAudio, source: PackSource, config: TrainConfig, world: World, wanted: int | None) -> Budget:
    """Measure; switch recomputation on if it must be. `wanted` None: as large as fits. Every rank must call this.

    Raises ConfigError naming the largest budget that fits.
    """
    section = config.train
    meter = meter_of(world.device)
    if meter is None:
        if wanted is None:
            raise ConfigError(
                'train.batch_tokens = "auto" needs a CUDA device or Linux to measure memory; give a number'
            )
        return Budget(wanted, section.activation_checkpointing == "full")
    room = min(world.gather(meter.room(section.memory_share)))
    idle = max(world.gather(meter.in_use()))
    probe = Probe(model, source, config, world, meter)
    most = wanted or min(MOST_TOKENS, source.most_tokens())
    first = min(most, max(FIRST_TOKENS, source.longest()))

    recomputes = section.activation_checkpointing == "full"
    found = largest_budget(probe, idle, room, first, most)
    enough = found.budget if wanted is None else found.budget == wanted
    if not enough and section.activation_checkpointing == "auto":
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            layer.recomputes = True
        kept, recomputes = found, True
        found = largest_budget(probe, idle, room, first, most)
        if found.budget > kept.budget:
            log.info(
                "layers are recomputed in backward, about half again as much time: without it %s",
                f"only {kept.budget} tokens fit" if kept.budget else f"not even {first} tokens fit",
            )
    message = f"{found.peak / 1e9:.2f} GB of {room / 1e9:.2f} GB ({section.memory_share:.0%} of what is free, train.memory_share)"
    if wanted is None and found.budget:
        log.info("train.batch_tokens = %d was found: a step of the heaviest pack takes %s", found.budget, message)
    elif found.budget and found.budget == wanted:
        log.info("memory: a step of the heaviest pack takes %s", message)
    else:
        raise ConfigError(too_large(found, wanted or first, first, room, config))
    return Budget(found.budget, recomputes)


def too_large(found: LargestBudget, wanted: int, first: int, room: int, config: TrainConfig) -> str:
    section = config.train
    message = (
        f"train.batch_tokens = {wanted}: a step of the heaviest pack does not fit into {room / 1e9:.2f} GB "
        f"({section.memory_share:.0%} of what is free, train.memory_share); "
    )
    if found.budget:
        packs = math.ceil(section.packs_per_step * wanted / found.budget)
        message += (
            f"the largest that fits is {found.budget}: set it, and train.packs_per_step to about {packs} (now "
            f"{section.packs_per_step}) for as many samples per step"
        )
    else:
        message += f"not even {first} fits, which takes {found.peak / 1e9:.2f} GB: the data's longest samples must fit"
    if section.activation_checkpointing == "off":
        message += '; or train.activation_checkpointing = "full", which needs a fraction of the memory'
    return message


# --- the search -----------------------------------------------------------------------------------------------------


class LargestBudget(NamedTuple):
    budget: int  # 0: not even the first one fits
    peak: int  # bytes of the largest that fits, or of the first


def largest_budget(peak_of: Callable[[int], int], idle: int, room: int, first: int, most: int) -> LargestBudget:
    """The largest budget from `first` to `most` whose peak fits, as near as `CLOSE_ENOUGH`; bytes. Approached from below.

    `idle`: what is in use anyway. Each next budget is where memory would end if all of the last peak beyond `idle` grew
    with the budget. A part of it does not grow, so the guess is low, and the next one better.
    """
    fits, peak = 0, 0
    too_much = most + 1
    budget = first
    while True:
        tried = peak_of(budget)
        if tried <= room:
            fits, peak = budget, tried
        elif not fits:
            return LargestBudget(0, tried)
        else:
            too_much = budget
        per_token = max(1.0, (peak - idle) / fits)
        following = min(most, MAX_GROWTH * fits, int((room - idle) / per_token))
        if following >= too_much:
            following = (fits + too_much) // 2
        if following < most:
            following = following // BUDGET_MULTIPLE * BUDGET_MULTIPLE
            if following < CLOSE_ENOUGH * fits:
                return LargestBudget(fits, peak)
        if following <= fits:
            return LargestBudget(fits, peak)
        budget = following


class Probe:
    """Bytes at the peak of a step with a budget's heaviest pack, the most of any rank."""

    def __init__(self, model: HiggsAudio, source: PackSource, config: TrainConfig, world: World, meter: Meter) -> None:
        self._model = model
        self._source = source
        self._config = config
        self._world = world
        self._meter = meter
        trainable = [parameter for _, parameter in lora_parameters(model)]
        self._to_come = MOMENTS_BYTES * sum(own_numel(p) for p in trainable)
        self._to_come += GRADIENT_BYTES * sum(p.numel() for p in trainable)
        self._costs = PackCosts.of(model.config, model.attention)
        self._needs_warming = {False, True} if compile_backend(config.train, world) else set[bool]()

    def __call__(self, batch_tokens: int) -> int:
        batch = self._source.heaviest_pack(batch_tokens, self._costs).to(self._world.device)
        recomputes = bool(self._model.model.layers[0].recomputes)
        if recomputes in self._needs_warming:  # compiling takes memory once, and not for a pack
            self._needs_warming.remove(recomputes)
            self._run(batch)
        peak = self._meter.peak_of(lambda: self._run(batch)) + self._to_come
        return max(self._world.gather(peak))

    def _run(self, batch: PackedBatch) -> None:
        """Forward and backward as `train.step` does them."""
        device = self._world.device
        training = self._model.training
        self._model.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            sync_gradients(self._model, True)
            losses = step_losses(self._model(batch), LossCounts.of([batch]), self._config.loss, ramp=1.0)
            losses.total.backward()
        for _, parameter in lora_parameters(self._model):
            parameter.grad = None
        self._model.train(training)


# --- meters ---------------------------------------------------------------------------------------------------------


class Meter(Protocol):
    def in_use(self) -> int:
        """Bytes of this process now."""
        ...

    def room(self, share: float) -> int:
        """Bytes this process may use in all, if it takes `share` of what is free."""
        ...

    def peak_of(self, work: Callable[[], None]) -> int:
        """Most bytes in use while `work` runs, what was in use before included."""
        ...


def meter_of(device: torch.device) -> Meter | None:
    if device.type == "cuda":
        return DeviceMemory(device)
    return HostMemory() if Path("/proc/self/clear_refs").exists() else None


class DeviceMemory:
    """A GPU's memory as PyTorch's allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def in_use(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def room(self, share: float) -> int:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return self.in_use() + int(share * free)

    def peak_of(self, work: Callable[[], None]) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)


class HostMemory:
    """This process's part of the machine's memory, from Linux's /proc (man proc: VmHWM, clear_refs)."""

    def in_use(self) -> int:
        give_back_freed_memory()
        return self._field("/proc/self/status", "VmRSS")

    def room(self, share: float) -> int:
        free = self._field("/proc/meminfo", "MemAvailable") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
        if limit.is_file() and limit.read_text().strip() != "max":  # a container's limit
            free = min(free, int(limit.read_text()) - int(used.read_text()))
        return self.in_use() + int(share * free)

    def peak_of(self, work: Callable[[], None]) -> int:
        self.in_use()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        work()
        return self._field("/proc/self/status", "VmHWM")

    def _field(self, path: str, name: str) -> int:
        line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))
        return 1024 * int(line.split()[1])
