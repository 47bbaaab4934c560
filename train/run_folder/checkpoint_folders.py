"""Checkpoint folders of a run: which are complete, undamaged, and the best; which are removed.

In: RUN, or one folder of it as `checkpoint.py` writes them. Out: paths and facts. The step stands in the checkpoint, since
people copy and rename folders. What a run does by itself (go on, remove the oldest) it does with folders named
checkpoint-NUMBER only: one with another name was set apart by somebody, and is taken when it is named. The price: who
renames the newest must say --resume PATH.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from shards.config import parse_toml
from shards.errors import CheckpointError

if TYPE_CHECKING:
    from train.world import World

log = logging.getLogger("train")
STATE_FORMAT = 2  # 1 was torch's distributed format, with a pickle in it
STATE = "state/state.json"
AUDIO_LOSS = "audio_loss"
IN_WORDS = {
    AUDIO_LOSS: "held-out audio loss",
    "similarity": "similarity of the listening set",
    "cer": "character error rate of the listening set",
}  # by train.best_by, whose metric is eval/ and that
MORE_IS_BETTER = frozenset({"similarity"})
OWN_NAME = re.compile(r"checkpoint-[0-9]+")
HIDDEN = (".", "aside-")  # being written or removed, or moved away by a run
REMOVED = ".removed"


class State(msgspec.Struct, frozen=True, kw_only=True):
    """state.json."""

    format: int
    step: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]  # finished ones


def newest_sound(run_dir: Path, world: World) -> Path | None:
    """The newest checkpoint whose files are what COMPLETE says; damaged ones are logged and skipped."""
    found: Path | None = None
    problem = ""
    if world.is_first:
        try:
            found = newest_sound_here(run_dir)
        except CheckpointError as error:
            problem = str(error)
    found, problem = world.gather((found, problem))[0]
    if problem:
        raise CheckpointError(problem)
    return found


def newest_sound_here(run_dir: Path) -> Path | None:
    """Raises CheckpointError where a run would begin anew although somebody kept a checkpoint of it."""
    for folder in reversed(resumable_checkpoints(run_dir)):
        faults = damage(folder)
        if not faults:
            return folder
        log.warning("%s: skipped: %s; going on from the one before it", folder, faults[0])
    others = [folder for folder in checkpoint_folders(run_dir) if not OWN_NAME.fullmatch(folder.name)]
    if others:
        raise CheckpointError(
            f"{run_dir}: holds no sound checkpoint-NUMBER, but {', '.join(folder.name for folder in others[:4])}: go on "
            f"with --resume {shlex.quote(str(others[-1]))}, or give a new RUN folder to begin anew"
        )
    return None


def resumable_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints named checkpoint-NUMBER, lowest step first; those that are left alone are logged.

    A checkpoint whose step cannot be read comes last, so that it is the first to be logged as damaged.
    """
    steps: dict[Path, float] = {}
    for folder in checkpoint_folders(run_dir):
        try:
            step = read_step(folder)
        except CheckpointError as error:
            if not folder.is_dir():  # its run removed it meanwhile
                continue
            if OWN_NAME.fullmatch(folder.name) and not damage(
                folder
            ):  # as it was written: of an older version, which must not be begun anew in silence
                raise
            log.warning("%s", error)
            step = math.inf
        if OWN_NAME.fullmatch(folder.name):
            steps[folder] = step
        else:
            log.warning(
                "%s: step %s under another name: left alone; --resume %s goes on from it",
                folder,
                step,
                shlex.quote(str(folder)),
            )
    return sorted(steps, key=lambda folder: steps[folder])


def damage(folder: Path) -> list[str]:
    """What differs from COMPLETE; nothing for a sound checkpoint."""
    try:
        wanted = msgspec.json.decode((folder / "COMPLETE").read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError, RecursionError) as error:
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


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Every folder with a COMPLETE in RUN/checkpoints, whatever its name, by name."""
    marks = sorted((run_dir / "checkpoints").glob("*/COMPLETE"))
    return [path.parent for path in marks if not path.parent.name.startswith(HIDDEN)]


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoint folders of any name, lowest step first; one whose step cannot be read is logged."""
    steps: dict[Path, int] = {}
    for folder in checkpoint_folders(run_dir):
        try:
            steps[folder] = read_step(folder)
        except CheckpointError as error:
            if folder.is_dir():  # else its run removed it meanwhile
                log.warning("skipped: %s", error)
    return sorted(steps, key=lambda folder: (steps[folder], is_own(folder, steps[folder])))


