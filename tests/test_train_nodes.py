"""Several nodes under torchrun: two launchers on this machine that meet at an address, each with ranks of its own.

What the README says to type on each node, on CPU over gloo. Only its launcher makes a node here.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from train_process import Started, history, same_history, train_arguments

from train.config import TrainConfig
from train.loop import RunOptions, train
from train.world import ALONE, World

STEPS = 10
LONG = [f"train.max_steps={STEPS}", "train.save_every=2"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_dataset, make_sample) -> Path:
    rng = np.random.default_rng(1)
    samples = [make_sample(seed, *rng.integers(3, 30, 2).tolist()) for seed in range(40)]
    return make_dataset(tmp_path_factory.mktemp("dataset"), samples)


@pytest.fixture(scope="module")
def alone(dataset, tiny_dir, tmp_path_factory) -> list[tuple[float, float]]:
    """Losses and norms of one process without interruption."""
    from shards.config import read_config

    run = tmp_path_factory.mktemp("alone")
    arguments = train_arguments(dataset, run, tiny_dir, *LONG)
    settings = arguments[arguments.index("--set") + 1 :: 2]
    train(read_config(TrainConfig, tiny_dir / "pipeline.toml", settings), dataset, run, RunOptions())
    return history(run)


@pytest.fixture
def start_nodes(dataset, tiny_dir, repository):
    """A function (run, ranks per node, its folder) -> the launchers of two nodes."""
    started: list[Started] = []

    def begin(run: Path | str, ranks: int, *options: str, folders: tuple[Path, Path] | None = None) -> list[Started]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(ranks)]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", *options]
        command = [*torchrun, "-m", "train", *train_arguments(dataset, run, tiny_dir, *LONG), "--skip-preflight"]
        for folder in folders or (repository, repository):
            started.append(Started(command, repository, folder))
            wait_for_listener(port)  # the first launcher is the one that they meet at
        return started[-2:]

    yield begin
    for node in started:
        if node.process.poll() is None:
            node.kill_all()


def wait_for_listener(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            with socket.create_connection(("localhost", port), timeout=1):
                return
        except OSError:
            assert time.monotonic() < end, "the launcher never came"
            time.sleep(0.1)


def wait_for_steps(run: Path, steps: int, nodes: list[Started]) -> None:
    """Until the run has logged so many steps; which node's console shows them is not known beforehand."""
    end = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < steps:
        assert time.monotonic() < end, "the steps never came"
        assert all(node.process.poll() is None for node in nodes), [node.end(1) for node in nodes]
        time.sleep(0.1)


@pytest.mark.slow
def test_two_nodes_train_as_one_process_and_end_together(start_nodes, alone, tmp_path):
    run = tmp_path / "run"
    nodes = start_nodes(run, 2)
    wait_for_steps(run, 5, nodes)
    assert [len(node.workers()) for node in nodes] == [2, 2]
    nodes[1].kill_all()
    status, messages = nodes[0].end(limit_s=120)
    assert status == 1
    assert "[rank" not in messages, "a rank's own traceback; the launcher may have one of its own"
    assert "another rank has ended or has been silent for too long" in messages
    assert "start the same command again to go on from the last checkpoint" in messages
    assert 5 <= len(history(run)) < STEPS

    ended = [node.end(limit_s=240) for node in start_nodes(run, 1)]
    assert [status for status, _ in ended] == [0, 0], ended
    assert any("2 ranks on cpu" in messages for _, messages in ended)
    same_history(run, alone)


def test_only_what_a_collective_says_is_taken_for_a_lost_rank():
    world = World(1, 2, torch.device("cpu"), is_distributed=True)
    closed = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    for error in (closed, dist.DistBackendError("NCCL error: remote process exited or there was a network error")):
        assert "rank 1 of 2: another rank has ended" in str(world.lost(error))
    assert world.lost(RuntimeError("shapes cannot be multiplied")) is None
    assert ALONE.lost(closed) is None


@pytest.mark.slow
def test_a_run_folder_on_each_nodes_own_disk_is_refused(start_nodes, tmp_path):
    folders = tmp_path / "node-0", tmp_path / "node-1"
    for folder in folders:
        folder.mkdir()
    ended = [node.end(limit_s=120) for node in start_nodes("run", 1, folders=folders)]
    assert [status for status, _ in ended] == [1, 1]
    lines = [line for _, messages in ended for line in messages.splitlines() if line.startswith("error")]
    assert lines  # at least by rank 0: the other launcher may end its rank meanwhile
    assert all("run: rank 1 on " in line and "RUN must be one folder for all ranks" in line for line in lines)
    assert not list(tmp_path.glob("node-*/run/.seen*"))
    assert not list(tmp_path.glob("node-*/run/checkpoints"))


@pytest.mark.slow
def test_a_signal_to_one_nodes_launcher_saves_on_all(start_nodes, alone, tmp_path):
    """As the README says: torchrun passes USR1 on if asked to. Slurm sends it to every node; one must be enough."""
    run = tmp_path / "run"
    nodes = start_nodes(run, 1, "--signals-to-handle", "SIGTERM,SIGUSR1")
    wait_for_steps(run, 3, nodes)
    nodes[0].process.send_signal(signal.SIGUSR1)
    ended = [node.end(limit_s=120) for node in nodes]
    assert any("stopped by a signal after step" in messages for _, messages in ended), ended
    newest = max(int(path.parent.name.removeprefix("checkpoint-")) for path in run.glob("checkpoints/*/COMPLETE"))
    assert newest == len(history(run))
