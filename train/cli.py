"""The `train` command: parse, read the configuration, call the loop, turn faults into one line."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from shards.terminal import make_stray_lines_printable, print_line, system_fault

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.probe_learning_rate import Probe


@click.command(context_settings={"show_default": True})
@click.argument("shards", nargs=-1)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Default: ./pipeline.toml if it exists.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. train.seed=1.")
@click.option("--gpus", type=click.IntRange(1), help="Processes to start here. Default: every visible GPU.")
@click.option("--resume", default="auto", metavar="auto|never|PATH", help="Go on from RUN's newest checkpoint.")
@click.option("--learning-rate", type=float, help="Sets train.learning_rate.")
@click.option("--num-epochs", type=int, help="Sets train.num_epochs.")
@click.option("--batch-tokens", metavar="INTEGER|auto", help="Sets train.batch_tokens.")
@click.option(
    "--gradient-accumulation-steps",
    type=click.IntRange(1),
    help="Packs per GPU and step: sets train.packs_per_step to this times the number of GPUs.",
)
@click.option("--wandb/--no-wandb", "use_wandb", default=None, help="Sets wandb.mode to online or off.")
@click.option("--wandb-project", help="Sets wandb.project.")
@click.option("--dry-run", is_flag=True, help="Check everything, load the model, train nothing.")
@click.option("--skip-preflight", is_flag=True, help="Train even if the checks before the first step would fail.")
@click.option(
    "--probe-lr",
    is_flag=False,
    flag_value="5e-6,2e-5,5e-5,1e-4",
    metavar="[RATES]",
    show_default=False,
    help="Make no run: try these learning rates from the same start on the same packs (5e-6,2e-5,5e-5,1e-4 where none are "
    "given) and print held-out losses and their slope.",
)
@click.option("--probe-steps", type=click.IntRange(2), default=100, help="Steps of each rate of --probe-lr.")
@click.option("--json", "as_json", is_flag=True, help="With --probe-lr: JSON in place of the table.")
def main(
    shards: tuple[str, ...],
    run: Path,
    config_path: Path | None,
    overrides: tuple[str, ...],
    gpus: int | None,
    resume: str,
    dry_run: bool,
    skip_preflight: bool,
    probe_lr: str | None,
    probe_steps: int,
    as_json: bool,
    gradient_accumulation_steps: int | None,
    **flags: Any,
) -> None:
    """Train LoRA adapters on SHARDS (the OUT folder of `preprocess`, or its URL; several are trained on together) into the
    folder RUN. Without SHARDS the data sets are those of [[train.data]] in the configuration."""
    from shards.config import read_config
    from shards.errors import ConfigError, PipelineError
    from shards.parent_death import die_with_parent
    from train.config import TrainConfig
    from train.launch import (
        STOPPED,
        WorkerFailed,
        allocator_settings,
        is_worker,
        launch,
        mark_well_ended,
        num_processes,
        slurm_ranks,
    )

    make_stray_lines_printable()
    os.environ.update({**slurm_ranks(os.environ), **allocator_settings(os.environ)})  # before torch is imported
    try:
        rates = parse_rates(probe_lr) if probe_lr is not None else None
        if rates and dry_run:
            raise ConfigError("--probe-lr and --dry-run: a probe trains, a dry run does not; give one of them")
        overrides = (*overrides, *flag_overrides(**flags))
        config = read_config(TrainConfig, config_path, overrides)
        if gradient_accumulation_steps:
            size = int(os.environ["WORLD_SIZE"]) if is_worker() else num_processes(gpus, config.train.device)
            overrides = (*overrides, f"train.packs_per_step={gradient_accumulation_steps * size}")
            config = read_config(TrainConfig, config_path, overrides)
        config = with_data(config, shards, run)
        if config.train.loader == "plan":
            from shards.manifest import open_dataset

            for location in [source.path for source in config.train.data] or shards:
                if "://" not in location:
                    open_dataset(Path(location))  # before torch is imported: a mistyped folder is answered at once
        if is_worker():
            die_with_parent()
        else:
            num_workers = num_processes(gpus, config.train.device)
            if num_workers > 1:
                launch(num_workers, sys.argv[1:])
                return
        from train.loop import RunOptions, train

        location = shards[0] if len(shards) == 1 else ""
        if rates:
            from train.probe_learning_rate import probe_rates

            found = probe_rates(config, location, run, rates, probe_steps, skip_preflight)
            mark_well_ended()
            if os.environ.get("RANK", "0") == "0":
                print_probes(found, as_json)
            return
        checkpoint = train(config, location, run, RunOptions(resume, dry_run, skip_preflight))
    except WorkerFailed as error:
        if error.exitcode == STOPPED:
            sys.exit(STOPPED)
        print_line(f"error: {error}")
        sys.exit(1)
    except PipelineError as error:
        exit_with(error, str(error))
    except OSError as error:
        what_then = "nothing was kept" if probe_lr else "the same command goes on from the last checkpoint"
        exit_with(error, f"{system_fault(error)}; {what_then}")
    mark_well_ended()
    if checkpoint and os.environ.get("RANK", "0") == "0":
        print_line(f"done: {checkpoint}; next: checkpoints merge {shlex.quote(str(run))} OUT")


def with_data(config: TrainConfig, shards: tuple[str, ...], run: Path) -> TrainConfig:
    """The configuration with the data sets of the command, where there are several. Raises ConfigError."""
    from msgspec.structs import replace

    from shards.errors import ConfigError
    from train.config import DataSource

    named = config.train.data
    if not shards and not named:
        raise ConfigError(
            f"{run}: one argument is not enough: give SHARDS and RUN, or name data sets in [[train.data]] of the "
            "configuration and give RUN alone"
        )
    if shards and named:
        raise ConfigError(
            f"data sets are named twice: {', '.join(shards)} in the command and "
            f"{', '.join(source.path for source in named)} in train.data; give RUN alone, or remove train.data"
        )
    if (run / "dataset.json").is_file():
        raise ConfigError(f"RUN {run} is a data set; the last argument is the folder that the run is written to")
    if len(shards) < 2:
        return config
    return replace(config, train=replace(config.train, data=[DataSource(path=path) for path in shards]))


def parse_rates(text: str) -> list[float]:
    """ "1e-5,3e-5" -> rates, each once, ascending. Raises ConfigError."""
    from shards.errors import ConfigError

    rates: set[float] = set()
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise ConfigError(
                f"--probe-lr {text}: {part.strip()!r} is no learning rate; give some above 0 with commas, as in "
                "--probe-lr 1e-5,3e-5,1e-4, or --probe-lr alone at the end of the command"
            )
        rates.add(rate)
    return sorted(rates)


def print_probes(found: list[Probe], as_json: bool) -> None:
    """One row per rate on stdout."""
    import msgspec

    from shards.terminal import print_json, print_table

    if as_json:
        print_json({"rates": msgspec.to_builtins(found)}, indent=1)
        return
    headings = ("learning rate", "steps", "first loss", "last loss", "held out: start", "half", "end", "text", "slope")
    print_table([probe.cells() for probe in found], headings=headings, to_stdout=True, width=110)
    print_line(
        "held out: audio loss before, after half of the steps, at the end; text: text loss at the end; slope: change of the "
        "held-out audio loss in the second half, per 100 steps",
        to_stdout=True,
    )


def exit_with(error: Exception, message: str) -> NoReturn:
    """One line, and the exit status. A fault that all ranks share is printed by the first; the others wait for it to do so."""
    from train.launch import STOPPED, mark_well_ended
    from train.signals import Stopped

    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(3)  # the launcher ends this process meanwhile, if rank 0 has failed too
    if isinstance(error, Stopped):
        mark_well_ended()
        if rank == "0":
            print_line(message)
        sys.exit(STOPPED)
    print_line(f"error: {message}" if rank == "0" else f"error on rank {rank}: {message}")
    sys.exit(1)


def flag_overrides(
    learning_rate: float | None = None,
    num_epochs: int | None = None,
    batch_tokens: str | None = None,
    use_wandb: bool | None = None,
    wandb_project: str | None = None,
) -> list[str]:
    """Flags are only other spellings of keys, so they pass the same checks."""
    values = {
        "train.learning_rate": learning_rate,
        "train.num_epochs": num_epochs,
        "train.batch_tokens": batch_tokens,
        "wandb.mode": None if use_wandb is None else ("online" if use_wandb else "off"),
        "wandb.project": wandb_project,
    }
    return [f"{key}={value}" for key, value in values.items() if value is not None]
