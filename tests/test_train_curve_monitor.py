"""Warnings on the curves, and stopping early."""

from __future__ import annotations

import json

from train.loop import RunOptions, train


def test_what_a_person_would_warn_of_is_logged_once(caplog):
    from train.evaluation.curve_monitor import CurveMonitor

    watch = CurveMonitor()
    sound = {"epoch": 0, "loss/audio_loss": 4.0, "metrics/data_wait_fraction": 0.01}
    with caplog.at_level("WARNING", "train"):
        watch.check(10, sound)
        watch.check(20, {**sound, "epoch": 1, "loss/audio_loss": 0.5})  # learned by heart, not copied
        assert not caplog.records
        for step in (30, 40):
            watch.check(step, {**sound, "loss/audio_loss": 0.5, "metrics/data_wait_fraction": 0.2})
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "step 30: audio loss 0.50 although no sample was seen twice" in messages[0]
    assert "20% of the time went into waiting for data; raise train.num_workers" in messages[1]


def test_a_run_without_patience_left_stops_and_keeps_its_best(short_data, short_config, tmp_path):
    """A learning rate that destroys the model: held-out losses rise from the first evaluation on."""
    run = tmp_path / "run"
    harmful = ["train.learning_rate=0.3", "train.max_steps=30", "train.validation_fraction=0.3", "train.patience=3"]
    harmful += ["train.eval_every=1", "train.save_every=1", "train.keep_checkpoints=1", "train.packs_per_step=1"]
    last = train(short_config(*harmful, "train.warmup_steps=0"), short_data, run, RunOptions())
    assert last is not None
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/audio_loss"] for line in history]
    best = held_out.index(min(held_out))
    assert len(held_out) == best + 1 + 3 < 30
    assert (run / "best").resolve().name == f"checkpoint-{best + 1}"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"checkpoint-{best + 1}", last.name}
    assert "stopped early" in (run / "logs" / "training.log").read_text()
    assert "the held-out audio loss has not fallen for 3 evaluations" in (run / "logs" / "training.log").read_text()
    again = train(short_config(*harmful, "train.warmup_steps=0"), short_data, run, RunOptions())
    assert again == last, "a resumed run remembers that its patience is gone"
    assert json.loads((last / "metrics.json").read_text())["eval/audio_loss"] == held_out[-1], "and writes nothing anew"
