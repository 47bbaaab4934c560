"""A supervised pool of processes: one task at a time each, and no way to hang or to lose a task.

The standard pools fail here: `multiprocessing.Pool` can wait for ever when the system kills a worker, and
`ProcessPoolExecutor` loses every pending task. This one watches pipes and process sentinels together. A worker says
which row it begins, so when it is killed the row is known: the task is given to a new worker, and a row that kills
twice is skipped from then on (reason `worker_died`). A parent that is killed leaves no worker behind.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from preprocess.child_process import start_child
from shards.errors import DataError, PipelineError

MAX_DEATHS_PER_ROW = 2
MAX_DEATHS_BEFORE_A_ROW = 3  # while loading models: no row is to blame
MAX_POISONOUS_ROWS = 20  # more than this is not about rows: the machine is short of memory
# glibc keeps what it frees instead of mapping fresh pages for every large activation: a third of the codec's time on 10-s clips.
MALLOC_VARIABLES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Skip = dict[int, str]  # position in the task -> why it is skipped


class Task(Protocol):
    """What a worker runs: `run` reports each position before it begins it, and skips those in `skip`."""

    def run(self, task: int, skip: Skip, begins: Callable[[int], None]) -> Any: ...


Prepare = Callable[[Any], Task]


def usable_cores() -> int:
    """Cores this process may use; `os.cpu_count` counts those of other containers too."""
    return len(os.sched_getaffinity(0))


def run_tasks(
    tasks: list[int], num_workers: int, prepare: Prepare, setup: Any, on_row: Callable[[], None] | None = None
) -> Iterator[Any]:
    """Results of `prepare(setup).run(task, ...)` for every task, as they come; `on_row` is called as a row begins.

    `prepare` and `setup` travel to the workers. Raises the PipelineError a worker raised, or DataError when workers keep
    dying.
    """
    for variable in THREAD_VARIABLES:
        os.environ[variable] = "1"  # before the spawn: the libraries, torch too, read it when loaded
    for variable, value in MALLOC_VARIABLES.items():
        os.environ.setdefault(variable, value)  # and the C library reads these as a process starts
    pool = _Pool(prepare, setup, waiting=deque(tasks), on_row=on_row)
    try:
        while pool.waiting or pool.busy():
            pool.hand_out(min(num_workers, len(tasks)))
            yield from pool.collect()
    finally:
        pool.close()


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: int | None = None
    position: int | None = None  # the row it is at


@dataclass
class _Pool:
    prepare: Prepare
    setup: Any
    waiting: deque[int]
    workers: list[_Worker] = field(default_factory=list)
    deaths: Counter[tuple[int, int | None]] = field(default_factory=Counter)
    on_row: Callable[[], None] | None = None
    skip: defaultdict[int, Skip] = field(default_factory=lambda: defaultdict(dict))

    def busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.task is not None]

    def hand_out(self, num_workers: int) -> None:
        while self.waiting and len(self.workers) < num_workers:
            self.workers.append(_Worker(*start_child(_work, self.prepare, self.setup)))
        for worker in self.workers:
            if worker.task is None and self.waiting:
                worker.task, worker.position = self.waiting.popleft(), None
                try:
                    worker.pipe.send((worker.task, dict(self.skip[worker.task])))
                except (BrokenPipeError, ConnectionResetError):
                    continue  # it is dead; collect() finds the closed pipe

    def collect(self) -> Iterator[Any]:
        """Wait until something happens; yield finished results."""
        busy = self.busy()
        ready = wait([worker.pipe for worker in busy] + [worker.process.sentinel for worker in busy])
        for worker in busy:
            if worker.pipe not in ready and worker.process.sentinel not in ready:
                continue
            try:
                kind, value = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                self._bury(worker)
                continue
            if kind == "row":
                worker.position = value
                if self.on_row:
                    self.on_row()
            elif kind == "fault":
                raise value
            else:
                worker.task = None
                yield value

    def close(self) -> None:
        for worker in self.workers:
            worker.pipe.close()
            if worker.task is not None:
                worker.process.terminate()
            worker.process.join()

    def _bury(self, worker: _Worker) -> None:
        """Blame a death on the row it happened in, and give the task back. Raises DataError when no row is to blame."""
        self.workers.remove(worker)
        worker.process.join()
        worker.pipe.close()
        assert worker.task is not None
        code = worker.process.exitcode
        how = f"killed by signal {-code}" if code and code < 0 else f"ended with status {code}"
        self.deaths[worker.task, worker.position] += 1
        deaths = self.deaths[worker.task, worker.position]
        if worker.position is None and deaths >= MAX_DEATHS_BEFORE_A_ROW:
            raise DataError(
                f"shard {worker.task}: workers die before its first row ({how}); out of memory? use fewer --workers"
            )
        if worker.position is not None and deaths >= MAX_DEATHS_PER_ROW:
            self.skip[worker.task][worker.position] = f"its worker was {how}, {deaths} times"
        if sum(len(rows) for rows in self.skip.values()) > MAX_POISONOUS_ROWS:
            raise DataError(
                f"workers keep dying ({how}), last in shard {worker.task}: out of memory? run again with fewer --workers"
            )
        self.waiting.appendleft(worker.task)


def _work(pipe: Connection, prepare: Prepare, setup: Any) -> None:
    try:
        worker = prepare(setup)
        while True:
            task, skip = pipe.recv()
            pipe.send(("result", worker.run(task, skip, lambda position: pipe.send(("row", position)))))
    except (EOFError, BrokenPipeError):
        return  # the parent is done, or gone
    except PipelineError as error:
        pipe.send(("fault", error))
    except OSError as error:
        pipe.send(
            ("fault", DataError(f"{error.filename or 'OUT'}: {error.strerror}; the same command continues this job"))
        )
    except Exception as error:  # our own bug: reported with the place it happened
        pipe.send(("fault", RuntimeError(f"{error}\n{traceback.format_exc()}")))
