"""`train --probe-lr`: a few learning rates from the same start on the same packs, judged by held-out losses.

In: what `train` is given, rates and a number of steps. Out: one row per rate, no run. The model is loaded once; before each rate
LoRA's weights are those of the start again, with a new optimizer. Packs are those of the first steps of the run that would
come of the same command. The surprising decision: rates stay constant after a short warm-up, because a cosine to zero at the
end of the probe would hide what a rate does over a whole run. The price: the lowest loss after few steps favours high
rates, and says nothing of how speech sounds; the slope shows which would still go on falling.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import torch

from shards.errors import CannotHoldOut, ConfigError
from train.config import TrainConfig
from train.data.feed import Feed, WaitingEnded
from train.data.loader import LoaderShare
from train.loop import on_every_rank
from train.model.lora import lora_parameters
from train.optim import make_optimizer
from train.run import Run, RunOptions
from train.set_up import set_up
from train.signals import Stopped
from train.step import NotFinite, StepSettings, train_step
from train.world import World

HELD_OUT_FRACTION = 0.05  # where the configuration holds nothing out
WARMUP_SHARE = 0.1  # of the steps

log = logging.getLogger("train")


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What one learning rate came to. Losses that are not finite are None."""

    learning_rate: float
    steps: int  # finished ones: fewer where a loss was not finite
    loss_first: float | None  # total training loss of its first step
    loss_last: float | None  # of its last
    held_out_start: float | None  # held-out audio loss before the first step, the same for all
    held_out_half: float | None  # after half of the steps
    held_out: float | None  # after the last
    held_out_text: float | None
    slope: float | None  # change of the held-out audio loss in the second half, per 100 steps

    def cells(self) -> tuple[str, ...]:
        """Of a table, in the order of the fields."""
        numbers = (self.loss_first, self.loss_last, self.held_out_start, self.held_out_half, self.held_out)
        losses = ("-" if n is None else f"{n:.4f}" for n in (*numbers, self.held_out_text))
        return f"{self.learning_rate:g}", str(self.steps), *losses, "-" if self.slope is None else f"{self.slope:+.4f}"


def probe_rates(
    config: TrainConfig, shards: str | Path, run_dir: Path, rates: list[float], steps: int, skip_preflight: bool = False
) -> list[Probe]:
    """Every rank must call this. RUN is neither made nor read; it says only where a folder for the meantime may lie.

    Raises PipelineError, and Stopped after a signal.
    """
    with on_every_rank(config) as (world, signals), scratch_folder(run_dir, world) as scratch:
        options = RunOptions(resume="never", skip_preflight=skip_preflight)
        asked = probing(config, steps, rates[0])
        try:
            run = set_up(asked, shards, scratch, options, world, lambda: signals.asked(world), signals.ends_waiting)
        except WaitingEnded:
            raise Stopped("stopped by a signal before the first step; nothing is left behind") from None
        except CannotHoldOut as error:
            if config.train.validation_fraction:
                raise
            raise ConfigError(  # "set it to 0" would not help here
                f"--probe-lr compares held-out losses, and of these data no speaker can be held out: {error.why}; name "
                "another data set in train.validation_data"
            ) from None
        assert run, "no dry run"
        try:
            return try_rates(run, rates)
        finally:
            if run.metrics:
                run.metrics.close()


def probing(config: TrainConfig, steps: int, rate: float) -> TrainConfig:
    """The configuration of the run, as far as it says what a step is. Raises ConfigError where nothing can be held out."""
    section = config.train
    holds_out = section.validation_fraction or section.validation_data
    if not holds_out and section.loader == "stream":
        raise ConfigError(
            '--probe-lr compares held-out losses, and loader = "stream" holds nothing out; name a data set in '
            "train.validation_data"
        )
    train = msgspec.structs.replace(
        section,
        max_steps=steps,
        warmup_steps=round(WARMUP_SHARE * steps),
        schedule="constant",
        learning_rate=rate,
        validation_fraction=section.validation_fraction if holds_out else HELD_OUT_FRACTION,
        listening_samples=0,
        best_by="audio_loss",
        tensorboard=False,
    )
    return msgspec.structs.replace(
        config,
        train=train,
        eval=msgspec.structs.replace(config.eval, score=False),
        wandb=msgspec.structs.replace(config.wandb, mode="off"),
    )


