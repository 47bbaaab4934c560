"""`train --probe-lr`: every rate from the same start on the same packs, one model load, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shards.errors import ConfigError
from train import probe_learning_rate, set_up
from train.cli import parse_rates
from train.loop import RunOptions, train
from train.probe_learning_rate import probe_rates


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_dataset, make_sample) -> Path:
    samples = [make_sample(seed, 5, 8 + seed, speaker=f"speaker-{seed % 4}") for seed in range(12)]
    return make_dataset(tmp_path_factory.mktemp("data"), samples)


ASKED = ["train.packs_per_step=1", "train.validation_fraction=0.25", "lora.dropout=0.1", "train.warmup_steps=0"]


@pytest.fixture(scope="module")
def probed(dataset, short_config, tmp_path_factory):
    """Three rates, one of them twice, and what was loaded and read meanwhile."""
    folder = tmp_path_factory.mktemp("probe")
    loads, keys, starts = [], [], []
    build, step = set_up.build_model, probe_learning_rate.train_step

    def counted(*given):
        loads.append(1)
        return build(*given)

    def watched(model, optimizer, batches, settings, *rest):
        keys.append((settings.step, [batch.keys for batch in batches]))
        if settings.step == 0:
            starts.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])
        return step(model, optimizer, batches, settings, *rest)

    patch = pytest.MonkeyPatch()
    patch.setattr(set_up, "build_model", counted)
    patch.setattr(probe_learning_rate, "train_step", watched)
    found = probe_rates(short_config(*ASKED), dataset, folder / "run", [1e-6, 1e-3, 1e-3, 1e-2], 6)
    patch.undo()
    return folder, found, loads, keys, starts


def test_every_rate_has_the_same_start_and_packs(probed):
    _, found, loads, keys, starts = probed
    assert len(loads) == 1
    assert keys[:6] == keys[6:12] == keys[12:18] == keys[18:]
    assert len({str(names) for _, names in keys[:6]}) > 1
    assert all(
        torch.equal(one, other) for other_start in starts[1:] for one, other in zip(starts[0], other_start, strict=True)
    )
    assert found[1] == found[2], "nothing of one rate reaches the next"
    assert len({probe.held_out_start for probe in found}) == 1
    assert len({probe.loss_first for probe in found}) == 1


def test_losses_and_slope_are_those_of_the_rate(probed):
    _, found, *_ = probed
    slow, _, mid, fast = found
    assert [probe.steps for probe in found] == [6] * 4
    assert abs(slow.held_out - slow.held_out_start) < 1e-3 < abs(fast.held_out - fast.held_out_start)
    assert fast.loss_last < mid.loss_last < slow.loss_last
    for probe in found:
        assert probe.slope == pytest.approx((probe.held_out - probe.held_out_half) / 3 * 100)
        assert len(probe.cells()) == 9


def test_it_leaves_nothing_behind(probed):
    assert list(probed[0].iterdir()) == []


def test_a_rate_is_tried_as_a_run_would_train_it(probed, dataset, short_config, tmp_path):
    """The same losses as a run with that rate, held constant behind the probe's warm-up of a tenth."""
    asked = [
        *ASKED,
        "train.learning_rate=1e-3",
        "train.schedule=constant",
        "train.warmup_steps=1",
        "train.eval_every=3",
    ]
    train(short_config(*asked), dataset, tmp_path / "run", RunOptions())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    probe = probed[1][1]
    assert (lines[0]["loss/total_loss"], lines[-1]["loss/total_loss"]) == (probe.loss_first, probe.loss_last)
    assert (lines[2]["eval/audio_loss"], lines[5]["eval/audio_loss"]) == (probe.held_out_half, probe.held_out)


def test_a_rate_that_diverges_ends_alone(dataset, short_config, tmp_path):
    found = probe_rates(short_config(*ASKED), dataset, tmp_path / "run", [1e-4, 1e30, 1e-3], 4)
    assert [probe.steps == 4 for probe in found] == [True, False, True]
    assert found[1].held_out is None
    assert found[1].slope is None
    assert "-" in found[1].cells()
    json.dumps([probe.held_out for probe in found], allow_nan=False)


def test_without_held_out_data_some_is_held_out(dataset, short_config, tmp_path):
    (found,) = probe_rates(short_config("train.packs_per_step=1"), dataset, tmp_path / "run", [1e-3], 2)
    assert found.held_out
    streamed = short_config("train.loader=stream")
    with pytest.raises(ConfigError, match=r"--probe-lr compares held-out losses.*train.validation_data"):
        probe_rates(streamed, dataset, tmp_path / "run", [1e-3], 2)


def test_one_speaker_needs_a_data_set_to_validate_with(make_dataset, make_sample, short_config, tmp_path):
    """Nobody wrote train.validation_fraction, so the message does not say to change it."""
    (tmp_path / "data").mkdir()
    alone = make_dataset(tmp_path / "data", [make_sample(seed, 5, 9, speaker="one") for seed in range(4)])
    with pytest.raises(
        ConfigError, match=r"^--probe-lr .*only 1 speaker.*name another data set in train\.valid"
    ) as fault:
        probe_rates(short_config(), alone, tmp_path / "run", [1e-3], 2)
    assert "validation_fraction" not in str(fault.value)
    with pytest.raises(ConfigError, match=r"^train\.validation_fraction = 0\.5: .*or set it to 0"):
        probe_rates(short_config("train.validation_fraction=0.5"), alone, tmp_path / "run", [1e-3], 2)


@pytest.mark.parametrize(
    ("text", "fault"), [("fast", "'fast'"), ("1e-4,", "''"), ("0", "'0'"), ("1e-4,nan", "'nan'"), ("-1", "'-1'")]
)
def test_what_is_no_rate_is_refused(text, fault):
    with pytest.raises(ConfigError, match=f"{fault} is no learning rate"):
        parse_rates(text)


def test_the_command_prints_a_table_or_json(dataset, tiny_dir, run_command, tmp_path):
    settings = [
        f"train.{word}"
        for word in ("batch_tokens=700", "packs_per_step=2", "num_workers=0", "validation_fraction=0.25")
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    given = (
        dataset,
        tmp_path / "run",
        "--config",
        tiny_dir / "pipeline.toml",
        *options,
        "--skip-preflight",
        "--probe-steps",
        2,
    )
    done = run_command("train", *given, "--gpus", 1, "--json", "--probe-lr", "1e-3,1e-5")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["rates"]
    assert [probe["learning_rate"] for probe in found] == [1e-5, 1e-3]
    done = run_command("train", *given, "--gpus", 2, "--set", "train.device=cpu", "--probe-lr")
    assert done.returncode == 0, done.stderr
    assert [word in done.stdout for word in ("5e-06", "2e-05", "5e-05", "0.0001", "slope")] == [True] * 5
    assert list(tmp_path.iterdir()) == []
