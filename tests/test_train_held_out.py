"""Held-out data: speakers are disjoint and fixed, losses are those of the packs, and training does not notice them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import flip_payload
from hypothesis import given, settings
from hypothesis import strategies as st
from train_process import environment, train_command

from shards.config import SequenceSection, read_config
from shards.errors import ConfigError, PipelineError
from shards.index import INDEX_DTYPE
from shards.sequence import SequenceBuilder
from train.config import LossSection, TrainConfig, TrainSection
from train.data.planned_source import PlannedSource
from train.data.validation_split import choose_speakers, of_speakers
from train.evaluation.held_out import Evaluation
from train.loop import RunOptions, train
from train.model.weights import load_model
from train.run_folder.checkpoint_folders import best_checkpoint
from train.world import ALONE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_dataset, make_sample) -> Path:
    samples = [make_sample(seed, 5, 8 + seed, speaker=f"speaker-{seed % 4}") for seed in range(12)]
    return make_dataset(tmp_path_factory.mktemp("data"), samples)


@pytest.fixture
def configure(tiny_dir: Path):
    def make(*overrides: str) -> TrainConfig:
        quick = ["train.batch_tokens=700", "train.packs_per_step=1", "train.max_steps=6", "train.save_every=3"]
        quick += ["train.log_every=1", "train.num_workers=0", "lora.rank=4", "lora.dropout=0.1"]
        quick += ["train.listening_samples=0"]
        return read_config(TrainConfig, tiny_dir / "pipeline.toml", [*quick, *overrides])

    return make


def history(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def index_of(counts: list[int]) -> np.ndarray:
    index = np.zeros(sum(counts), INDEX_DTYPE)
    index["speaker"] = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)) * 77 + 5, counts))
    return index


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(1, 50), min_size=2, max_size=40),
    seed=st.integers(0, 5),
    fraction=st.floats(0.01, 0.9),
)
def test_parts_are_disjoint_by_speaker_and_fixed(counts, seed, fraction):
    index = index_of(counts)
    speakers = choose_speakers(index, seed, fraction)
    inside, outside = (of_speakers(speakers, inside=part)(index) for part in (True, False))
    assert (inside ^ outside).all()
    assert inside.any()
    assert outside.any()
    assert not set(index["speaker"][inside]) & set(index["speaker"][outside])
    order = np.random.default_rng(1).permutation(len(index))
    assert choose_speakers(index[order], seed, fraction).tolist() == speakers.tolist(), (
        "the order of rows plays no part"
    )


def test_the_share_is_near_what_was_asked_and_follows_the_seed():
    index = index_of([20] * 200)
    chosen = [choose_speakers(index, seed, 0.05) for seed in range(3)]
    assert [len(speakers) for speakers in chosen] == [10, 10, 10]
    assert len({tuple(speakers.tolist()) for speakers in chosen}) == 3


def test_one_speaker_cannot_be_split():
    with pytest.raises(ConfigError, match=r"only 1 speaker.*train.validation_data"):
        choose_speakers(index_of([30]), 0, 0.1)


def test_training_does_not_notice_an_evaluation(dataset, configure, tmp_path, make_dataset, make_sample):
    """With dropout, so that random numbers count; the validation set is another one, so both runs train on the same data."""
    held_out = make_dataset(
        tmp_path / "held-out", [make_sample(seed, 6, 9 + seed, "another") for seed in range(20, 28)]
    )
    train(configure(), dataset, tmp_path / "without", RunOptions())
    train(
        configure(f"train.validation_data={held_out}", "train.eval_every=2"), dataset, tmp_path / "with", RunOptions()
    )
    without, with_ = history(tmp_path / "without"), history(tmp_path / "with")
    assert [line["loss/total_loss"] for line in with_] == [line["loss/total_loss"] for line in without]
    assert [line["metrics/grad_norm"] for line in with_] == [line["metrics/grad_norm"] for line in without]
    assert [line["step"] for line in with_ if "eval/total_loss" in line] == [2, 4, 6]
    names = {"eval/total_loss", "eval/text_loss", "eval/audio_loss", "eval/samples"}
    assert names | {f"eval/codebook_{k}" for k in range(8)} <= set(with_[1])
    adapters = [
        (tmp_path / name / "checkpoints/checkpoint-6/adapter/adapter_model.safetensors").read_bytes()
        for name in ("with", "without")
    ]
    assert adapters[0] == adapters[1]


def test_held_out_speakers_are_not_trained_on(dataset, configure, tmp_path):
    last = train(configure("train.validation_fraction=0.25"), dataset, tmp_path / "run", RunOptions())
    assert last
    values = history(tmp_path / "run")[-1]
    assert values["eval/samples"] == 3
    section = TrainSection(batch_tokens=700, packs_per_step=1, validation_fraction=0.25)
    source = PlannedSource(str(dataset), section)
    source.prepare(builder_of(configure))
    assert source.planner.num_samples == 9


def builder_of(configure) -> SequenceBuilder:
    from shards.artifacts import load_tokenizer

    return SequenceBuilder(load_tokenizer(Path(configure().model.base)), SequenceSection())


def open_all(dataset: Path, configure, **values) -> PlannedSource:
    section = TrainSection(batch_tokens=700, packs_per_step=1, validation_data=str(dataset), **values)
    source = PlannedSource(str(dataset), section)
    source.prepare(builder_of(configure))
    return source


def open_evaluation(source: PlannedSource) -> Evaluation:
    held_out = source.held_out(ALONE)
    assert held_out
    return Evaluation(held_out, ALONE)


def test_losses_do_not_depend_on_how_the_data_are_packed(dataset, configure, model_dir):
    model = load_model(model_dir, torch.float32)
    section = LossSection(contrastive_loss_weight=0.0)
    found = []
    for most in (0, 1):
        evaluation = open_evaluation(open_all(dataset, configure, max_references=most))
        found.append(evaluation.losses(model, section))
    del found[0]["eval/contrastive_loss"], found[1]["eval/contrastive_loss"]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert 6 < found[0]["eval/audio_loss"] < 8, "about guessing, for a random model"


def test_damaged_held_out_samples_are_counted_or_stop(configure, model_dir, tmp_path, make_dataset, make_sample):
    dataset = make_dataset(tmp_path / "data", [make_sample(seed) for seed in range(8)])
    flip_payload(dataset, 2)
    model = load_model(model_dir, torch.float32)
    evaluation = open_evaluation(open_all(dataset, configure, max_bad_fraction=0.2))
    values = evaluation.losses(model, LossSection())
    assert (values["eval/samples"], values["eval/bad_samples"]) == (7, 1)
    strict = open_evaluation(open_all(dataset, configure))
    with pytest.raises(PipelineError, match=r"1 of 8 held-out samples are damaged, more than train.max_bad_fraction"):
        strict.losses(model, LossSection())


def test_both_kinds_of_held_out_data_are_refused(dataset, configure, tmp_path):
    both = configure(f"train.validation_data={dataset}", "train.validation_fraction=0.1")
    with pytest.raises(ConfigError, match="held-out data come from one of them"):
        train(both, dataset, tmp_path / "run", RunOptions())


@pytest.mark.slow
def test_a_rank_whose_held_out_data_fail_ends_all_at_once(model_dir, repository):
    """In the middle of an evaluation, where the others would wait in a gather of the model until its timeout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        env = {
            **os.environ,
            "PYTHONPATH": str(repository),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": "2",
        }
        env |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(repository / "tests" / "held_out_rank_script.py"), str(model_dir), "500"]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            _, messages = process.communicate(timeout=120)  # far below the group's 500 s
            assert process.returncode == 1
            assert messages.endswith("error: held-out data, rank 1: shard-000007.tar: gone\n"), messages
    finally:
        for process in processes:
            process.kill()


