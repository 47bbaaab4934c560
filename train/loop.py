"""MAIN PATH of stage two: shards in, a run directory with LoRA checkpoints out.

`train.set_up` makes a `Run` of what was asked for, `take_steps` trains it; both are the same on every rank, and `train.step` is
one step. One process and eight do the same arithmetic: the plan says which packs make a step, ranks share them, and losses
are divided by what all of them counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from shards.errors import PipelineError
from train import preflight
from train.config import TrainConfig
from train.data.feed import Feed, WaitingEnded
from train.data.loader import LoaderShare, dead_loader
from train.data_progress import DataProgress
from train.evaluation.curve_monitor import CurveMonitor
from train.heap import keep_freed_memory
from train.run import Run, RunOptions
from train.run_folder import checkpoint_folders
from train.run_folder.metrics import console_line, held_out_history, log
from train.run_folder.start import hold_run
from train.set_up import set_up
from train.signals import Stopped, StopSignal
from train.step import StepClock, StepSettings, garbage_collection_paused, train_step
from train.world import World, join, leave, release_frames, shorten_timeout


def train(config: TrainConfig, shards: str | Path, run_dir: Path, options: RunOptions) -> Path | None:
    """Train to the end and return the last checkpoint; None for a dry run.

    Raises PipelineError, and Stopped after a signal of `StopSignal`.
    """
    with on_every_rank(config) as (world, signals):
        return run(config, shards, run_dir, options, world, signals)


@contextmanager
def on_every_rank(config: TrainConfig) -> Iterator[tuple[World, StopSignal]]:
    """This process among the ranks until the block ends; what goes wrong with a device or a rank ends it in one line."""
    world = join(config.train.device)
    if world.device.type == "cpu":
        keep_freed_memory()
    try:
        with StopSignal() as signals:
            yield world, signals
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
    """Set up, and train."""
    with hold_run(run_dir, world):
        try:
            ready = set_up(config, shards, run_dir, options, world, lambda: signals.asked(world), signals.ends_waiting)
        except WaitingEnded:
            goes_on = bool(checkpoint_folders.complete_checkpoints(run_dir))
            next_time = "goes on from the last checkpoint" if goes_on else "begins anew"
            raise Stopped(f"stopped by a signal before its first step; the same command {next_time}") from None
        return take_steps(ready) if ready else None


def take_steps(run: Run) -> Path | None:
    """Steps to the last one, an early stop or a signal; returns the last checkpoint. Every rank must call this."""
    config, world, model, optimizer, total_steps = run.config, run.world, run.model, run.optimizer, run.total_steps
    step, stopped = run.first_step, False
    loaded_packs = run.source.loaded_packs(step, LoaderShare(world.rank, world.size, config.train.num_workers))
    feed = Feed(loaded_packs, config.train.packs_per_step, step, world, run.source.limits(), run.waiting)
    history = world.gather(held_out_history(run.run_dir, step))[0]
    monitor = CurveMonitor(history, config.train.patience, logs=world.is_first)
    clock = StepClock(model, world)
    progress = DataProgress(run.source.data_sets, world, run.start_from)
    values: dict[str, float] = {}  # the last logged ones

    with (
        closing(feed),
        run.saver,
        garbage_collection_paused(),
    ):  # however the steps end, a checkpoint being written is written to its end
        if step == 0:
            log_base(evaluate(run, 0))  # the base model, to compare with
            clock.restart()
        model.train()
        while step < total_steps and not (stopped := run.interrupted()) and not monitor.should_stop_early:
            with clock.waiting():
                given = next(feed, None)
            if given is None:  # a signal while it waited for data
                stopped = True
                break
            settings = StepSettings.at(step, total_steps, config)
            result = train_step(model, optimizer, given.batches, settings, given.counts, world, run.interrupted)
            if result is None:  # interrupted between two packs; the run that goes on takes this step from its beginning
                stopped = True
                break
            clock.count(given.batches)
            progress.count(given.batches)
            step += 1
            if step == run.first_step + 1:
                after_first_step(run)
            if run.is_log_step(step):
                losses = result.values(world, run.source.data_sets)
                values = {"epoch": given.epoch, **losses, "metrics/learning_rate": settings.learning_rate}
                values |= {**clock.values(), **feed.values(), **progress.values()}
                if run.is_eval_step(step):
                    values |= evaluate(run, step)
                    clock.restart()  # throughput is that of training
                if run.metrics:
                    run.metrics.write(step, values)
                log.info(console_line(step, total_steps, values))
                monitor.check(step, values)
            if not run.is_eval_step(step):
                values = {
                    name: value for name, value in values.items() if not name.startswith("eval/")
                }  # an older step's
            if step % config.train.save_every == 0 and step < total_steps:
                run.saver.save(step, model, optimizer, {**values, **progress.values()})

        last = run.start_from
        if step > run.first_step:
            last = run.saver.save(step, model, optimizer, {**values, **progress.values()})
            run.saver.finish(must_succeed=True)
    end_run(run, step, last, stopped, monitor.should_stop_early)
    return last


# --- around the steps -----------------------------------------------------------------------------------------------


def after_first_step(run: Run) -> None:
    """The adapter must say something now, and nobody loads or compiles any more."""
    if run.preflight:
        preflight.check_after_first_step(run.model, *run.preflight)
    shorten_timeout()


def end_run(run: Run, step: int, last: Path | None, stopped: bool, stopped_early: bool) -> None:
    """Close what is open and say how it ended. Raises Stopped after a signal."""
    if run.metrics:
        run.metrics.close()
    if stopped_early:
        log.info(
            "stopped early: no lower held-out audio loss in %d evaluations; see %s",
            run.config.train.patience,
            run.run_dir / "best",
        )
    if stopped:
        kept = f"{last} is saved, the same command goes on from it" if last else "the same command begins anew"
        raise Stopped(f"stopped by a signal after step {step}; {kept}")


def log_base(values: dict[str, float]) -> None:
    """What it says of the model that training begins with; curves begin behind it."""
    known = ("similarity", "cer", "free_running")
    if scores := [f"{name} {values[f'eval/{name}']:.3f}" for name in known if f"eval/{name}" in values]:
        log.info("step 0, the base model: %s", ", ".join(scores))


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Held-out losses (not of the base model at step 0), free-running accuracy and the listening set; returns metrics.
    Every rank must call this.

    A signal ends it early: who sends one kills half a minute later, and the checkpoint must be written before.
    """
    values: dict[str, float] = {}
    if run.evaluation and step > 0:
        values |= run.evaluation.losses(run.model, run.config.loss, run.interrupted)
    if run.free_running:
        values |= run.free_running.accuracy(run.model, run.interrupted)
    if run.listening:
        values |= run.listening.speak(step, run.model, run.interrupted, run.scores.of_step if run.scores else None)
    if run.interrupted():
        log.info("step %d: evaluation interrupted by a signal", step)
    if run.listening and run.metrics:
        run.metrics.log_audio(step, run.listening.waves(step))
    return values