def own_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints under the name that the run gave them, lowest step first: what it may remove."""
    return [folder for folder in complete_checkpoints(run_dir) if is_own(folder, read_step(folder))]


def remove_old(run_dir: Path, keep: int) -> None:
    """Remove the oldest checkpoints so that the newest `keep` and the best are left; those a person renamed are left too.

    Each loses its name first: whoever lists or merges beside the run never finds half of one.
    """
    for left in (run_dir / "checkpoints").glob(f".*{REMOVED}"):  # by a run that was killed while it removed
        shutil.rmtree(left)
    for old in own_checkpoints(run_dir)[:-keep]:
        if old != best_checkpoint(run_dir):
            leaving = old.with_name(f".{old.name}{REMOVED}")
            old.rename(leaving)
            shutil.rmtree(leaving)


def is_own(folder: Path, step: int) -> bool:
    return folder.name == f"checkpoint-{step}" and not folder.is_symlink()


def read_step(folder: Path) -> int:
    """Finished steps of the checkpoint in `folder`, whatever its name. Raises CheckpointError."""
    if (folder / "state" / ".metadata").exists():
        raise CheckpointError(
            f"{folder}: its state is a pickle of an older version, which may run code when it is read: it is not read; "
            "train anew, or go on with the version that wrote it"
        )
    try:
        state = msgspec.json.decode((folder / STATE).read_bytes(), type=State)
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint of `train`: {STATE} is unreadable: {error}") from None
    if state.format != STATE_FORMAT:
        raise CheckpointError(f"{folder}: {STATE} has format {state.format}, this version reads {STATE_FORMAT}")
    return state.step


def move_away(folder: Path) -> Path:
    """Rename a checkpoint so that it is no longer one of the run's; returns its new place."""
    aside = folder.with_name(f"aside-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def set_aside(run_dir: Path, step: int, best_by: str = AUDIO_LOSS) -> None:
    """Rename checkpoints of later steps than the one a run goes on from: damaged ones, or those it was asked to leave.

    Under their own name they would count as the newest, and the ones this run writes would be removed as old.
    """
    named = [folder for folder in checkpoint_folders(run_dir) if OWN_NAME.fullmatch(folder.name)]
    later = [folder for folder in named if is_later(folder, step)]
    for folder in later:
        aside = move_away(folder)
        log.warning("%s: later than step %d, from which this run goes on; renamed to %s", folder, step, aside.name)
    if best_checkpoint(run_dir) in later:
        (run_dir / "best").unlink()
        for folder in complete_checkpoints(run_dir):
            mark_best(run_dir, folder, read_metrics(folder), best_by)


def is_later(folder: Path, step: int) -> bool:
    """One whose step cannot be read is: it was skipped."""
    try:
        return read_step(folder) > step
    except CheckpointError:
        return True


def read_metrics(folder: Path) -> dict[str, Any]:
    """The last logged metrics of a checkpoint; none where the file is unreadable, which is logged."""
    try:
        return msgspec.json.decode((folder / "metrics.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        log.warning("%s/metrics.json: unreadable: %s", folder, error)
        return {}


def judged(metrics: dict[str, Any], best_by: str = AUDIO_LOSS) -> float | None:
    """What checkpoints are judged by, the held-out audio loss if nothing else; None where there is no finite one."""
    value = metrics.get(f"eval/{best_by}")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def judged_by(folder: Path) -> str:
    """train.best_by of the run that wrote a checkpoint; the audio loss where its configuration does not say."""
    try:
        config = parse_toml((folder / "config.toml").read_text(encoding="utf-8"))
        found = config["train"]["best_by"]
    except (OSError, ValueError, KeyError, TypeError):
        return AUDIO_LOSS
    return found if found in IN_WORDS else AUDIO_LOSS


def why_best(folder: Path) -> str:
    """What makes the best checkpoint the best, in words."""
    best_by = judged_by(folder)
    value = judged(read_metrics(folder), best_by)
    return f"{IN_WORDS[best_by]} {'unknown' if value is None else format(value, '.4f')}"


def best_checkpoint(run_dir: Path) -> Path | None:
    """Where RUN/best points, if anywhere; the folder itself where a copy made one of the link."""
    link = run_dir / "best"
    if link.is_symlink():
        return run_dir / link.readlink()
    return link if link.is_dir() else None


def mark_best(run_dir: Path, folder: Path, metrics: dict[str, float], best_by: str = AUDIO_LOSS) -> None:
    """Let RUN/best point at `folder` if it is judged better than the checkpoint that is best now."""
    best = best_checkpoint(run_dir)
    value = judged(metrics, best_by)
    if value is None:
        return
    if best is not None and best.is_dir():
        before = judged(read_metrics(best), best_by)
        if before is not None and (value <= before if best_by in MORE_IS_BETTER else value >= before):
            return
    if os.path.lexists(run_dir / "best") and not (run_dir / "best").is_symlink():
        log.warning("%s/best: no link but somebody's own: left alone; the best checkpoint is %s", run_dir, folder.name)
        return
    link = run_dir / ".best.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(run_dir))
    link.replace(run_dir / "best")


def judge_again(run_dir: Path, best_by: str) -> None:
    """RUN/best among the checkpoints that are there, where a run goes on with another train.best_by than its best had.

    Where none has been judged by it, the old best stays until one is.
    """
    best = best_checkpoint(run_dir)
    if best is None or judged_by(best) == best_by:
        return
    for folder in complete_checkpoints(run_dir):
        mark_best(run_dir, folder, read_metrics(folder), best_by)
