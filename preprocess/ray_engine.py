"""`--engine ray`: the same shard tasks on Ray core, on this machine or a cluster that shares the file system.

Shards are idempotent, so a lost node or worker only repeats its shards. What Ray gives up on after its retries is made by
the supervised local pool, which finds the row that kills its worker and skips it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preprocess.workers import MALLOC_VARIABLES, Prepare, run_tasks
from shards.errors import ConfigError, PipelineError

MAX_RETRIES = 3


def run_tasks_on_ray(tasks: list[int], prepare: Prepare, setup: Any, address: str | None) -> Iterator[Any]:
    """Results of `prepare(setup).run(task, ...)`, as they come; one core per task. Raises PipelineError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError("--engine ray needs the extra: pip install -e '.[ray]'") from None

    started_here = not ray.is_initialized()
    if started_here:
        paths = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
        environment = {"env_vars": {"PYTHONPATH": paths.strip(os.pathsep), "OMP_NUM_THREADS": "1", **MALLOC_VARIABLES}}
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, runtime_env=environment)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--ray-address {address}: {str(error).splitlines()[0]}") from None
    try:
        lost: list[int] = []
        yield from _collect(ray, tasks, prepare, setup, lost)
        yield from run_tasks(lost, 1, prepare, setup)
    finally:
        if started_here:
            ray.shutdown()


def _collect(ray: Any, tasks: list[int], prepare: Prepare, setup: Any, lost: list[int]) -> Iterator[Any]:
    remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_run)
    # The working folder decides relative audio paths, so it travels with the task.
    pending = {remote.remote(prepare, setup, task, str(Path.cwd())): task for task in tasks}
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1)
        task = pending.pop(ready[0])
        try:
            result = ray.get(ready[0])
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError):
            lost.append(task)
            continue
        if isinstance(result, PipelineError):
            raise result
        yield result


def _run(prepare: Prepare, setup: Any, task: int, folder: str) -> Any:
    os.chdir(folder)
    try:
        return _prepared(prepare, setup).run(task, {}, lambda position: None)
    except PipelineError as error:
        return error


@functools.lru_cache(maxsize=1)
def _prepared_once(prepare: Prepare, setup_bytes: bytes) -> Any:
    import pickle

    return prepare(pickle.loads(setup_bytes))


def _prepared(prepare: Prepare, setup: Any) -> Any:
    """One loaded codec per Ray worker process, whatever number of shards it makes."""
    import pickle

    return _prepared_once(prepare, pickle.dumps(setup))
