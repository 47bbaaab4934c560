"""Checkpoints: exact resume, refusals with both values, best, damage, faults while one is written."""

from __future__ import annotations

import errno
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from short_run import losses

from shards.config import SequenceSection
from shards.errors import CheckpointError, PipelineError
from shards.sequence import SequenceBuilder
from train import loop
from train.loop import RunOptions, train
from train.model.batch import pack
from train.model.lora import load_adapter, lora_parameters
from train.model.weights import load_model
from train.step import train_step


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_equals_the_uninterrupted_one(short_data, short_config, tmp_path, num_workers):
    workers = f"train.num_workers={num_workers}"
    train(short_config(workers), short_data, tmp_path / "whole", RunOptions())
    # Same schedule, stopped after the checkpoint of step 4: the later checkpoint vanishes as in a crash.
    train(short_config(workers), short_data, tmp_path / "cut", RunOptions())
    (tmp_path / "cut/checkpoints/checkpoint-6/COMPLETE").unlink()
    train(short_config(workers), short_data, tmp_path / "cut", RunOptions())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    adapters = [
        (tmp_path / name / "checkpoints/checkpoint-6/adapter/adapter_model.safetensors").read_bytes()
        for name in ("cut", "whole")
    ]
    assert adapters[0] == adapters[1]


def test_adapter_loads_with_plain_peft_on_the_transformers_class(
    short_data, short_config, tmp_path, tiny_dir, tokenizer, make_sample
):
    transformers = pytest.importorskip("transformers", minversion="5.3", reason="the native class came with 5.3")
    from peft import PeftModel

    last = train(short_config(), short_data, tmp_path / "run", RunOptions())
    assert last
    sequence = SequenceBuilder(tokenizer, SequenceSection()).training(make_sample(9, 6, 10))
    native = transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(
        tiny_dir / "model", use_text_head=True, dtype=torch.float32
    )
    inputs = {
        "input_ids": torch.from_numpy(sequence.token_ids.astype(np.int64))[None],
        "audio_input_ids": torch.from_numpy(sequence.codes.T.astype(np.int64))[None],
        "audio_input_ids_mask": torch.ones((1, sequence.codes.shape[1]), dtype=torch.bool),
    }
    is_audio = torch.from_numpy(sequence.token_ids == 128016)
    with torch.no_grad():
        without = native(**inputs).logits[0, is_audio]
        adapted = PeftModel.from_pretrained(native, str(last / "adapter"))
        expected = adapted(**inputs).logits[0, is_audio]
        ours = load_model(tiny_dir / "model", torch.float32)
        config = load_adapter(ours, last / "adapter")
        hidden = ours.hidden(pack([sequence], [0], ["k"]))
        logits = ours.audio_lm_head(hidden[int((~is_audio).sum()) :])
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)
    assert (expected - without).abs().max() > 1e-2, "an adapter without effect would prove nothing"
    assert config.r == 4


def test_best_points_at_the_lowest_held_out_loss_and_is_kept(tmp_path):
    from train.run_folder.checkpoint_folders import best_checkpoint, mark_best

    run = tmp_path / "run"
    for step, loss in ((2, 5.0), (4, 4.0), (6, 4.5)):
        folder = run / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"eval/audio_loss": loss}))
        mark_best(run, folder, {"eval/audio_loss": loss})
    assert best_checkpoint(run) == run / "checkpoints" / "checkpoint-4"
    assert (run / "best" / "metrics.json").is_file()
    mark_best(run, run / "checkpoints" / "checkpoint-6", {})
    assert best_checkpoint(run) == run / "checkpoints" / "checkpoint-4"


def test_a_folder_that_cannot_be_made_costs_one_checkpoint_only(short_data, short_config, tmp_path, monkeypatch):
    make = Path.mkdir

    def full(path: Path, *given, **named) -> None:
        if path.name == ".checkpoint-2.tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        make(path, *given, **named)

    monkeypatch.setattr(Path, "mkdir", full)
    run = tmp_path / "run"
    train(short_config(), short_data, run, RunOptions())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert "checkpoint-2: not saved: [Errno 28] No space left" in (run / "logs" / "training.log").read_text()


def test_a_fault_after_a_checkpoint_was_begun_does_not_cost_it(short_data, short_config, tmp_path, monkeypatch):
    """The checkpoint of step 4 is still being written when step 5 is not finite: the run goes on from 4 all the same."""
    from train.run_folder import checkpoint

    complete = checkpoint.Checkpoints._complete

    def slowly(self, *given):
        time.sleep(1.0)
        complete(self, *given)

    def poisoned(model, optimizer, batches, of_step, *given):
        if of_step.step == 4:
            with torch.no_grad():
                lora_parameters(model)[0][1][0, 0] = float("nan")
        return train_step(model, optimizer, batches, of_step, *given)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_complete", slowly)
        patch.setattr(loop, "train_step", poisoned)
        with pytest.raises(PipelineError, match=r"step 5: loss nan.*stopped before the update; samples 0000"):
            train(short_config(), short_data, run, RunOptions())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert (run / "checkpoints" / "checkpoint-4" / "COMPLETE").is_file()
    train(short_config(), short_data, run, RunOptions())
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert all(map(math.isfinite, losses(run).values()))


def test_a_damaged_checkpoint_is_not_merged(short_data, short_config, tmp_path):
    from tools.checkpoints.merge import merge_checkpoint

    last = train(short_config("train.max_steps=2"), short_data, tmp_path / "run", RunOptions())
    assert last
    weights = last / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 0x40
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged: adapter/adapter_model\.safetensors is not what was written"):
        merge_checkpoint(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_later_checkpoints_than_the_start_are_set_aside(short_data, short_config, tmp_path):
    """A run that goes back may not take what it left behind for its newest, and remove what it writes as old."""
    run = tmp_path / "run"
    evaluated = ["train.validation_fraction=0.3", "train.eval_every=2", "train.packs_per_step=1"]
    train(short_config(*evaluated, "train.keep_checkpoints=9"), short_data, run, RunOptions())
    assert (run / "best").readlink() == Path("checkpoints/checkpoint-6")
    back = RunOptions(resume=str(run / "checkpoints" / "checkpoint-2"))
    last = train(short_config(*evaluated, "train.max_steps=3", "train.keep_checkpoints=1"), short_data, run, back)
    assert last == run / "checkpoints" / "checkpoint-3"
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"checkpoint-3", "aside-checkpoint-4", "aside-checkpoint-6"}
    assert (run / "best").readlink() == Path("checkpoints/checkpoint-3")
    assert "later than step 2, from which this run goes on" in (run / "logs" / "training.log").read_text()
    assert train(short_config(*evaluated, "train.max_steps=3"), short_data, run, RunOptions()) == last
