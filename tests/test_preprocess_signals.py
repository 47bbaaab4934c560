"""Stage one under signals: SIGTERM and Ctrl-C end it at once with one line, and nothing it started outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A job whose worker never finishes a row, and a codec process beside it.
JOB = """
import os, sys, time
from pathlib import Path
from preprocess.codec_server import CodecServers
from preprocess.workers import run_tasks
from shards.terminal import ends_on_signals, explained

class Stuck:
    def __init__(self, setup): pass
    def run(self, task, skip, begins):
        begins(0)
        Path(sys.argv[2], f"worker-{os.getpid()}").touch()
        time.sleep(600)

if __name__ == "__main__":
    with explained("the same command continues this job"), ends_on_signals():
        servers = CodecServers(sys.argv[1], ["cpu"])
        try:
            list(run_tasks([0, 1], 2, Stuck, None))
        finally:
            servers.close()
"""


def processes_of(script: Path) -> list[int]:
    """All that have the script's session, the job itself too."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if f"JOB_OF={script}".encode() in environment and state != "Z":
            found.append(int(entry.name))
    return found


def wait_for(holds, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def running(tiny_dir, repository, tmp_path):
    """(process, script): a job of two workers and a codec process, all at work, in a process group of its own."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    process = subprocess.Popen(
        [sys.executable, script, tiny_dir / "codec", tmp_path],
        env={**os.environ, "PYTHONPATH": str(repository), "JOB_OF": str(script)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(list(tmp_path.glob("worker-*"))) == 2)
    yield process, script
    for pid in processes_of(script):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("number", "whole_group", "status", "line"),
    [
        (signal.SIGTERM, False, 143, "stopped by SIGTERM; the same command continues this job\n"),
        (signal.SIGINT, True, 130, "interrupted; the same command continues this job\n"),
    ],
    ids=["term", "ctrl-c"],
)
def test_a_signal_ends_a_job_at_once_with_one_line(running, number, whole_group, status, line):
    process, script = running
    assert len(processes_of(script)) >= 4  # the job, two workers, the codec
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (status, line)
    wait_for(lambda: not processes_of(script), 10)


def test_nothing_outlives_a_job_that_is_killed(running):
    process, script = running
    assert len(processes_of(script)) >= 4
    process.kill()
    process.wait()
    wait_for(lambda: not processes_of(script), 30)


@pytest.mark.parametrize("start_up_s", [0.3, 1.0])
def test_ctrl_c_while_it_starts_gives_no_traceback(arabic_mini, tiny_dir, repository, tmp_path, start_up_s):
    """At whatever moment: imports of the parent, of its workers, or later."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from preprocess.cli import main; print('up', flush=True); main()"]
        + [str(part) for part in ("run", arabic_mini, tmp_path / "out", "--config", tiny_dir / "pipeline.toml")],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(start_up_s)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted; the same command continues this job" in errors


def test_a_stopped_command_goes_on_to_the_same_end(arabic_mini, tiny_dir, run_command, repository, tmp_path):
    arguments = (arabic_mini, tmp_path / "out", "--config", tiny_dir / "pipeline.toml", "--limit", 6, "--json")
    command = [sys.executable, "-m", "preprocess.cli", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "out" / "job.json").is_file())
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    finished = run_command("preprocess", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["num_samples"] == 6
