"""Scores of the listening set while a run trains, and what RUN/best follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.errors import ConfigError
from train.config import EvalSection
from train.evaluation.listening import Listening
from train.evaluation.listening_scores import open_scores
from train.evaluation.metric_models import ModelIdentity
from train.loop import RunOptions, train
from train.run_folder.checkpoint_folders import (
    best_checkpoint,
    judge_again,
    judged_by,
    mark_best,
    read_metrics,
    set_aside,
    why_best,
)
from train.world import World

ASKED = ["train.listening_samples=1", "train.eval_every=1", "train.save_every=1", "train.keep_checkpoints=3"]
ASKED += ["eval.score=true", "train.best_by=similarity", "train.log_every=1"]


class Loudness:
    """An encoder of a wave's level; needs no package."""

    identity = ModelIdentity("loudness", "1", "0" * 64)

    def embed(self, wave: np.ndarray) -> np.ndarray:
        angle = 10 * float(np.abs(wave).mean())
        return np.array([np.cos(angle), np.sin(angle)], np.float32)


class Deaf:
    identity = ModelIdentity("deaf", "1", "0" * 64)

    def text_of(self, wave: np.ndarray) -> str:
        return ""


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(short_data, short_config, tmp_path_factory) -> Path:
    """Three steps with both scores; a first run is stopped after one and goes on."""
    run = tmp_path_factory.mktemp("scored") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.evaluation.listening_scores.load_encoder", lambda name: Loudness())
        patch.setattr("train.evaluation.listening_scores.load_recognizer", lambda name, language: Deaf())
        assert train(short_config(*ASKED, "train.max_steps=1"), short_data, run, RunOptions())
        assert train(short_config(*ASKED, "train.max_steps=3"), short_data, run, RunOptions())
    return run


def test_the_scores_stand_beside_the_losses(scored: Path):
    found = lines(scored)
    assert [line["step"] for line in found] == [1, 2, 3]
    assert all(-1 <= line["eval/similarity"] <= 1 for line in found)
    assert all(line["eval/cer"] == 1 for line in found)


def test_best_follows_the_similarity_across_a_resume(scored: Path):
    by_step = {line["step"]: line["eval/similarity"] for line in lines(scored)}
    best = best_checkpoint(scored)
    assert best is not None
    assert best.name == f"checkpoint-{max(by_step, key=lambda step: (by_step[step], -step))}"
    assert judged_by(best) == "similarity"
    assert why_best(best) == f"similarity of the listening set {read_metrics(best)['eval/similarity']:.4f}"


def test_training_is_the_same_with_and_without_scores(scored: Path, short_data, short_config, tmp_path: Path):
    plain = [text for text in ASKED if not text.startswith(("eval.", "train.best_by"))]
    assert train(short_config(*plain, "train.max_steps=1"), short_data, tmp_path / "run", RunOptions())
    assert train(short_config(*plain, "train.max_steps=3"), short_data, tmp_path / "run", RunOptions())
    for name in ("loss/total_loss", "metrics/grad_norm"):
        assert [line[name] for line in lines(tmp_path / "run")] == [line[name] for line in lines(scored)]
    assert not any("eval/similarity" in line for line in lines(tmp_path / "run"))


ALONE = World(0, 1, torch.device("cpu"), False)
LISTENS = Listening([], None, None, Path("nowhere"), ALONE)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("section", "best_by", "listening"),
    [
        (EvalSection(), "similarity", LISTENS),
        (EvalSection(score=True), "cer", LISTENS),
        (EvalSection(score=True), "similarity", None),
        (EvalSection(score=True, similarity="none"), "similarity", LISTENS),
        (EvalSection(score=True, similarity="speechbrain"), "audio_loss", LISTENS),
        (EvalSection(score=True, asr="whisper:/nowhere"), "audio_loss", LISTENS),
    ],
)
def test_what_cannot_be_measured_is_refused_first(section: EvalSection, best_by: str, listening: Listening | None):
    with pytest.raises(ConfigError, match=r"train\.best_by|eval: --"):
        open_scores(section, best_by, listening, ALONE)


