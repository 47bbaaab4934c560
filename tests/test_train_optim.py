"""The learning rate as a function of the step, and what the optimizer takes from a configuration."""

from __future__ import annotations

import pytest

from train import loop
from train.loop import RunOptions, train
from train.optim import learning_rate_at
from train.step import train_step


def test_learning_rate_is_a_pure_function_of_the_step(short_config):
    section = short_config("train.warmup_steps=10", "train.learning_rate=1e-3").train
    rates = [learning_rate_at(step, 110, section) for step in range(111)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(5e-4)
    assert rates[110] == pytest.approx(0.0, abs=1e-12)
    linear, constant = (
        short_config("train.learning_rate=1e-3", "train.warmup_steps=10", f"train.schedule={name}").train
        for name in ("linear", "constant")
    )
    assert learning_rate_at(60, 110, linear) == pytest.approx(5e-4)
    assert learning_rate_at(35, 110, linear) == pytest.approx(7.5e-4)
    assert learning_rate_at(109, 110, constant) == pytest.approx(1e-3)
    assert learning_rate_at(4, 110, constant) == pytest.approx(5e-4)
    automatic = short_config("train.learning_rate=1e-3").train
    assert learning_rate_at(2, 100, automatic) == pytest.approx(1e-3)  # 3 % of 100 steps


def test_weight_decay_can_be_changed_when_a_run_goes_on(short_data, short_config, tmp_path, monkeypatch):

    train(short_config("train.max_steps=2"), short_data, tmp_path / "run", RunOptions())
    found = []

    def spy(model, optimizer, *given, **named):
        found.extend(group["weight_decay"] for group in optimizer.param_groups)
        return train_step(model, optimizer, *given, **named)

    monkeypatch.setattr(loop, "train_step", spy)
    train(short_config("train.max_steps=3", "train.weight_decay=0.5"), short_data, tmp_path / "run", RunOptions())
    assert found == [0.5]
