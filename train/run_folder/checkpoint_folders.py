"""Checkpoint folders of a run: which are complete, undamaged, the best, and of this very run.

In: RUN, or one folder of it as `checkpoint.py` writes them. Out: paths and facts; nothing of torch is needed to look.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shards.errors import CheckpointError
from shards.manifest import read_record

if TYPE_CHECKING:
    from train.world import World

log = logging.getLogger("train")
JUDGED_BY = "eval/audio_loss"


def newest_sound(run_dir: Path, world: World) -> Path | None:
    """The newest checkpoint whose files are what COMPLETE says; damaged ones are logged and skipped."""
    found: Path | None = None
    if world.is_first:
        for folder in reversed(complete_checkpoints(run_dir)):
            faults = damage(folder)
            if not faults:
                found = folder
                break
            log.warning("%s: skipped: %s; going on from the one before it", folder, faults[0])
    return world.gather(found)[0]


def damage(folder: Path) -> list[str]:
    """What differs from COMPLETE; nothing for a sound checkpoint."""
    try:
        wanted = msgspec.json.decode((folder / "COMPLETE").read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError) as error:
        return [f"COMPLETE is unreadable: {error}"]
    found = digests(folder)
    return [
        f"{name} {'is missing' if name not in found else 'is not what was written'}"
        for name in wanted
        if wanted[name] != found.get(name)
    ]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a checkpoint but COMPLETE, by path inside it."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "COMPLETE":
            with path.open("rb") as file:
                sums[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    folders = [path.parent for path in (run_dir / "checkpoints").glob("checkpoint-*/COMPLETE")]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def set_aside(run_dir: Path, step: int) -> None:
    """Rename checkpoints of later steps than the one a run goes on from: damaged ones, or those it was told to leave.

    Under their own name they would count as the newest, and the ones this run writes would be removed as old.
    """
    later = [folder for folder in complete_checkpoints(run_dir) if step_of(folder) > step]
    for folder in later:
        aside = folder.with_name(f"aside-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        log.warning("%s: later than step %d, from which this run goes on; renamed to %s", folder, step, aside.name)
    if best_checkpoint(run_dir) in later:
        (run_dir / "best").unlink()
        for folder in complete_checkpoints(run_dir):
            mark_best(run_dir, folder, msgspec.json.decode((folder / "metrics.json").read_bytes()))


def best_checkpoint(run_dir: Path) -> Path | None:
    """Where RUN/best points, if anywhere."""
    link = run_dir / "best"
    return run_dir / link.readlink() if link.is_symlink() else None


def mark_best(run_dir: Path, folder: Path, metrics: dict[str, float]) -> None:
    """Let RUN/best point at `folder` if its held-out audio loss is the lowest of all checkpoints that had one."""
    best = best_checkpoint(run_dir)
    if JUDGED_BY not in metrics:
        return
    if best is not None and best.is_dir():
        lowest = msgspec.json.decode((best / "metrics.json").read_bytes()).get(JUDGED_BY, float("inf"))
        if metrics[JUDGED_BY] >= lowest:
            return
    link = run_dir / ".best.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(run_dir))
    link.replace(run_dir / "best")


# --- whose checkpoint -----------------------------------------------------------------------------------------------


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal for a run to go on: another value means another run."""

    dataset_digest: str
    model_base: str
    model_weights: str = ""  # their fingerprint; "" in checkpoints written before it was kept
    lora: dict[str, Any]
    seed: int
    batch_tokens: int
    packs_per_step: int
    max_supervised_tokens: int
    max_references: int
    shuffle_window: int
    order: str
    plan_version: int
    loader: str
    validation_fraction: float
    layout: str
    conditioning: str = "codes"


def read_identity(folder: Path) -> Identity:
    """What a checkpoint's run is made of. Raises ShardError when the file is not readable."""
    return read_record(folder / "identity.json", Identity)


def check_identity(folder: Path, now: Identity) -> None:
    """Raises CheckpointError naming both values where a checkpoint's run is another one than this."""
    before, after = msgspec.to_builtins(read_identity(folder)), msgspec.to_builtins(now)
    differing = [
        f"{name} was {before[name]!r}, is {after[name]!r}" for name in before if before[name] not in ("", after[name])
    ]
    if differing:
        raise CheckpointError(
            f"{folder}: belongs to another run: {'; '.join(differing)}; restore those settings or give a new RUN folder"
        )
