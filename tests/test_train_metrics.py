"""What a run reports to TensorBoard and Weights & Biases."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from short_run import losses

from train.config import WandbSection
from train.loop import RunOptions, train
from train.run_folder.metrics import start_wandb


def test_tensorboard_holds_the_metrics(short_data, short_config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(short_config("train.tensorboard=true", "train.max_steps=3"), short_data, tmp_path / "run", RunOptions())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    points = events.Scalars("loss/total_loss")
    assert [point.step for point in points] == [1, 2, 3]
    assert points[2].value == pytest.approx(losses(tmp_path / "run")[3])


def test_a_missing_wandb_key_ends_before_the_model_loads(short_data, tiny_dir, run_command, tmp_path):
    result = run_command(
        *("train", short_data, tmp_path / "run", "--config", tiny_dir / "pipeline.toml", "--wandb"),
        env={"WANDB_API_KEY": "", "WANDB_MODE": "", "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"},
    )
    assert result.returncode == 1
    assert "error: wandb.mode = 'online': " in result.stderr
    assert "set WANDB_API_KEY, or use --no-wandb" in result.stderr
    assert "LoRA trains" not in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_that_goes_on_keeps_its_curves_at_wandb(tmp_path, monkeypatch):
    """No server here: what wandb.init is asked for. Offline every start is a run of its own."""
    import wandb

    asked = []

    def init(**options):
        asked.append(options)
        return SimpleNamespace(id=options.get("id", f"new{len(asked)}"))

    monkeypatch.setattr(wandb, "init", init)
    online = WandbSection(mode="online")
    for resumes in (False, True, True, False, True):
        start_wandb(tmp_path, online, {}, resumes=resumes)
    assert [(options.get("id"), options.get("resume")) for options in asked] == [
        *[(None, None), ("new1", "allow"), ("new1", "allow")],
        *[(None, None), ("new4", "allow")],
    ]
    start_wandb(tmp_path, WandbSection(mode="offline"), {}, resumes=True)
    assert "id" not in asked[-1]