POISONED = """
import os, train.evaluation.held_out as held_out, train.model.decoder as decoder
losses, forward, number = held_out.Evaluation.losses, decoder.HiggsAudio.forward, []
def counted(self, *given):
    number.append(1)
    return losses(self, *given)
def poisoned(self, batch, *given, **named):
    sums = forward(self, batch, *given, **named)
    is_bad = not self.training and len(number) == 1 and os.environ["RANK"] == "1"
    return sums._replace(audio=sums.audio + float("nan")) if is_bad else sums
held_out.Evaluation.losses, decoder.HiggsAudio.forward = counted, poisoned
"""


@pytest.mark.slow
def test_one_rank_whose_held_out_loss_is_nan_judges_nothing(dataset, tiny_dir, repository, tmp_path):
    """Two ranks; rank 1's first evaluation is not finite: no best checkpoint of it, and the later ones are saved."""
    run = tmp_path / "run"
    settings = ["validation_fraction=0.4", "eval_every=2", "save_every=2", "max_steps=6", "packs_per_step=2"]
    settings += ["batch_tokens=700", "keep_checkpoints=9"]
    command = train_command(dataset, run, tiny_dir, 1, *(f"train.{setting}" for setting in settings))[:-2]
    command[2] = POISONED + command[2].replace("; ", "\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in "01":
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**environment(repository), **ranks}
        processes.append(subprocess.Popen(command, cwd=repository, env=env, stderr=subprocess.PIPE, text=True))
    ended = [(process.communicate(timeout=240)[1], process.returncode) for process in processes]
    assert [status for _, status in ended] == [0, 0], ended
    assert "(rank 1): not counted as an evaluation; the best checkpoint stays" in ended[0][0].replace("\n", " ")
    judged = {line["step"]: line.get("eval/audio_loss") for line in history(run) if "eval/samples" in line}
    assert judged[2] is None
    assert {step for step, loss in judged.items() if loss is not None} == {4, 6}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    best = best_checkpoint(run)
    assert best
    losses = {step: loss for step, loss in judged.items() if loss is not None}
    assert best.name == f"checkpoint-{min(losses, key=lambda step: losses[step])}"
