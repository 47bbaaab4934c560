"""The pool: no task is lost, no kill hangs it, and a row that kills its worker is found and rejected."""

from __future__ import annotations

import platform

import pytest
from poison_task import Memory, Poison

from preprocess.workers import MALLOC_VARIABLES, run_tasks, usable_cores
from shards.errors import DataError


@pytest.fixture
def poison():
    return Poison


def results(poison, setup: dict, num_tasks: int = 4) -> dict:
    return {task: (rows, skip) for task, rows, skip in run_tasks(list(range(num_tasks)), 2, poison, setup)}


def test_every_task_is_done_once(poison):
    assert results(poison, {}) == {task: (list(range(10)), {}) for task in range(4)}
    assert usable_cores() >= 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_workers_keep_the_memory_that_they_free(monkeypatch):
    """What costs a third of the codec's time otherwise: without the settings these are 16,384 pages of 4 kB."""
    for variable in MALLOC_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    (faults,) = run_tasks([0], 1, Memory, None)
    assert faults < 1000


def test_a_worker_killed_once_costs_nothing(poison, tmp_path):
    assert results(poison, {(1, 4): f"once:{tmp_path / 'struck'}"}) == {
        task: (list(range(10)), {}) for task in range(4)
    }
    assert (tmp_path / "struck").exists()


def test_a_row_that_kills_its_worker_is_skipped(poison):
    found = results(poison, {(2, 7): "kill", (2, 3): "kill"})
    assert found.pop(2) == (
        [0, 1, 2, 4, 5, 6, 8, 9],
        {3: "its worker was killed by signal 9, 2 times", 7: "its worker was killed by signal 9, 2 times"},
    )
    assert found == {task: (list(range(10)), {}) for task in (0, 1, 3)}


def test_workers_that_die_while_loading_end_the_job(poison):
    with pytest.raises(DataError, match=r"workers die before its first row \(killed by signal 9\)"):
        results(poison, {"load": "die"}, num_tasks=1)


def test_workers_that_keep_dying_end_the_job(poison):
    setup = {(task, row): "kill" for task in range(4) for row in range(10)}
    with pytest.raises(DataError, match=r"workers keep dying .*--workers"):
        results(poison, setup)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("fault", DataError, "said in one line"),
        ("full", DataError, "shard-000001.tar: No space left on device; the same command continues this job"),
        ("bug", RuntimeError, "KeyError: 'ours'"),
    ],
)
def test_what_a_worker_raises_is_reported(poison, what, error, message):
    with pytest.raises(error) as raised:
        results(poison, {(0, 5): what})
    assert message in str(raised.value)
