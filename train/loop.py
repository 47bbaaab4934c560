"""MAIN PATH of stage two: shards in, a run directory with LoRA checkpoints out.

`run` is the numbered story, the same on every rank; `train.step` is the step. One process and eight do the same
arithmetic: the plan says which packs make a step, ranks share them, and losses are divided by what all of them counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import nn

from shards.artifacts import (
    codec_fingerprint,
    load_tokenizer,
    mel_fingerprint,
    resolve,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from shards.config import to_toml
from shards.errors import PipelineError
from shards.manifest import Fingerprints
from shards.sequence import SequenceBuilder
from train import preflight
from train.config import TrainConfig, TrainSection
from train.data.feed import Feed
from train.data.loader import LoaderShare, dead_loader
from train.data.plan import PLAN_VERSION
from train.data.planned_source import PlannedSource
from train.data.streamed_source import StreamedSource
from train.evaluation.curve_monitor import CurveMonitor
from train.evaluation.held_out import Evaluation
from train.evaluation.listening import Listening, open_listening
from train.memory import find_budget
from train.model.build import build_model
from train.model.conditioning import decide_conditioning
from train.model.decoder import HiggsAudio
from train.model.lora import lora_parameters, trainable_table
from train.optim import learning_rate_at, make_optimizer
from train.run_folder import checkpoint, checkpoint_folders
from train.run_folder.metrics import Metrics, console_line, held_out_history, log, open_log, start_wandb
from train.run_folder.start import begin_run, find_start, make_identity, require_one_folder
from train.signals import Stopped, StopSignal
from train.step import StepClock, heap_at_rest, train_step
from train.world import World, join, leave, release_frames, shorten_timeout


@dataclass(frozen=True)
class RunOptions:
    """How to run this time; what to train stands in the configuration."""

    resume: str = "auto"  # auto, never, or a checkpoint folder
    dry_run: bool = False
    skip_preflight: bool = False


def train(config: TrainConfig, shards: str | Path, run_dir: Path, options: RunOptions) -> Path | None:
    """Train to the end and return the last checkpoint; None for a dry run.

    Raises PipelineError, and Stopped after SIGTERM or SIGUSR1.
    """
    world = join(config.train.device)
    try:
        with StopSignal() as signals:
            return run(config, shards, run_dir, options, world, signals)
    except PipelineError as error:
        release_frames(error)
        raise
    except torch.OutOfMemoryError as error:
        release_frames(error)
        raise PipelineError(
            f"rank {world.rank}: the GPU's memory does not hold packs of train.batch_tokens = {config.train.batch_tokens} "
            f"({str(error).splitlines()[0][:160]}); halve it and double train.packs_per_step, which trains nearly the same, "
            'or set train.activation_checkpointing = "full"'
        ) from None
    except RuntimeError as error:
        message = dead_loader(error) or world.lost(error)
        if message is None:
            raise
        release_frames(error)
        raise message from None
    finally:
        leave()


def run(
    config: TrainConfig, shards: str | Path, run_dir: Path, options: RunOptions, world: World, signals: StopSignal
) -> Path | None:
    """The story, on every rank."""
    # 1. The data set, and whether it was made for this model.
    kind = PlannedSource if config.train.loader == "plan" else StreamedSource
    source = kind(str(shards), config.train)
    base_dir = resolve(config.model.base, config.model.revision, "model.base")
    codec_dir = resolve(config.model.codec, config.model.codec_revision, "model.codec")
    expected = Fingerprints(codec_fingerprint(codec_dir), tokenizer_fingerprint(base_dir), mel_fingerprint())
    conditioning = source.check(expected, decide_conditioning(config.sequence, config.features, base_dir))
    sequence = msgspec.structs.replace(config.sequence, conditioning=conditioning.name)
    config = msgspec.structs.replace(config, sequence=sequence)  # "auto" is decided from here on
    builder = SequenceBuilder(load_tokenizer(base_dir), config.sequence)

    # 2. The run directory, and where to start from.
    section = config.train
    open_log(run_dir, world.rank)
    require_one_folder(run_dir, world)
    start_from = find_start(run_dir, options.resume, world)
    log.info("layout %s, %s", config.sequence.layout, conditioning)
    log.info("%s", world)

    # 3. The plan: every epoch follows from lengths, seed and pack budget. "auto" is measured when the model is here.
    wanted = wanted_budget(section, start_from)
    if wanted:
        prepare(source, builder, wanted, run_dir, world)
    tracked = world.is_first and not options.dry_run  # asked now: a missing key must not wait for the model
    wandb_run = None
    if tracked:
        wandb_run = start_wandb(run_dir, config.wandb, msgspec.to_builtins(config), resumes=start_from is not None)

    # 4. The frozen base with LoRA on this rank's device, and its optimizer.
    torch.manual_seed(section.seed)
    model, lora_config = build_model(base_dir, config, conditioning, world)
    describe_model(model)
    optimizer = make_optimizer([parameter for _, parameter in lora_parameters(model)], section)

    # 5. Memory: what a step needs is measured; a budget that does not fit ends here.
    budget = find_budget(model, source.heaviest_packs(builder), config, world, wanted)
    section = msgspec.structs.replace(
        section,
        batch_tokens=budget.batch_tokens,
        activation_checkpointing="full" if budget.recomputes else "off",
    )
    config = msgspec.structs.replace(config, train=section)  # from here on nothing is "auto"
    if not wanted:
        prepare(source, builder, budget.batch_tokens, run_dir, world)
    total_steps = source.total_steps
    held_out = source.held_out(world)
    if held_out:
        log.info("%s", held_out)
    evaluation = Evaluation(held_out, world) if held_out else None

    # 6. Preflight: what would train to a silent model is found here.
    preflight_batch = start_terms = None
    if options.skip_preflight:
        log.info("preflight skipped: --skip-preflight")
    elif start_from is None:
        preflight_batch = source.preflight_batch(preflight.NUM_SAMPLES).to(world.device)
        start_terms = preflight.check_before_training(model, preflight_batch, config.loss)
    if options.dry_run:
        log.info("dry run: everything fits together; nothing was trained")
        return None

    # 7. Resume, or begin.
    identity = make_identity(config, source.digest, weights_fingerprint(base_dir), PLAN_VERSION)
    config_toml = to_toml(config)
    step = checkpoint.restore(start_from, model, optimizer, identity, world) if start_from else 0
    world.require_equal({"the first step": str(step), "the base model": identity.model_weights})
    metrics = begin_run(config, run_dir, step, world, wandb_run) if world.is_first else None
    listening_samples = (
        source.listening_samples(section.listening_samples) if world.is_first and section.listening_samples else []
    )
    listening = open_listening(listening_samples, builder, codec_dir, run_dir, world)
    saver = checkpoint.Checkpoints(run_dir, world, lora_config, identity, config_toml, section.keep_checkpoints)
    log.info("step %d of %d%s", step, total_steps, f", resumed from {start_from}" if start_from else "")

    # 8. Steps.
    loaded_packs = source.loaded_packs(step, LoaderShare(world.rank, world.size, section.num_workers))
    feed = Feed(loaded_packs, section.packs_per_step, step, world, source.limits())
    clock = StepClock(model, world)
    watch = CurveMonitor(world.gather(held_out_history(run_dir, step))[0], section.patience, logs=world.is_first)
    values: dict[str, float] = {}

    def interrupted() -> bool:
        return signals.asked(world)

    with saver, heap_at_rest():  # whatever ends the steps, a checkpoint that is being written is written to its end
        if step == 0:
            evaluate(0, model, config, None, listening, metrics, interrupted)  # the base model, to compare with
            clock.restart()
        model.train()
        first_step, stopped = step, False
        while step < total_steps and not (stopped := interrupted()) and not watch.should_stop_early:
            with clock.waiting():
                given = next(feed)
            learning_rate = learning_rate_at(step, total_steps, section)
            result = train_step(
                *(model, optimizer, given.batches, config.loss, step, learning_rate, section.max_grad_norm),
                *(given.counts, world, section.seed, interrupted),
            )
            if result is None:  # broken off between two packs; the run that goes on takes this step from its beginning
                stopped = True
                break
            clock.count(given.batches)
            step += 1
            if preflight_batch is not None and start_terms is not None:
                preflight.check_after_first_step(model, preflight_batch, start_terms)
                preflight_batch = None
            if not values:
                shorten_timeout()  # from the second step on nobody loads or compiles
            is_eval_step = (evaluation or listening) and (step % section.eval_every == 0 or step == total_steps)
            if step % section.log_every == 0 or step in (1, total_steps) or is_eval_step:
                values = {"epoch": given.epoch, **result.values(world), "metrics/learning_rate": learning_rate}
                values |= {**clock.values(), **feed.values()}
                if is_eval_step:
                    values |= evaluate(step, model, config, evaluation, listening, metrics, interrupted)
                    clock.restart()  # throughput is that of training
                if metrics:
                    metrics.write(step, values)
                log.info(console_line(step, total_steps, values))
                watch.check(step, values)
            if not is_eval_step:
                values = {k: v for k, v in values.items() if not k.startswith("eval/")}  # those are an older step's
            if step % section.save_every == 0 and step < total_steps:
                saver.save(step, model, optimizer, values)

        # 9. Done, or asked to stop: the last checkpoint must succeed.
        last = start_from
        if step > first_step:
            last = saver.save(step, model, optimizer, values)
            saver.finish(must_succeed=True)
    if metrics:
        metrics.close()
    if watch.should_stop_early:
        log.info(
            "stopped early: no lower held-out audio loss in %d evaluations; see %s", section.patience, run_dir / "best"
        )
    if stopped:
        kept = f"{last} is saved, the same command goes on from it" if last else "the same command begins anew"
        raise Stopped(f"stopped by a signal after step {step}; {kept}")
    return last


# --- around the loop ------------------------------------------------------------------------------------------------


def wanted_budget(section: TrainSection, start_from: Path | None) -> int | None:
    """Tokens per pack as asked for; "auto" in a run that goes on is what it was before. None: to be found."""
    if section.batch_tokens != "auto":
        return section.batch_tokens
    return checkpoint_folders.read_identity(start_from).batch_tokens if start_from else None


def prepare(
    source: PlannedSource | StreamedSource, builder: SequenceBuilder, batch_tokens: int, run_dir: Path, world: World
) -> None:
    """Plan, and see that the ranks have the same plan."""
    source.prepare(builder, batch_tokens, run_dir / "plan.json", world)
    world.require_equal(source.facts(0))
    source.describe()


def evaluate(
    step: int,
    model: HiggsAudio,
    config: TrainConfig,
    evaluation: Evaluation | None,
    listening: Listening | None,
    metrics: Metrics | None,
    interrupted: Callable[[], bool],
) -> dict[str, float]:
    """Held-out losses and the listening set; every rank must call this. Returns metrics.

    A signal ends it early: who sends one kills half a minute later, and the checkpoint must be written before.
    """
    values = evaluation.losses(model, config.loss, interrupted) if evaluation else {}
    if listening:
        values |= listening.speak(step, model, interrupted)
    if interrupted():
        log.info("step %d: held-out losses or speech were broken off by the signal", step)
    if listening and metrics:
        metrics.log_audio(step, listening.waves(step))
    return values


def describe_model(model: nn.Module) -> None:
    table = trainable_table(model)
    total = sum(count for _, count in table.values())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - total
    log.info("LoRA trains %s parameters; %s stay frozen", f"{total:,}", f"{frozen:,}")
    for suffix, (modules, count) in table.items():
        log.info("  %-22s %3d modules %12s parameters", suffix, modules, f"{count:,}")
