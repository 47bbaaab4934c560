"""Waits for data that never come: a full /dev/shm, a stream without a usable sample, a loader process that hangs or dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_process import TRAIN, Started, environment, train_arguments, train_command

from shards.errors import PipelineError, ShardError
from train.data.loader_processes import dead_loader
from train.data.stages import BuiltSample
from train.data.streamed_source import Passes, StreamedSource
from train.loop import RunOptions, train
from train.signals import Stopped

LIMIT_S = 300  # a hang would be endless; this machine may be busy
TINY_SHM = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]


def may_mount() -> bool:
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    return subprocess.run([*TINY_SHM, mount], capture_output=True).returncode == 0


@pytest.mark.parametrize("size", ["16k", "144k"])  # too small for semaphores; for packs
def test_a_full_dev_shm_ends_in_a_line_that_says_what_to_do(size, short_data, tiny_dir, repository, tmp_path):
    if not may_mount():
        pytest.skip("no user namespaces here")
    settings = ["train.num_workers=1", "train.batch_tokens=1500", "train.packs_per_step=1"]
    arguments = train_arguments(short_data, tmp_path / "run", tiny_dir, *settings)
    fill = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        [*TINY_SHM, fill, "bash", sys.executable, "-c", TRAIN, *arguments],
        env=environment(repository),
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for word in ("/dev/shm", "--shm-size", "train.num_workers=0"):
        assert word in last
    assert "Traceback" not in done.stderr


def test_a_bus_error_of_a_loader_names_dev_shm_too():
    said = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of shared"
    assert "--shm-size" in str(dead_loader(RuntimeError(said)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_too_long_samples_ends_with_its_counts(short_data, short_config, tmp_path, workers):
    streamed = [
        "train.loader=stream",
        "train.shuffle_buffer=2",
        "train.batch_tokens=60",
        f"train.num_workers={workers}",
    ]
    with pytest.raises(
        PipelineError, match=r"no usable sample: 0 damaged, \d+ longer than a pack .*train.batch_tokens"
    ):
        train(short_config(*streamed), short_data, tmp_path / "run", RunOptions())
    with pytest.raises(PipelineError, match=r"no usable sample: 0 damaged, \d+ longer than a pack"):
        train(short_config(*streamed), short_data, tmp_path / "other", RunOptions(skip_preflight=True))


def test_a_small_stream_is_read_once_for_the_preflight(short_data, short_config, tokenizer):
    from shards.config import SequenceSection
    from shards.sequence import SequenceBuilder

    section = short_config("train.loader=stream", "train.batch_tokens=60").train
    source = StreamedSource(str(short_data), section)
    source.prepare(SequenceBuilder(tokenizer, SequenceSection()))
    with pytest.raises(ShardError, match="no usable sample: 0 damaged, 6 longer than a pack"):
        source.preflight_batch(8)
    source.prepare(SequenceBuilder(tokenizer, SequenceSection()), 700)
    assert len(source.preflight_batch(8).keys) == 6


def test_one_usable_sample_in_a_pass_is_enough():
    passes = Passes(num_samples=100)
    useless = BuiltSample("k", "a.tar", 0, None, "damaged", 0, 1)
    for _ in range(300):
        passes.reason_of(useless, 10)
    assert passes.is_over(buffer=5)
    assert not passes.is_over(buffer=50), "the usable one may still be in the buffer"
    passes.found_usable()
    assert not passes.is_over(buffer=0)


def loader_process(pid: int) -> int:
    """The only child of a run, once it is there."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.05)
    raise AssertionError("no loader process came")


@pytest.mark.parametrize("how", ["SIGSTOP", "SIGKILL"])
def test_a_loader_that_hangs_or_dies_ends_the_run(short_data, tiny_dir, repository, tmp_path, how):
    """A stopped loader gives nothing for ever: SIGTERM ends the wait, and a checkpoint is saved. A killed one is logged."""
    settings = ["train.num_workers=1", "train.packs_per_step=2", "train.max_steps=100000", "train.save_every=100000"]
    started = Started(train_command(short_data, tmp_path / "run", tiny_dir, 1, *settings), repository)
    started.wait_for("step 2/")
    loader = loader_process(started.process.pid)
    os.kill(loader, getattr(signal, how))
    if how == "SIGSTOP":
        time.sleep(3)  # until the packs that were loaded are used up
        started.process.terminate()
    status, messages = started.end(LIMIT_S)
    assert not Path(f"/proc/{loader}").exists()
    if how == "SIGKILL":
        assert status == 1
        assert "error: a loader process has ended" in messages, messages
        assert "Traceback" not in messages, messages
    else:
        assert status == 143
        assert "is saved, the same command goes on from it" in messages


def test_a_signal_ends_the_wait_for_data_in_this_process(short_data, short_config, tmp_path, monkeypatch):
    """A source that never gives its third pack."""
    from train.data.planned_source import PlannedSource

    loaded_packs = PlannedSource.loaded_packs

    def stuck(self, first_step, share):
        packs = loaded_packs(self, first_step, share)
        yield next(packs)
        yield next(packs)
        signal.raise_signal(signal.SIGTERM)
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(PlannedSource, "loaded_packs", stuck)
    with pytest.raises(Stopped, match=r"after step 1; .*checkpoint-1 is saved"):
        train(short_config(), short_data, tmp_path / "run", RunOptions())


def test_a_signal_ends_the_set_up_when_data_do_not_come(short_data, short_config, tmp_path, monkeypatch):
    from train.data.planned_source import PlannedSource

    def stuck(self, num_samples):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(LIMIT_S)

    monkeypatch.setattr(PlannedSource, "preflight_batch", stuck)
    with pytest.raises(Stopped, match="before its first step; the same command begins anew"):
        train(short_config(), short_data, tmp_path / "run", RunOptions())
