"""RUN belongs to one `train` at a time, also to several ranks, and a killed one does not keep it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from train_process import Started, run_train, train_command

LONG = ["train.max_steps=100000", "train.save_every=100000", "train.packs_per_step=2"]
LIMIT_S = 400


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_second_train_is_refused_unless_the_first_was_killed(
    short_data, tiny_dir, repository, tmp_path: Path, gpus: int
):
    run = tmp_path / "my run"
    first = Started(train_command(short_data, run, tiny_dir, gpus, *LONG), repository)
    first.wait_for("step 1/")
    locks = list(run.glob(".lock.*"))
    assert len(locks) == 1, "a launch of several ranks locks once"
    command = train_command(short_data, run, tiny_dir, gpus, *LONG)
    second = run_train(command, repository)
    assert second.returncode == 1
    (refusal,) = [
        line for line in second.stderr.splitlines() if line.startswith("error: ") and "another process" in line
    ]
    assert re.search(r"host \S+, pid \d+, .*train", refusal)
    assert "Traceback" not in second.stderr
    assert list(run.glob(".lock.*")) == locks
    first.kill_all()
    third = Started(train_command(short_data, run, tiny_dir, gpus, *LONG[1:], "train.max_steps=1"), repository)
    status, messages = third.end(LIMIT_S)
    assert status == 0, messages
    assert not list(run.glob(".lock.*"))


@pytest.mark.parametrize("kind", ["file", "below a file", "read-only"])
def test_a_run_that_cannot_be_is_one_line(run_command, short_data, tiny_dir, tmp_path: Path, kind: str):
    run = tmp_path / "run"
    if kind == "read-only":
        run = Path("/proc/run")  # refuses every user, also the root that tests may run as
    else:
        run.write_text("mine")
        run = run / "x" if kind == "below a file" else run
    done = run_command("train", short_data, run, "--config", tiny_dir / "pipeline.toml")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: RUN /")
