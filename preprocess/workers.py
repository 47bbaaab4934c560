"""A supervised pool of processes: one task at a time each, and no way to hang or to lose a task.

The standard pools fail here: `multiprocessing.Pool` can wait for ever when the system kills a worker, and
`ProcessPoolExecutor` loses every pending task. This one watches pipes and process sentinels together. A dead worker
costs its task a strike and is replaced; a task with two strikes ends the job with its name. Workers are spawned, not
forked (torch threads do not survive a fork), and end when their pipe closes, so a killed parent leaves none behind.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from shards.errors import DataError, PipelineError

MAX_STRIKES = 2
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: int | None = None


def usable_cores() -> int:
    """Cores this process may use; `os.cpu_count` counts those of other containers too."""
    return len(os.sched_getaffinity(0))


def run_tasks(tasks: list[int], num_workers: int, prepare: Callable[[Any], Any], setup: Any) -> Iterator[Any]:
    """Results of `prepare(setup).run(task)` for every task, as they come.

    `prepare` and `setup` travel to the workers. Raises the PipelineError a worker raised, or DataError for a task whose
    workers died.
    """
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, "1")  # before the spawn: the libraries read it when loaded
    waiting = deque(tasks)
    strikes: dict[int, int] = {}
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task is not None for worker in workers):
            while waiting and len(workers) < min(num_workers, len(tasks)):
                workers.append(_start(prepare, setup))
            for worker in workers:
                if worker.task is None and waiting:
                    worker.task = waiting.popleft()
                    _send(worker, worker.task)
            busy = [worker for worker in workers if worker.task is not None]
            ready = wait([worker.pipe for worker in busy] + [worker.process.sentinel for worker in busy])
            for worker in busy:
                if worker.pipe not in ready and worker.process.sentinel not in ready:
                    continue
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    workers.remove(worker)
                    waiting.appendleft(_strike(worker, strikes))
                    continue
                if kind == "fault":
                    raise value
                worker.task = None
                yield value
    finally:
        for worker in workers:
            worker.pipe.close()
            if worker.task is not None:
                worker.process.terminate()
            worker.process.join()


def _start(prepare: Callable[[Any], Any], setup: Any) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, prepare, setup), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _send(worker: _Worker, task: int) -> None:
    try:
        worker.pipe.send(task)
    except (BrokenPipeError, ConnectionResetError):
        return  # it is dead: the sentinel says so in the next round


def _strike(worker: _Worker, strikes: dict[int, int]) -> int:
    """Count a death against its task and return the task, or raise when it was the second."""
    worker.process.join()
    worker.pipe.close()
    task = worker.task
    assert task is not None
    strikes[task] = strikes.get(task, 0) + 1
    if strikes[task] >= MAX_STRIKES:
        code = worker.process.exitcode
        how = f"killed by signal {-code}" if code and code < 0 else f"exit status {code}"
        raise DataError(
            f"shard {task}: its worker died {MAX_STRIKES} times ({how}); out of memory? run again with fewer --workers"
        )
    return task


def _work(pipe: Connection, prepare: Callable[[Any], Any], setup: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        import torch

        torch.set_num_threads(1)
        worker = prepare(setup)
        while True:
            pipe.send(("result", worker.run(pipe.recv())))
    except (EOFError, BrokenPipeError):
        return  # the parent is done, or gone
    except PipelineError as error:
        pipe.send(("fault", error))
    except Exception as error:
        import traceback

        pipe.send(("fault", RuntimeError(f"{error}\n{traceback.format_exc()}")))
