"""Signals: a run saves and stops, wherever it is."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from short_run import losses

from shards.errors import PipelineError
from train import loop
from train import set_up as module
from train.loop import RunOptions, train
from train.signals import AT_ONCE, SAVING, StopSignal
from train.step import train_step
from train.world import ALONE


def test_a_signal_writes_one_checkpoint_and_none_at_the_start(short_data, short_config, tmp_path, monkeypatch):
    from train.run_folder import checkpoint

    def stopping(model, optimizer, batches, of_step, *given):
        result = train_step(model, optimizer, batches, of_step, *given)
        if of_step.step + 1 == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return result

    written = []
    complete = checkpoint.Checkpoints._complete
    monkeypatch.setattr(
        checkpoint.Checkpoints,
        "_complete",
        lambda self, partial, folder, metrics: (written.append(folder.name), complete(self, partial, folder, metrics)),
    )
    monkeypatch.setattr(loop, "train_step", stopping)
    stop_at = 2
    with pytest.raises(PipelineError, match=r"after step 2; .*checkpoint-2 is saved, the same command goes on from it"):
        train(short_config(), short_data, tmp_path / "run", RunOptions())
    assert written == ["checkpoint-2"]

    build_model = module.build_model
    monkeypatch.setattr(
        module, "build_model", lambda *given: (signal.raise_signal(signal.SIGTERM), build_model(*given))[1]
    )
    with pytest.raises(PipelineError, match=r"(after step 0|before its first step); the same command begins anew"):
        train(short_config(), short_data, tmp_path / "other", RunOptions())


def test_a_second_ctrl_c_ends_at_once_loaders_ignore_it(repository):
    """In a process of its own: what other tests loaded here warns at a fork, and the lines are compared exactly."""
    script = """
import os, signal
from train.signals import StopSignal
from train.world import ALONE

with StopSignal() as signals:
    signal.raise_signal(signal.SIGINT)
    assert signals.asked(ALONE)
    if not (child := os.fork()):
        signal.raise_signal(signal.SIGINT)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("interrupted")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False)
    assert ran.stdout == "interrupted\n", ran.stderr
    assert ran.stderr == f"{SAVING}{AT_ONCE}\n", "each line once"
    assert ran.returncode == 0


def test_a_signal_between_packs_ends_the_step_resume_redoes_it(short_data, short_config, tmp_path, monkeypatch):
    """Steps of many packs may take longer than the 30 seconds that launchers wait."""
    from train.model.decoder import HiggsAudio

    train(short_config(), short_data, tmp_path / "whole", RunOptions())
    forward, packs = HiggsAudio.forward, []

    def in_step_three(model, optimizer, batches, of_step, *given):
        if of_step.step == 2:
            assert len(batches) == 2
            patch.setattr(HiggsAudio, "forward", stopping)
        return train_step(model, optimizer, batches, of_step, *given)

    def stopping(self, batch, per_target=False):
        packs.append(batch.keys)
        signal.raise_signal(signal.SIGTERM)
        return forward(self, batch, per_target)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", in_step_three)
        with pytest.raises(PipelineError, match=r"after step 2; .*checkpoint-2 is saved"):
            train(short_config(), short_data, tmp_path / "cut", RunOptions())
    assert len(packs) == 1
    train(short_config(), short_data, tmp_path / "cut", RunOptions())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_every_way_to_stop_a_run_is_asked_for_and_then_undone(number):
    """A closed terminal (SIGHUP) included."""
    before = {each: signal.getsignal(each) for each in StopSignal.SIGNALS}
    with StopSignal() as signals:
        assert not signals.asked(ALONE)
        signal.raise_signal(number)
        assert signals.asked(ALONE)
    assert before == {each: signal.getsignal(each) for each in StopSignal.SIGNALS}


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_signal_that_is_ignored_does_not_stop_a_run(number):
    """nohup ignores SIGHUP, a shell's background SIGINT."""
    old = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignal() as signals:
            signal.raise_signal(number)
            assert not signals.asked(ALONE)
    finally:
        signal.signal(number, old)
