"""How stage one starts its processes: spawned, deaf to Ctrl-C, at the other end of a pipe, never outliving the parent.

Spawned, because torch's threads do not survive a fork. A terminal sends Ctrl-C to every process at once; only the parent
answers it, so SIGINT is blocked from the child's first instruction on: a handler set by the child's own code would come
after seconds of imports, each a traceback if Ctrl-C falls into it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from shards.parent_death import die_with_parent


def start_child(target: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    """`target(pipe, *arguments)` in a process of its own; returns the process and our end of the pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(target, theirs, *arguments), daemon=True)
    resource_tracker.ensure_running()  # starting it later would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return process, ours


def _run(target: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    die_with_parent()
    target(pipe, *arguments)
