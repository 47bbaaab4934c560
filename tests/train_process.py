"""The real `train` command as a process that a test can wait for, interrupt and kill, and what its run says afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from warm_start import WarmProcess, run_warm

STEPS = 5
TRAIN = "import sys; sys.argv[0] = 'train'; from train.cli import main; main()"


def train_arguments(dataset: Path, run: Path | str, tiny_dir: Path, *settings: str) -> list[str]:
    """Arguments of a small run of five steps of four packs on the CPU."""
    quick = ["train.device=cpu", "train.batch_tokens=800", "train.packs_per_step=4", f"train.max_steps={STEPS}"]
    quick += ["train.log_every=1", "train.num_workers=0", "lora.rank=4", "train.learning_rate=1e-3"]
    quick += ["train.listening_samples=0"]
    options = [part for setting in [*quick, *settings] for part in ("--set", setting)]
    return [*map(str, (dataset, run)), "--config", str(tiny_dir / "pipeline.toml"), *options]


def train_command(dataset: Path, run: Path, tiny_dir: Path, gpus: int, *settings: str) -> list[str]:
    return [sys.executable, "-c", TRAIN, *train_arguments(dataset, run, tiny_dir, *settings), "--gpus", str(gpus)]


def run_train(command: list[str], repository: Path) -> subprocess.CompletedProcess[str]:
    """A `train_command` to its end, in a fork that has imported everything."""
    return run_warm("train", arguments_of(command), environment(repository))


def arguments_of(command: list[str]) -> list[str]:
    assert command[:3] == [sys.executable, "-c", TRAIN]
    return command[3:]


def environment(repository: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}


class Started:
    """A command as a process group of its own, to be interrupted; an unchanged `train_command` is a fork (warm_start)."""

    def __init__(self, command: list[str], repository: Path, cwd: Path | None = None) -> None:
        self.process: subprocess.Popen[str] | WarmProcess
        if command[:3] == [sys.executable, "-c", TRAIN]:
            self.process = WarmProcess("train", command[3:], environment(repository), cwd or repository)
            return
        self.process = subprocess.Popen(
            command,
            cwd=cwd or repository,
            env=environment(repository),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, text: str) -> str:
        """Read its messages until `text` appears."""
        assert self.process.stderr
        seen = ""
        for line in self.process.stderr:
            seen += line
            if text in line:
                return seen
        raise AssertionError(f"{text!r} never came: {seen}")

    def end(self, limit_s: float) -> tuple[int, str]:
        """(status, remaining messages); a process that hangs beyond the limit is a failure."""
        try:
            _, messages = self.process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"still running {limit_s} s later") from None
        return self.process.wait(), messages

    def kill_all(self) -> None:
        """SIGKILL; the ranks are in sessions of their own, and must die with their launcher by themselves."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def workers(self) -> list[int]:
        """Process ids of the ranks, in no order."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        started = ("-m\0train", "warm_start.py")
        return [int(c) for c in children if any(how in Path(f"/proc/{c}/cmdline").read_text() for how in started)]


def history(run: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss/total_loss"], line["metrics/grad_norm"]) for line in lines]


def same_history(found: Path, expected: list[tuple[float, float]]) -> None:
    """Every step exactly once, with the same loss and gradient norm to five decimals."""
    assert len(history(found)) == len(expected)
    np.testing.assert_allclose(history(found), expected, rtol=0, atol=1e-5)