def try_rates(run: Run, rates: list[float]) -> list[Probe]:
    """Rate after rate on one model. Every rank must call this."""
    start = [(parameter, parameter.detach().clone()) for _, parameter in lora_parameters(run.model)]
    before = held_out_losses(run)
    found: list[Probe] = []
    for rate in rates:
        with torch.no_grad():
            for parameter, value in start:
                parameter.copy_(value)
        found.append(try_rate(run, rate, before[0]))
        log.info("learning rate %g: held-out audio loss %s", rate, shown(found[-1].held_out))
    return found


def try_rate(run: Run, rate: float, held_out_start: float | None) -> Probe:
    """From the weights that are there."""
    world, steps = run.world, run.total_steps
    config = msgspec.structs.replace(run.config, train=msgspec.structs.replace(run.config.train, learning_rate=rate))
    optimizer = make_optimizer([parameter for _, parameter in lora_parameters(run.model)], config.train)
    packs = run.source.loaded_packs(0, LoaderShare(world.rank, world.size, config.train.num_workers))
    feed = Feed(packs, config.train.packs_per_step, 0, world, run.source.limits(), run.waiting)
    losses: list[float] = []
    half: tuple[float | None, float | None] = None, None
    middle = max(1, steps // 2)
    run.model.train()
    with closing(feed):
        for step in range(steps):
            given = next(feed, None)
            settings = StepSettings.at(step, steps, config)
            try:
                result = given and train_step(
                    run.model, optimizer, given.batches, settings, given.counts, world, run.interrupted
                )
            except NotFinite as fault:
                optimizer.zero_grad(set_to_none=True)
                if world.is_first:
                    log.warning("learning rate %g: %s", rate, fault)
                return row(rate, losses, held_out_start, half, (None, None), steps - middle)
            if result is None or run.interrupted():
                raise Stopped(f"stopped by a signal at learning rate {rate:g}; nothing is left behind")
            losses.append(result.values(world)["loss/total_loss"])
            if step + 1 == middle:
                half = held_out_losses(run)
    last = half if middle == steps else held_out_losses(run)
    return row(rate, losses, held_out_start, half, last, steps - middle)


def row(
    rate: float,
    losses: list[float],
    start: float | None,
    half: tuple[float | None, float | None],
    last: tuple[float | None, float | None],
    num_between: int,
) -> Probe:
    slope = None
    if half[0] is not None and last[0] is not None and num_between:
        slope = (last[0] - half[0]) * 100 / num_between
    return Probe(
        learning_rate=rate,
        steps=len(losses),
        loss_first=finite(losses[0]) if losses else None,
        loss_last=finite(losses[-1]) if losses else None,
        held_out_start=start,
        held_out_half=half[0],
        held_out=last[0],
        held_out_text=last[1],
        slope=slope,
    )


def held_out_losses(run: Run) -> tuple[float | None, float | None]:
    """(audio, text); None for what is not finite. Every rank must call this."""
    assert run.evaluation, "something is held out"
    values = run.evaluation.losses(run.model, run.config.loss, run.interrupted)
    if run.interrupted():
        raise Stopped("stopped by a signal while held-out losses were computed; nothing is left behind")
    audio, text = (finite(values.get(f"eval/{name}_loss")) for name in ("audio", "text"))
    return audio, text


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


@contextmanager
def scratch_folder(run_dir: Path, world: World) -> Iterator[Path]:
    """A folder that all ranks see, beside RUN where that can be, gone afterwards. Every rank must call this."""
    parent = run_dir.absolute().parent
    beside = parent if os.access(parent, os.W_OK) else None
    name = tempfile.mkdtemp(prefix=".probe-lr-", dir=beside) if world.is_first else ""
    folder = Path(world.gather(name)[0])
    try:
        yield folder
    finally:
        for handler in list(log.handlers):
            if isinstance(handler, logging.FileHandler):
                handler.close()
                log.removeHandler(handler)
        if world.is_first:
            shutil.rmtree(folder)
