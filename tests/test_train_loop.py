"""The training loop through the real command: what it leaves behind, resume, refusals, and stopping before harm."""

from __future__ import annotations

import json
import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from short_run import losses

from shards.errors import PipelineError
from train import loop
from train.loop import RunOptions, train


def test_run_directory_is_complete_and_loss_falls(short_data, short_config, tmp_path):
    run = tmp_path / "run"
    last = train(short_config("train.max_steps=12"), short_data, run, RunOptions())
    assert last is not None
    assert last == run / "checkpoints" / "checkpoint-12"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-12"]
    inside = {"adapter", "state", "identity.json", "metrics.json", "config.toml", "COMPLETE"}
    assert {path.name for path in last.iterdir()} == inside
    assert {path.name for path in run.iterdir()} >= {"config.toml", "environment.json", "logs", "metrics.jsonl"}
    environment = json.loads((run / "environment.json").read_text())
    assert {"command", "device", "torch", "transformers", "peft"} <= set(environment)
    assert environment["ranks"] == 1
    values = json.loads((last / "metrics.json").read_text())
    names = ["loss/total_loss", "loss/text_loss", "loss/audio_loss", "loss/contrastive_loss"]
    names += [f"loss/codebook_{k}" for k in range(8)]
    names += ["metrics/learning_rate", "metrics/gpu_memory_gb", "metrics/samples_per_second"]
    names += ["metrics/tokens_per_second", "metrics/data_wait_fraction", "metrics/mfu"]
    assert set(names) <= set(values)
    history = losses(run)
    assert list(history) == list(range(1, 13))
    assert history[12] < history[1] - 1.0


def test_a_way_to_attend_can_be_asked_for_and_trains_the_same(short_data, short_config, tmp_path, monkeypatch):
    from train.model import build

    chosen = []
    choose = build.choose_attention
    monkeypatch.setattr(
        build, "choose_attention", lambda *given, **named: chosen.append(choose(*given, **named)) or chosen[-1]
    )
    for way in ("auto", "padded"):
        train(short_config(f"train.attention={way}"), short_data, tmp_path / way, RunOptions())
    assert chosen == ["separate"]
    one, other = losses(tmp_path / "auto"), losses(tmp_path / "padded")
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=0, atol=1e-5)


def test_shards_of_another_codec_are_refused(short_data, short_config, tmp_path, tiny_dir):
    other = shutil.copytree(tiny_dir / "codec", tmp_path / "codec")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(PipelineError, match=r"do not fit the model: codec: shards were made with"):
        train(short_config(f"model.codec={other}"), short_data, tmp_path / "run", RunOptions())


def test_dry_run_trains_nothing(short_data, short_config, tmp_path):
    assert train(short_config(), short_data, tmp_path / "run", RunOptions(dry_run=True)) is None
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere", "RUN"], 1, "error: nowhere: no such folder; give the OUT folder of `preprocess`"),
        (["CHATML", "RUN"], 1, "if it is a ChatML list, run first: preprocess"),
        (
            ["DATASET", "RUN", "--set", "train.learning_rat=1e-4"],
            1,
            "unknown key train.learning_rat; did you mean 'learning_rate'?",
        ),
        (["DATASET", "RUN", "--learning-rate", "fast"], 2, "'fast' is not a valid float"),
        (["DATASET", "RUN", "--config", "absent.toml"], 1, "absent.toml: no such file"),
        (["DATASET", "RUN", "--set", "model.base=nowhere"], 1, "model.base = 'nowhere': no such folder"),
        (["DATASET", "RUN", "--set", "train.batch_tokens=50"], 1, "no sample fits; the shortest of 6 has"),
        (
            ["DATASET", "RUN", "--set", "lora.mode=custom", "--set", 'lora.targets=["k_pro"]'],
            1,
            "'k_pro' matches no linear layer",
        ),
        (["DATASET", "RUN", "--resume", "nowhere"], 1, "not a complete checkpoint folder"),
    ],
)
def test_mistakes_give_one_clear_line(
    run_command, short_data, arabic_mini, tiny_dir, tmp_path, arguments, status, message
):
    names = {"DATASET": str(short_data), "RUN": str(tmp_path / "run"), "CHATML": str(arabic_mini)}
    given = [names.get(argument, argument) for argument in arguments]
    if "--config" not in given:
        given += ["--config", str(tiny_dir / "pipeline.toml")]
    result = run_command("train", *given)
    assert result.returncode == status, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    if status == 1:
        assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
            result.stderr.splitlines()[-1]
        ]


def test_a_loader_process_that_dies_ends_the_run_with_a_line(short_data, short_config, tmp_path, monkeypatch):
    """torch raises from the handler of SIGCHLD, here in the middle of the second step."""
    real = loop.train_step
    steps = []

    def deadly(*arguments):
        steps.append(arguments)
        if len(steps) == 2:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", deadly)
    with pytest.raises(PipelineError, match=r"a loader process has ended .*lower train.num_workers"):
        train(short_config("train.num_workers=2"), short_data, tmp_path / "run", RunOptions())


def test_too_little_memory_is_an_error_with_what_to_change(short_data, short_config, tmp_path, monkeypatch):
    from train import loop

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop, "train_step", full)
    with pytest.raises(PipelineError, match=r"packs of train\.batch_tokens = 700 \(CUDA out of memory.*halve it"):
        loop.train(short_config(), short_data, tmp_path / "run", RunOptions())
