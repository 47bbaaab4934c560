"""Which rows `bench train --protocol` has, one change each, in the order of their worth.

In: the settings. Out: rows that measure themselves when they are asked to. The first ones answer whether a step is right and how
fast it is beside the baseline; the last ones (twice the tokens, ranks, sharding) are those that time may cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tools.bench.baseline import measure_padded, measure_parity
from tools.bench.ceilings import measure_ceilings
from tools.bench.predictions import predicted_padded_seconds, predicted_seconds
from tools.bench.profiling import count_waits, top_kernels
from tools.bench.sides import fill_randomly, model_config
from tools.bench.steps import Shared, Variant, measure_variant
from train.model.decoder import HiggsAudio
from train.world import World

PADDED_BATCHES = {"cuda": (2, 4, 8, 16, 32), "cpu": (1, 2)}
DEFAULT_BATCH = 2  # of published recipes for this model; without gradient checkpointing
Predict = Callable[[dict[str, Any], dict[str, Any]], float]  # of a row's figures and the ceilings: seconds of a step


@dataclass(frozen=True)
class Settings:
    """`size` as in `tools.bench.sides`."""

    size: str
    num_samples: int
    batch_tokens: int
    rank: int
    device: str
    seconds: float
    num_steps: int = 10  # timed ones of a row, at most
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Row:
    stage: str
    name: str
    measure: Callable[[], dict[str, Any]]
    kind: str = "eager"  # or "compiled": rows of one kind take about as long
    needs_cuda: bool = False
    predict: Predict | None = None


def share(settings: Settings, world: World) -> Shared:
    """Frozen weights made once, where they are used, and seeded samples."""
    from tools.bench.train import make_sequences

    config = model_config(settings.size)
    with torch.device("meta"):
        model = HiggsAudio(config)
    fill_randomly(model, settings.device, settings.seed)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return Shared(config, weights, make_sequences(settings.num_samples, settings.seed), world, settings.num_steps)


def rows_of(
    shared: Shared, settings: Settings, seconds_left: Callable[[], float], figures: dict[str, Any]
) -> Iterator[Row]:
    main = Variant(settings.batch_tokens, settings.rank)
    eager = replace(main, compiled=False)

    def ceilings() -> dict[str, Any]:
        figures["ceilings"] = measure_ceilings(shared.config, settings.device, shared.dtype, settings.batch_tokens)
        return figures["ceilings"]

    def ours(stage: str, name: str, variant: Variant) -> Row:
        kind = "compiled" if variant.compiled else "eager"
        predict = prediction(shared, settings, variant)
        return Row(stage, name, lambda: measure_variant(shared, variant, seconds_left), kind, predict=predict)

    def padded(batch: int, recompute: bool) -> Row:
        name = f"transformers + peft, batches of {batch}" + (", recomputed" if recompute else "")
        name += " (default)" if batch == DEFAULT_BATCH and not recompute else ""
        predict = padded_prediction(shared, settings, recompute)

        def measure() -> dict[str, Any]:
            return measure_padded(shared, settings.size, settings.rank, batch, recompute, seconds_left)

        return Row("baseline", name, measure, predict=predict)

    yield Row("ceilings", "products and copies", ceilings)
    alike = {
        "peft's forward": replace(eager, fused=False),
        "fused": eager,
        "fused, compiled": main,
        "sentence order": replace(eager, sentence_order=True),
    }
    yield Row(
        "checks",
        "losses and gradients against transformers + peft",
        lambda: measure_parity(shared, settings.size, alike),
    )
    yield Row("checks", "no step waits for the GPU", lambda: count_waits(shared, eager), needs_cuda=True)
    yield ours("changes", "eager, peft's forward", replace(eager, fused=False))
    yield ours("changes", "compiled", replace(main, fused=False))
    yield ours("changes", "compiled, fused LoRA", main)
    yield padded(DEFAULT_BATCH, recompute=False)
    yield Row("kernels", "compiled, fused LoRA", lambda: top_kernels(shared, main), "compiled")
    for batch in PADDED_BATCHES[settings.device]:
        if batch != DEFAULT_BATCH:
            yield padded(batch, recompute=False)
    yield padded(PADDED_BATCHES[settings.device][-1], recompute=True)
    yield ours("changes", "eager, fused LoRA", eager)
    yield ours("changes", "compiled, fused LoRA, recomputed", replace(main, recompute=True))
    for part, name in ((4, "a quarter of the tokens"), (2, "half of the tokens")):
        yield ours("tokens", name, replace(main, batch_tokens=settings.batch_tokens // part))
    yield ours("attention", "padded documents", replace(main, padded=True))
    yield ours("rows", "sentence order, permuted in each layer", replace(main, sentence_order=True))
    yield ours("tokens", "twice the tokens", replace(main, batch_tokens=2 * settings.batch_tokens))
    for factor in (2, 4):
        yield ours("rank", f"rank {factor * settings.rank}", replace(main, rank=factor * settings.rank))
    yield from sharded(shared, main, seconds_left)


def sharded(shared: Shared, main: Variant, seconds_left: Callable[[], float]) -> Iterator[Row]:
    """World 1 of FSDP: as `train` runs on one GPU (base replicated: the rows before), and the base sharded too."""
    variant = replace(main, shard_base=True, compiled=False)
    yield Row(
        "sharding", "one rank, base sharded, eager", lambda: measure_variant(distributed(shared), variant, seconds_left)
    )
    variant = replace(main, compiled=False)
    yield Row(
        "sharding",
        "one rank, base replicated, eager",
        lambda: measure_variant(distributed(shared), variant, seconds_left),
    )


def distributed(shared: Shared) -> Shared:
    """On a CPU a single process has no group unless it is asked for one."""
    import torch.distributed as dist

    world = shared.world
    if not world.is_distributed:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        world = replace(world, is_distributed=True)
    return replace(shared, world=world)


# --- predictions ------------------------------------------------------------------------------------------------------


def prediction(shared: Shared, settings: Settings, variant: Variant) -> Predict | None:
    """For the released sizes only: the bytes of a row were counted there."""
    if settings.size != "full":
        return None

    def seconds(found: dict[str, Any], ceilings: dict[str, Any]) -> float:
        how = (variant.compiled, variant.fused, variant.recompute)
        return predicted_seconds(shared.config, ceilings, *work_of_a_step(found), *how)

    return seconds


def padded_prediction(shared: Shared, settings: Settings, recompute: bool) -> Predict | None:
    if settings.size != "full":
        return None

    def seconds(found: dict[str, Any], ceilings: dict[str, Any]) -> float:
        work = work_of_a_step(found)
        return predicted_padded_seconds(shared.config, ceilings, *work, found["useful_share"], recompute)

    return seconds


def work_of_a_step(found: dict[str, Any]) -> tuple[float, int]:
    """(operations, rows) of a mean step, which do not depend on the time that was measured."""
    step_s = found["total_s"] / found["num_steps"]
    return found["useful_tflops"] * 1e12 * step_s, round(found["tokens_per_s"] * step_s)
