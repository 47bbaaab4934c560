"""Which checkpoint is read, and whether it is one: the same questions before every operation.

In: a checkpoint folder, RUN/best, or RUN. Out: a folder that stays the same one while it is read, or a CheckpointError with the
reason. A RUN whose `train` is still alive may be read: its checkpoints have their names when they are complete, and lose them
before they are removed. That it is alive is said, because what is best or newest may be another one a minute later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shards.errors import CheckpointError
from shards.folder_lock import living_holder
from shards.terminal import print_line
from train.run_folder.checkpoint_folders import damage
from train.run_folder.state import TENSORS

SEALED = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "config.toml", "identity.json", TENSORS)


def faults_of(folder: Path) -> list[str]:
    """What differs from COMPLETE, and what COMPLETE must name and does not; nothing for a sound checkpoint."""
    if faults := damage(folder):
        return faults
    named = msgspec.json.decode((folder / "COMPLETE").read_bytes(), type=dict[str, str])
    return [
        f"COMPLETE does not name {name}, "
        + ("so nothing says whether it is what was written" if (folder / name).is_file() else "which is missing")
        for name in SEALED
        if name not in named
    ]


def require_sound(folder: Path) -> None:
    """Raises CheckpointError with the first fault, also where the folder went away meanwhile."""
    with still_there(folder):
        if faults := faults_of(folder):
            raise CheckpointError(f"{folder}: damaged: {faults[0]}; give a sound checkpoint (`checkpoints list`)")


@contextmanager
def still_there(folder: Path) -> Iterator[None]:
    """What fails inside because the folder went away meanwhile is said to be that."""
    try:
        yield
    except (CheckpointError, FileNotFoundError):
        if folder.is_dir():
            raise
        raise gone(folder) from None


def gone(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder}: removed while it was read: a run keeps its newest and its best (train.keep_checkpoints); call again, or "
        "copy the checkpoint first"
    )


def pinned(folder: Path) -> Path:
    """The folder that a link like RUN/best leads to: a live run may point the link elsewhere while it is read."""
    while folder.is_symlink():
        folder = folder.parent / folder.readlink()
    return folder


def say_if_written(run: Path | None) -> None:
    """A line on stderr where a `train` works in RUN now."""
    holder = living_holder(run) if run else None
    if holder:
        print_line(f"note: {run}: is still being written ({holder}); only its complete checkpoints are read")
