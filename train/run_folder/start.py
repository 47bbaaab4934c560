"""The run directory as a run begins: whether all ranks see it, where to start from, and what is left in it.

In: RUN and the configuration. Out: the checkpoint to go on from, config.toml and environment.json. The surprising check:
ranks on several nodes must see one RUN, because a checkpoint is written by all of them; a folder on each node's own disk
would look well until the first resume.
"""

from __future__ import annotations

import json
import platform
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from shards.config import to_toml
from shards.errors import CheckpointError, PipelineError
from shards.folder_lock import hold_folder
from shards.printable import redact, redact_values
from shards.terminal import system_fault
from shards.writer import write_bytes, write_json
from train.config import TrainConfig
from train.run_folder import checkpoint_folders
from train.run_folder.metrics import Metrics
from train.world import World

ORPHANS_END_WITHIN_S = 12.0  # loader processes look for their rank every 5 s
SEEN_WITHIN_S = 10.0  # network file systems show a new file to other nodes after some seconds


@contextmanager
def hold_run(run_dir: Path, world: World) -> Iterator[None]:
    """RUN belongs to this launch until the block ends; the first rank holds the lock for all. Every rank must call this.

    Raises PipelineError on every rank when another `train` works there, naming its host, process and command, or when RUN
    is no folder that can be written to. A killed run's loader processes keep its lock for some seconds: they are waited for.
    """
    problem = ""
    with ExitStack() as held:
        if world.is_first:
            try:
                held.enter_context(hold_folder(run_dir, wait_s=ORPHANS_END_WITHIN_S))
            except PipelineError as error:
                problem = str(error)
            except OSError as error:
                problem = f"RUN {system_fault(error)}; give a folder that you may write to"
        problem = world.gather(problem)[0]
        if problem:
            raise PipelineError(problem)
        yield


def require_one_folder(run_dir: Path, world: World) -> None:
    """Raises PipelineError on every rank where RUN is not one folder for all of them. Every rank must call this."""
    if world.size == 1:
        return
    name = world.gather(f".seen-by-all-{secrets.token_hex(8)}" if world.is_first else "")[0]
    if world.is_first:
        write_bytes(run_dir / name, b"")
    world.gather(None)  # written
    sees = appears(run_dir / name, SEEN_WITHIN_S)
    found = world.gather((sees, platform.node()))
    if world.is_first:
        (run_dir / name).unlink()
    blind = [f"rank {rank} on {host}" for rank, (sees, host) in enumerate(found) if not sees]
    if blind:
        raise PipelineError(
            f"{run_dir}: {', '.join(blind[:4])}{' ...' if len(blind) > 4 else ''} does not see what rank 0 on {found[0][1]} "
            "wrote there: RUN must be one folder for all ranks; give an absolute path on a file system that the nodes share"
        )


def appears(path: Path, within_s: float) -> bool:
    """Whether a file is there now or in time."""
    end = time.monotonic() + within_s
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def find_start(run_dir: Path, resume: str, world: World) -> Path | None:
    """The checkpoint to go on from, if any. Every rank must call this."""
    if resume not in ("auto", "never"):
        folder = Path(resume)
        faults = checkpoint_folders.damage(folder)
        if faults:
            raise CheckpointError(f"--resume {folder}: not a complete checkpoint folder: {faults[0]}")
        return folder
    if resume == "never" and checkpoint_folders.checkpoint_folders(run_dir):
        raise CheckpointError(f"{run_dir}: holds checkpoints of another run; give a new RUN folder or --resume auto")
    return checkpoint_folders.newest_sound(run_dir, world)


class MadeByStageOne(Protocol):
    """What is known of how shards were made; `train.data` gives it."""

    text_rules: list[str] | None
    audio_edits: dict[str, float] | None


def config_text(config: TrainConfig, made: MadeByStageOne) -> str:
    """config.toml: the resolved configuration, and what stage one did to texts and clips, which `speak` must do as well."""
    text = to_toml(config)
    if made.text_rules is not None:
        text += f"[text]\nnormalize = {json.dumps(made.text_rules)}\n"
    if made.audio_edits is not None:
        text += "".join(["[audio]\n", *(f"{key} = {json.dumps(value)}\n" for key, value in made.audio_edits.items())])
    return text


def begin_run(written: str, config: TrainConfig, run_dir: Path, step: int, world: World, wandb_run: Any) -> Metrics:
    """What the first rank leaves in the run directory before it trains; `written`: its config.toml."""
    checkpoint_folders.set_aside(run_dir, step, config.train.best_by)
    if step > 0:
        checkpoint_folders.judge_again(run_dir, config.train.best_by)
    write_bytes(run_dir / "config.toml", written.encode())
    write_json(run_dir / "environment.json", environment(world))
    if wandb_run:
        wandb_run.config.update(
            redact_values(msgspec.to_builtins(config)), allow_val_change=True
        )  # what was "auto" is known now
    return Metrics(run_dir, step, wandb_run, config.train.tensorboard)


def environment(world: World) -> dict[str, str | int]:
    """What the run's figures depend on and its configuration does not say; of its latest start."""
    import peft
    import transformers

    on_gpu = world.device.type == "cuda"
    return {
        "command": redact(shlex.join(sys.argv)),
        "ranks": world.size,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.processor() or "cpu",
        "host": platform.node(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
