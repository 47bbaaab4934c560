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

import msgspec
import torch
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
from train.data.source import Source
from train.data.streamed_source import StreamedSource
from train.evaluation.free_running import FreeRunning, open_free_running
from train.evaluation.held_out import Evaluation
from train.evaluation.listening import Listening, open_listening
from train.evaluation.listening_scores import ListeningScores, open_scores
from train.memory import Budget, find_budget
from train.model.batch import PackedBatch
from train.model.build import build_model
from train.model.conditioning import decide_conditioning
from train.model.decoder import HiggsAudio
from train.model.lora import lora_parameters, trainable_table
from train.model.loss import LossTerms
from train.optim import make_optimizer
from train.run_folder import checkpoint
from train.run_folder.identity import (
    Identity,
    check_identity,
    find_model_files,
    log_changes,
    make_identity,
    read_identity,
)
from train.run_folder.metrics import Metrics, log, open_log, start_wandb
from train.run_folder.start import begin_run, config_text, find_start, require_one_folder
from train.run_folder.state import load_state
from train.world import World


@dataclass(frozen=True)
class RunOptions:
    """How to run this time; what to train stands in the configuration."""

    resume: str = "auto"  # auto, never, or a checkpoint folder
    dry_run: bool = False
    skip_preflight: bool = False


