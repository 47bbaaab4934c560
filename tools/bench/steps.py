"""Our training step in one variant after another, and how long it takes, on any device.

In: frozen weights that all variants share, samples, and a `Variant`. Out: figures of its steps: optimizer and clipping included,
data ready beforehand, the first steps (which compile) told apart. On a GPU time is the clock's, with the device drained at both
ends; on a CPU it is this process's, so that neighbours do not count.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from train.config import LoraSection, LossSection, TrainSection
from train.data.packing import PlanSettings, best_fit
from train.model.attention import choose_attention
from train.model.batch import PackedBatch, pack
from train.model.build import prepare_blocks
from train.model.config import ModelConfig
from train.model.decoder import HiggsAudio
from train.model.flops import lora_sizes_of, step_flops
from train.model.fsdp import apply_fsdp
from train.model.lora import add_lora, lora_parameters
from train.model.loss import LossCounts
from train.optim import make_optimizer
from train.step import StepSettings, train_step
from train.world import World

WARM_UP = {"cuda": 3, "cpu": 1}  # steps that are not timed: the first compiles, the second may again for other lengths
BACKEND: dict[str, str | None] = {"cuda": "inductor", "cpu": "eager"}  # a CPU only shows that each variant is one graph


class Stopwatch:
    """Starts when it is made."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._started = self._now()

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def seconds(self) -> float:
        return self._now() - self._started


@dataclass(frozen=True)
class Variant:
    """One way to train; its neighbours differ in one field."""

    batch_tokens: int
    rank: int
    compiled: bool = True
    fused: bool = True
    recompute: bool = False
    padded: bool = False  # attention; False: the fastest way here
    sentence_order: bool = False  # rows as they are said, permuted in every layer, in place of text rows first
    shard_base: bool = False


@dataclass(frozen=True)
class Shared:
    """What all rows of a benchmark have in common."""

    config: ModelConfig
    weights: dict[str, torch.Tensor]  # native names, on the device
    sequences: list[Any]
    world: World
    num_steps: int  # timed, at most

    @property
    def device(self) -> str:
        return self.world.device.type

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def make_model(shared: Shared, variant: Variant) -> HiggsAudio:
    """As `train.model.build` makes it, around the shared weights."""
    with torch.device("meta"):
        model = HiggsAudio(shared.config)
    model.load_state_dict(shared.weights, assign=True)
    if not variant.padded:
        compiled = variant.compiled and shared.device == "cuda"  # nothing but blocks of tensors can be compiled
        model.attention = choose_attention(shared.config, shared.world.device, shared.dtype, compiled)
    if variant.compiled and model.attention == "separate":
        model.attention = "padded"
    add_lora(model, LoraSection(rank=variant.rank, alpha=2 * variant.rank), "bench", seed=0)
    model.fuse_lora(variant.fused)
    backend = BACKEND[shared.device] if variant.compiled else None
    if variant.sentence_order:
        from tools.bench.sentence_order import SentenceOrder

        other = SentenceOrder(model.model)
        model.model, model.hidden = other, lambda batch: other.hidden(batch, model.attention)  # pyright: ignore
        if backend:
            other.compile_layers(backend)
    else:
        prepare_blocks(model.model.layers, variant.recompute, backend)
    blocks = cast("torch.nn.ModuleList", model.model.layers)
    apply_fsdp(model, blocks, shared.world, shared.dtype == torch.bfloat16, variant.shard_base)
    return model.train()


def make_packs(shared: Shared, batch_tokens: int) -> list[PackedBatch]:
    """Packs of up to `batch_tokens`, on the device, the fullest first: a last one that is half empty says little."""
    lengths = np.array([len(sequence) for sequence in shared.sequences])
    places, ends = best_fit(lengths, np.zeros_like(lengths), PlanSettings(0, batch_tokens, packs_per_step=1))
    groups = sorted(np.split(places, ends[:-1]), key=lambda group: -lengths[group].sum())
    packs = [pack([shared.sequences[i] for i in g], g.tolist(), [str(i) for i in g]) for g in groups]
    return [batch.to(shared.world.device) for batch in packs[: shared.num_steps]]


def measure_variant(shared: Shared, variant: Variant, seconds_left: Callable[[], float]) -> dict[str, Any]:
    """Figures of up to `num_steps` steps; fewer, but at least one, where time is short."""
    with cleaned_up():
        model = make_model(shared, variant)
        optimizer = make_optimizer([parameter for _, parameter in lora_parameters(model)], TrainSection())
        batches = make_packs(shared, variant.batch_tokens)
        settings = StepSettings(0, 1e-4, LossSection())

        def step(batch: PackedBatch) -> None:
            train_step(model, optimizer, [batch], settings, LossCounts.of([batch], shared.world), shared.world)

        took, warm_up_s = timed([lambda b=b: step(b) for b in batches], shared.device, seconds_left)
        done = batches[: len(took)]
        flops = step_flops(model.config, lora_sizes_of(model), done)
        return {
            **rates(took, sum(len(b.keys) for b in done), sum(b.num_tokens for b in done)),
            "useful_tflops": flops / sum(took) / 1e12,
            "attention": model.attention,
            "warm_up_s": warm_up_s,
            "peak_gb": peak_gb(shared.device),
        }


def timed(
    steps: Sequence[Callable[[], None]], device: str, seconds_left: Callable[[], float]
) -> tuple[list[float], float]:
    """(seconds of each timed step, of all steps before them)."""
    before = time.monotonic()
    for number in range(WARM_UP[device]):
        steps[number % len(steps)]()
    warm_up_s = time.monotonic() - before
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took: list[float] = []
    for step in steps:
        if took and seconds_left() < 2 * took[-1]:
            break
        watch = Stopwatch(device)
        step()
        took.append(watch.seconds())
    return took, warm_up_s


def rates(took: list[float], num_samples: int, num_tokens: int) -> dict[str, Any]:
    return {
        "samples_per_s": num_samples / sum(took),
        "tokens_per_s": num_tokens / sum(took),
        "step_ms": 1e3 * statistics.median(took),
        "slowest_step_ms": 1e3 * max(took),
        "num_steps": len(took),
        "total_s": sum(took),
    }


def peak_gb(device: str) -> float | None:
    """Of the timed steps on a GPU, the shared weights included. A CPU's peak would be that of all rows before, too."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


@contextmanager
def cleaned_up():
    """Nothing of the row before, and nothing left for the next: models are in cycles, graphs in caches."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
