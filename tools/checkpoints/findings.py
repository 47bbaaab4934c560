"""What `checkpoints validate` says of one check, of a checkpoint or of a model."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from safetensors import SafetensorError

from shards.errors import PipelineError
from shards.terminal import progress_bar

MAX_NAMED = 4  # tensors or groups named in one finding


class Finding(msgspec.Struct, frozen=True):
    check: str
    passed: bool
    detail: str


class Failed(Exception):
    """A check's reason."""


def all_checked(checks: list[tuple[str, Callable[[], str]]]) -> list[Finding]:
    """The finding of each check, with a bar on a terminal: a model of 3B takes a minute."""
    found = []
    with progress_bar("checking", len(checks)) as done:
        for name, check in checks:
            found.append(checked(name, check))
            done()
    return found


def checked(name: str, check: Callable[[], str]) -> Finding:
    """The finding of a check that returns what it saw or raises `Failed`; one that cannot be made has failed, too."""
    try:
        return Finding(name, True, check())
    except Failed as fault:
        return Finding(name, False, str(fault))
    except (PipelineError, OSError, SafetensorError) as error:
        return Finding(name, False, f"not checked: {str(error).splitlines()[0]}")


def some(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