@dataclass(frozen=True)
class Run:
    """All that the steps need."""

    config: TrainConfig  # final: nothing in it is "auto"
    run_dir: Path
    world: World
    source: Source
    model: HiggsAudio
    optimizer: torch.optim.Optimizer
    evaluation: Evaluation | None
    listening: Listening | None
    free_running: FreeRunning | None
    scores: ListeningScores | None  # of the first rank, where eval.score asks for them
    metrics: Metrics | None  # of the first rank
    saver: checkpoint.Checkpoints
    first_step: int  # finished steps at the start
    start_from: Path | None  # the checkpoint with those steps
    preflight: tuple[PackedBatch, LossTerms] | None  # what the losses of the first step are compared with
    interrupted: Callable[[], bool]  # every rank asks at the same places and gets the same answer
    waiting: Callable[[], AbstractContextManager[None]]  # around a wait for data, which a signal ends

    @property
    def total_steps(self) -> int:
        return self.source.total_steps

    def is_eval_step(self, step: int) -> bool:
        evaluates = self.evaluation is not None or self.listening is not None
        return evaluates and (step % self.config.train.eval_every == 0 or step == self.total_steps)

    def is_log_step(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step in (1, self.total_steps) or self.is_eval_step(step)


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
    # 1. The data set, and whether it was made for this model.
    with waiting():
        source = open_source(str(shards), asked.train)
    base_dir = resolve(asked.model.base, asked.model.revision, "model.base")
    codec_dir = resolve(asked.model.codec, asked.model.codec_revision, "model.codec")
    expected = Fingerprints(codec_fingerprint(codec_dir), tokenizer_fingerprint(base_dir), mel_fingerprint())
    conditioning = source.check(expected, decide_conditioning(asked.sequence, asked.features, base_dir))
    model_files = find_model_files(base_dir, codec_dir, conditioning)
    sequence = msgspec.structs.replace(asked.sequence, conditioning=conditioning.name)
    builder = SequenceBuilder(load_tokenizer(base_dir), sequence)

    # 2. The run directory, and where to start from.
    open_log(run_dir, world.rank)
    require_one_folder(run_dir, world)
    require_apart(source, world)
    start_from = find_start(run_dir, options.resume, world)
    log.info("layout %s, %s", sequence.layout, conditioning)
    log.info("%s", world)

    # 3. The plan: every epoch follows from lengths, seed and pack budget. "auto" is measured when the model is here.
    wanted = wanted_budget(asked.train, start_from)

    def identify(config: TrainConfig) -> Identity:
        return make_identity(config, model_files, source.digest, source.validation_digest, PLAN_VERSION)

    if start_from:  # before anything of another run is planned or written
        assert wanted, "a run that goes on has its budget"
        check_identity(start_from, identify(with_budget(asked, sequence, Budget(wanted, recomputes=False))))
    if wanted:
        prepare(source, builder, wanted, run_dir, world)
    wandb_run = None
    if world.is_first and not options.dry_run:  # asked now: a missing key must not wait for the model
        wandb_run = start_wandb(run_dir, asked.wandb, msgspec.to_builtins(asked), resumes=start_from is not None)

    # 4. The frozen base with LoRA on this rank's device, and its optimizer.
    torch.manual_seed(asked.train.seed)
    model, lora_config = build_model(base_dir, asked, conditioning, world)
    describe_model(model)
    optimizer = make_optimizer([parameter for _, parameter in lora_parameters(model)], asked.train)

    # 5. Memory: what a step needs is measured; a budget that does not fit ends here. Nothing is "auto" from here on.
    budget = find_budget(model, source.heaviest_packs(builder), asked, world, wanted)
    config = with_budget(asked, sequence, budget)
    if not wanted:
        prepare(source, builder, budget.batch_tokens, run_dir, world)
    held_out = source.held_out(world)
    if held_out:
        log.info("%s", held_out)

    # 6. Preflight: what would train to a silent model is found here.
    compared = None
    if options.skip_preflight:
        log.info("preflight skipped: --skip-preflight")
    elif start_from is None:
        with waiting():
            batch = source.preflight_batch(preflight.NUM_SAMPLES).to(world.device)
        compared = batch, preflight.check_before_training(model, batch, config.loss)
    if options.dry_run:
        log.info("dry run: everything fits together; nothing was trained")
        return None

    # 7. Resume, or begin.
    identity = identify(config)
    step = load_state(start_from, model, optimizer) if start_from else 0
    if start_from and world.is_first:
        log_changes(start_from, config)
    world.require_equal({"the first step": str(step), **model_files.named()})
    num_listened = config.train.listening_samples
    num_read = max(num_listened, int(held_out is not None)) if world.is_first else 0
    with waiting():
        listened = source.listening_samples(num_read) if num_read else []
    free_running = open_free_running(listened, builder, world)
    listening = open_listening(listened[:num_listened], builder, codec_dir, run_dir, world)
    scores = open_scores(config.eval, config.train.best_by, listening, world)  # refuses before the run is begun
    ready = Run(
        config=config,
        run_dir=run_dir,
        world=world,
        source=source,
        model=model,
        optimizer=optimizer,
        evaluation=Evaluation(held_out, world) if held_out else None,
        metrics=begin_run(config, source.text_rules, run_dir, step, world, wandb_run) if world.is_first else None,
        listening=listening,
        free_running=free_running,
        scores=scores,
        saver=checkpoint.Checkpoints(
            run_dir,
            world,
            lora_config,
            identity,
            config_text(config, source.text_rules),
            config.train.keep_checkpoints,
            config.train.best_by,
        ),
        first_step=step,
        start_from=start_from,
        preflight=compared,
        interrupted=interrupted,
        waiting=waiting,
    )
    log.info("step %d of %d%s", step, ready.total_steps, f", resumed from {start_from}" if start_from else "")
    return ready


# --- its parts -----------------------------------------------------------------------------------------------------


def open_source(location: str, section: TrainSection) -> Source:
    """Raises ShardError or ConfigError when there is no data."""
    return PlannedSource(location, section) if section.loader == "plan" else StreamedSource(location, section)


def require_apart(source: Source, world: World) -> None:
    """Held-out data are not trained on; the first rank looks for all. Raises ConfigError. Every rank must call this."""
    problem = ""
    if world.is_first:
        try:
            source.require_apart()
        except PipelineError as error:
            problem = str(error)
    if problem := world.gather(problem)[0]:
        raise ConfigError(problem)


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