def test_what_is_not_installed_is_skipped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.evaluation.metric_models.importlib.util.find_spec", lambda name: None)
    scores = open_scores(EvalSection(score=True), "audio_loss", LISTENS, ALONE)
    assert scores is not None
    assert scores.measures == []
    assert open_scores(EvalSection(), "audio_loss", LISTENS, ALONE) is None


def folders_of(run: Path, figures: dict[int, dict[str, float | None]]) -> None:
    for step, metrics in figures.items():
        folder = run / "checkpoints" / f"checkpoint-{step}"
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "state.json").write_text(json.dumps({"format": 2, "step": step}))
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "config.toml").write_text('[train]\nbest_by = "audio_loss"\n')
        (folder / "COMPLETE").write_text("{}")
        mark_best(run, folder, metrics)  # pyright: ignore[reportArgumentType]


def test_another_measure_judges_what_is_there_again(tmp_path: Path):
    figures = {
        2: {"eval/audio_loss": 3.0, "eval/similarity": 0.5, "eval/cer": 0.4},
        4: {"eval/audio_loss": 2.0, "eval/similarity": 0.7, "eval/cer": 0.5},
        6: {"eval/audio_loss": 1.0, "eval/similarity": 0.6, "eval/cer": None},
    }
    folders_of(tmp_path, figures)
    for best_by, step in (("audio_loss", 6), ("similarity", 4)):
        judge_again(tmp_path, best_by)
        assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / f"checkpoint-{step}", best_by
    set_aside(tmp_path, 3, "cer")
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-2"


def test_a_measure_nobody_has_leaves_the_best(tmp_path: Path):
    folders_of(tmp_path, {2: {"eval/audio_loss": 3.0}})
    judge_again(tmp_path, "cer")
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-2"
    (tmp_path / "checkpoints" / "checkpoint-2" / "config.toml").write_text("nonsense [")
    assert judged_by(tmp_path / "checkpoints" / "checkpoint-2") == "audio_loss"


@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), None], ids=["raises", "NaN"])
def test_a_metric_that_fails_stops_no_training(short_data, short_config, tmp_path, monkeypatch, fault):
    """Nor RUN/best: what was not measured is judged by nobody."""

    class Broken(Loudness):
        def embed(self, wave: np.ndarray) -> np.ndarray:
            if fault:
                raise fault
            return np.full(2, np.nan, np.float32)

    monkeypatch.setattr("train.evaluation.listening_scores.load_encoder", lambda name: Broken())
    monkeypatch.setattr("train.evaluation.listening_scores.load_recognizer", lambda name, language: Deaf())
    assert train(
        short_config(*ASKED, "train.max_steps=1"), short_data, tmp_path / "run", RunOptions(skip_preflight=True)
    )
    (line,) = lines(tmp_path / "run")
    assert "eval/similarity" not in line
    assert line["eval/cer"] == 1
    logged = (tmp_path / "run" / "logs" / "training.log").read_text()
    assert "step 1: eval/similarity not measured: " in logged
    assert best_checkpoint(tmp_path / "run") is None


@pytest.mark.slow
def test_two_ranks_score_what_one_scores(short_data, short_config, tiny_dir, run_command, tmp_path):
    """Models of metrics live on the first rank alone; the other waits and takes part in what follows."""
    asked = ["train.listening_samples=2", "train.eval_every=1", "train.max_steps=2", "eval.score=true"]
    config = short_config(*asked)
    assert train(config, short_data, tmp_path / "one", RunOptions(skip_preflight=True))
    settings = ["train.batch_tokens=700", "train.packs_per_step=2", "train.save_every=2", "train.log_every=1"]
    settings += ["train.num_workers=0", "lora.rank=4", "train.keep_checkpoints=2", *asked]
    options = [word for setting in settings for word in ("--set", setting)]
    command = ["train", short_data, tmp_path / "two", "--config", tiny_dir / "pipeline.toml", "--skip-preflight"]
    done = run_command(*command, "--gpus", 2, *options)
    assert done.returncode == 0, done.stderr
    found = [[line["eval/similarity"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1], abs=1e-6)
