"""Tasks for the pool's tests, in a module of their own because spawned workers must import them."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable

import numpy as np

from preprocess.workers import Skip
from shards.errors import DataError


class Memory:
    """Counts the pages that the kernel must give for 64 MB that have been freed once."""

    def __init__(self, setup: None) -> None:
        self._setup = setup

    def run(self, task: int, skip: Skip, begins: Callable[[int], None]) -> int:
        def faults() -> int:
            np.ones(64 << 20, np.uint8)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        return -faults() + faults()


class Poison:
    """Ten rows per task. `setup` says what happens: {(task, row): signal or exception or "once:<path>"}."""

    def __init__(self, setup: dict) -> None:
        self._setup = setup
        if setup.get("load") == "die":
            os.kill(os.getpid(), signal.SIGKILL)

    def run(self, task: int, skip: Skip, begins: Callable[[int], None]) -> tuple[int, list[int], Skip]:
        done = []
        for row in range(10):
            if row in skip:
                continue
            begins(row)
            self._strike(self._setup.get((task, row)))
            done.append(row)
        return task, done, skip

    def _strike(self, what: object) -> None:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "fault":
            raise DataError("said in one line")
        elif what == "full":
            raise OSError(28, "No space left on device", "shard-000001.tar")
        elif what == "bug":
            raise KeyError("ours")
        elif isinstance(what, str) and what.startswith("once:"):
            path = what.removeprefix("once:")
            if not os.path.exists(path):  # noqa: PTH110
                open(path, "w").close()  # noqa: PTH123
                os.kill(os.getpid(), signal.SIGKILL)
