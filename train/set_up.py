"""From what was asked for to a `Run` that is ready to step: everything that happens once, in its order.

In: the configuration, SHARDS, RUN and how to start. Out: a `Run`, the same on every rank, or nothing after a dry run. The
order is the point: what needs no model is checked before it is loaded, the checkpoint of a run that goes on among the first.
The price: the base is read from disk before it is known whether a step fits the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import LoraConfig
from torch import nn

from shards.artifacts import codec_fingerprint, load_tokenizer, mel_fingerprint, resolve, tokenizer_fingerprint
from shards.config import SequenceSection
from shards.errors import ConfigError, PipelineError
from shards.manifest import Fingerprints
from shards.sequence import SequenceBuilder
from train import preflight
from train.config import TrainConfig, TrainSection
from train.data.plan import PLAN_VERSION
from train.data.planned_source import PlannedSource
from train.data.source import HeldOut, Source
from train.data.streamed_source import StreamedSource
from train.evaluation.free_running import open_free_running
from train.evaluation.held_out import Evaluation
from train.evaluation.listening import open_listening
from train.evaluation.listening_scores import open_scores
from train.memory import Budget, find_budget
from train.model.batch import PackedBatch
from train.model.build import build_model
from train.model.conditioning import Conditioning, decide_conditioning
from train.model.decoder import HiggsAudio
from train.model.lora import lora_parameters, trainable_table
from train.model.loss import LossTerms
from train.optim import make_optimizer
from train.run import Run, RunOptions
from train.run_folder.checkpoint import Checkpoints
from train.run_folder.identity import (
    Identity,
    ModelFiles,
    check_identity,
    find_model_files,
    log_changes,
    make_identity,
    read_identity,
)
from train.run_folder.metrics import log, open_log, start_wandb
from train.run_folder.start import begin_run, config_text, find_start, require_one_folder
from train.run_folder.state import load_state
from train.world import World


@dataclass(frozen=True)
class Inputs:
    """What a run is made from; no weights are loaded yet."""

    source: Source
    base_dir: Path
    codec_dir: Path
    model_files: ModelFiles
    conditioning: Conditioning
    sequence: SequenceSection  # with the conditioning that is in force
    builder: SequenceBuilder

    def identify(self, config: TrainConfig) -> Identity:
        source = self.source
        return make_identity(config, self.model_files, source.digest, source.validation_digest, PLAN_VERSION)


@dataclass(frozen=True)
class Checked:
    """What fits together, with the model at its start: as far as a dry run goes."""

    config: TrainConfig  # final
    inputs: Inputs
    model: HiggsAudio
    lora_config: LoraConfig
    optimizer: torch.optim.Optimizer
    held_out: HeldOut | None
    preflight: tuple[PackedBatch, LossTerms] | None
    start_from: Path | None
    wandb_run: Any


def set_up(
    asked: TrainConfig,
    shards: str | Path,
    run_dir: Path,
    options: RunOptions,
    world: World,
    interrupted: Callable[[], bool],
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Run | None:
    """From what was asked for to a run that is ready to step; None after a dry run. Every rank must call this."""
    with waiting():
        source = open_source(str(shards), asked.train)
    inputs = find_inputs(source, asked)
    checked = check(inputs, asked, run_dir, options, world, waiting)
    if options.dry_run:
        log.info("dry run: everything fits together; nothing was trained")
        return None
    return begin(checked, run_dir, world, interrupted, waiting)


def check(
    inputs: Inputs,
    asked: TrainConfig,
    run_dir: Path,
    options: RunOptions,
    world: World,
    waiting: Callable[[], AbstractContextManager[None]],
) -> Checked:
    """Everything that can refuse a run, the cheap before the dear. Every rank must call this."""
    source, builder = inputs.source, inputs.builder

    # 1. The run directory, and where to start from.
    open_log(run_dir, world.rank)
    require_one_folder(run_dir, world)
    require_apart(source, world)
    start_from = find_start(run_dir, options.resume, world)
    log.info("layout %s, %s", inputs.sequence.layout, inputs.conditioning)
    log.info("%s", world)

    # 2. The plan: every epoch follows from lengths, seed and pack budget. "auto" is measured when the model is here.
    wanted = wanted_budget(asked.train, start_from)
    if start_from:  # before anything of another run is planned or written
        assert wanted, "a run that goes on has its budget"
        check_identity(
            start_from, inputs.identify(with_budget(asked, inputs.sequence, Budget(wanted, recomputes=False)))
        )
    if wanted:
        prepare(source, builder, wanted, run_dir, world)
    wandb_run = None
    if world.is_first and not options.dry_run:  # asked now: a missing key must not wait for the model
        wandb_run = start_wandb(run_dir, asked.wandb, msgspec.to_builtins(asked), resumes=start_from is not None)

    # 3. The frozen base with LoRA on this rank's device, and its optimizer.
    torch.manual_seed(asked.train.seed)
    model, lora_config = build_model(inputs.base_dir, asked, inputs.conditioning, world)
    describe_model(model)
    optimizer = make_optimizer([parameter for _, parameter in lora_parameters(model)], asked.train)

    # 4. Memory: what a step needs is measured; a budget that does not fit ends here. Nothing is "auto" from here on.
    budget = find_budget(model, source.heaviest_packs(builder, world), asked, world, wanted)
    config = with_budget(asked, inputs.sequence, budget)
    if not wanted:
        prepare(source, builder, budget.batch_tokens, run_dir, world)
    held_out = source.held_out(world)
    if held_out:
        log.info("%s", held_out)

    # 5. What would train to a silent model is found here.
    compared = None
    if options.skip_preflight:
        log.info("preflight skipped: --skip-preflight")
    elif start_from is None:
        with waiting():
            batch = source.preflight_batch(preflight.NUM_SAMPLES).to(world.device)
        compared = batch, preflight.check_before_training(model, batch, config.loss)
    return Checked(config, inputs, model, lora_config, optimizer, held_out, compared, start_from, wandb_run)


def begin(
    checked: Checked,
    run_dir: Path,
    world: World,
    interrupted: Callable[[], bool],
    waiting: Callable[[], AbstractContextManager[None]],
) -> Run:
    """Resume, or begin: what the steps need beside the model, and what RUN holds from now on. Every rank must call this."""
    config, inputs, start_from = checked.config, checked.inputs, checked.start_from
    source, optimizer = inputs.source, checked.optimizer
    step = load_state(start_from, checked.model, optimizer) if start_from else 0
    if start_from and world.is_first:
        log_changes(start_from, config)
    world.require_equal({"the first step": str(step), **inputs.model_files.named()})
    num_listened = config.train.listening_samples
    num_read = max(num_listened, int(checked.held_out is not None)) if world.is_first else 0
    with waiting():
        listened = source.listening_samples(num_read) if num_read else []
    free_running = open_free_running(listened, inputs.builder, world)
    listening = open_listening(listened[:num_listened], inputs.builder, inputs.codec_dir, run_dir, world)
    scores = open_scores(config.eval, config.train.best_by, listening, world)  # refuses before the run is begun
    evaluation = Evaluation(checked.held_out, world) if checked.held_out else None
    metrics = None
    if world.is_first:
        metrics = begin_run(config_text(config, source), config, run_dir, step, world, checked.wandb_run)
    log.info("step %d of %d%s", step, source.total_steps, f", resumed from {start_from}" if start_from else "")
    return Run(
        config=config,
        run_dir=run_dir,
        world=world,
        source=source,
        model=checked.model,
        optimizer=optimizer,
        evaluation=evaluation,
        listening=listening,
        free_running=free_running,
        scores=scores,
        metrics=metrics,
        saver=open_saver(checked, run_dir, world),
        first_step=step,
        start_from=start_from,
        preflight=checked.preflight,
        interrupted=interrupted,
        waiting=waiting,
    )


# --- its parts -----------------------------------------------------------------------------------------------------


def open_source(location: str, section: TrainSection) -> Source:
    """`location`: "" where train.data names the data. Raises ShardError or ConfigError when there is no data."""
    return PlannedSource(location, section) if section.loader == "plan" else StreamedSource(location, section)


def find_inputs(source: Source, asked: TrainConfig) -> Inputs:
    """Base, codec and tokenizer, and whether the data set was made for them. Raises PipelineError."""
    base_dir = resolve(asked.model.base, asked.model.revision, "model.base")
    codec_dir = resolve(asked.model.codec, asked.model.codec_revision, "model.codec")
    expected = Fingerprints(codec_fingerprint(codec_dir), tokenizer_fingerprint(base_dir), mel_fingerprint())
    conditioning = source.check(expected, decide_conditioning(asked.sequence, asked.features, base_dir))
    model_files = find_model_files(base_dir, codec_dir, conditioning)
    sequence = msgspec.structs.replace(asked.sequence, conditioning=conditioning.name)
    builder = SequenceBuilder(load_tokenizer(base_dir), sequence)
    return Inputs(source, base_dir, codec_dir, model_files, conditioning, sequence, builder)


def require_apart(source: Source, world: World) -> None:
    """No held-out audio is heard in training; the first rank looks for all. Raises ConfigError. Every rank must call this."""
    problem, places = "", list[int]()
    if world.is_first:
        try:
            places = source.require_apart()
        except PipelineError as error:
            problem = str(error)
    problem, places = world.gather((problem, places))[0]
    if problem:
        raise ConfigError(problem)
    source.leave_out(places)


def wanted_budget(section: TrainSection, start_from: Path | None) -> int | None:
    """Tokens per pack as asked for; "auto" in a run that goes on is what it was before. None: to be found."""
    if section.batch_tokens != "auto":
        return section.batch_tokens
    return read_identity(start_from).batch_tokens if start_from else None


def with_budget(asked: TrainConfig, sequence: SequenceSection, budget: Budget) -> TrainConfig:
    """What was asked for with every "auto" decided."""
    section = msgspec.structs.replace(
        asked.train,
        batch_tokens=budget.batch_tokens,
        activation_checkpointing="full" if budget.recomputes else "off",
    )
    return msgspec.structs.replace(asked, sequence=sequence, train=section)


def prepare(source: Source, builder: SequenceBuilder, batch_tokens: int, run_dir: Path, world: World) -> None:
    """Plan, and see that the ranks have the same plan."""
    source.prepare(builder, batch_tokens, run_dir / "plan.json", world)
    world.require_equal(source.facts(0))
    source.describe()


def describe_model(model: nn.Module) -> None:
    table = trainable_table(model)
    total = sum(count for _, count in table.values())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - total
    log.info("LoRA trains %s parameters; %s stay frozen", f"{total:,}", f"{frozen:,}")
    for suffix, (modules, count) in table.items():
        log.info("  %-22s %3d modules %12s parameters", suffix, modules, f"{count:,}")


def open_saver(checked: Checked, run_dir: Path, world: World) -> Checkpoints:
    config, inputs = checked.config, checked.inputs
    return Checkpoints(
        run_dir,
        world,
        checked.lora_config,
        inputs.identify(config),
        config_text(config, inputs.source),
        config.train.keep_checkpoints,
        config.train.best_by,
    )
