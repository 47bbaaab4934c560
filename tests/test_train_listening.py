"""The listening set through the real loop: files a person can compare, two numbers, and training left untouched."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from shards.config import SequenceSection, read_config
from shards.encoders.codec import load_codec
from shards.index import hash64
from shards.reader import SampleReader
from shards.sequence import SequenceBuilder
from train.config import TrainConfig
from train.data.validation_split import choose_samples
from train.evaluation.free_running import MAX_FRAMES, FreeRunning
from train.evaluation.listening import LONGEST, SPARE_FRAMES
from train.loop import RunOptions, train
from train.model.generate import GREEDY, generate
from train.world import ALONE

FRAME = 960  # samples at 24 kHz


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As each of two ranks has: with another number, sums and convolutions round the last bit otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_dataset, make_sample) -> Path:
    samples = [make_sample(seed, 5 + seed, 8 + 2 * seed) for seed in range(12)]
    return make_dataset(tmp_path_factory.mktemp("dataset"), samples)


QUICK = [
    "train.device=cpu",
    "train.batch_tokens=700",
    "train.packs_per_step=2",
    "train.max_steps=4",
    "train.log_every=1",
]
QUICK += ["train.num_workers=0", "lora.rank=4", "train.learning_rate=3e-3", "train.eval_every=2"]


@pytest.fixture(scope="module")
def settings(tiny_dir: Path):
    def make(*overrides: str) -> TrainConfig:
        return read_config(TrainConfig, tiny_dir / "pipeline.toml", [*QUICK, *overrides])

    return make


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(dataset, settings, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    train(settings("train.listening_samples=2", "train.validation_fraction=0.3"), dataset, run, RunOptions())
    return run


def test_every_evaluation_leaves_speech_of_held_out_voices(run, dataset, tiny_dir):
    samples = {sample.key: sample for sample in SampleReader(dataset).read_all(np.load(dataset / "index.npy"))}
    folders = sorted((run / "listening").iterdir())
    assert len(folders) == 2
    speakers = set()
    for folder in folders:
        names = {"text.txt", "reference.wav", "target.wav", "step-000000.wav", "step-000002.wav", "step-000004.wav"}
        assert {path.name for path in folder.iterdir()} == names
        sample = samples[folder.name]
        text = (folder / "text.txt").read_text()
        assert sample.facts.texts[sample.facts.target_text] in text
        speakers.add(sample.facts.speaker)
        wave, sample_rate = soundfile.read(folder / "target.wav", dtype="float32")
        assert sample_rate == 24000
        decoded = load_codec(tiny_dir / "codec").decode(sample.target_codes)
        np.testing.assert_allclose(wave, np.clip(decoded, -1, 1), atol=1 / 32767)
        longest = round(LONGEST * sample.target_codes.shape[1]) + SPARE_FRAMES
        for path in folder.glob("step-*.wav"):
            assert soundfile.info(path).frames % FRAME == 0
            assert soundfile.info(path).frames <= longest * FRAME
    assert len(speakers) == 1, "the one held-out speaker"
    spoken = [line for line in lines(run) if "eval/speech_ended" in line]
    assert [line["step"] for line in spoken] == [2, 4]
    assert all(0 <= line["eval/speech_ended"] <= 1 and line["eval/speech_length_ratio"] > 0 for line in spoken)
    assert all(0 <= line[f"eval/free_running_{k}"] <= 1 for line in spoken for k in range(8))


def test_free_running_counts_what_the_model_says_by_itself(tiny_speaker, make_sample):
    """Targets made of its own greedy codes, then with faults at known places and frames that it does not say."""
    model, builder = tiny_speaker.model, tiny_speaker.builder
    recorded = make_sample(3, 6, 40)
    said = generate(model, builder.prompt(recorded), 40, GREEDY).codes
    own = dataclasses.replace(recorded, target_codes=said)
    assert said.shape[1] > MAX_FRAMES, "else this says nothing"
    assert FreeRunning([own], builder, ALONE).accuracy(model, lambda: False)["eval/free_running"] == 1
    faulty = said.copy()
    faulty[3, [0, 7]] ^= 1
    faulty[5, MAX_FRAMES] ^= 1  # the first that is not looked at
    short = dataclasses.replace(recorded, target_codes=said[:, :5])
    found = FreeRunning([dataclasses.replace(own, target_codes=faulty), short], builder, ALONE).accuracy(
        model, lambda: False
    )
    shares = [1 if k != 3 else 28 / 30 for k in range(8)]
    assert [found[f"eval/free_running_{k}"] for k in range(8)] == pytest.approx(shares)
    assert FreeRunning([own], builder, ALONE).accuracy(model, lambda: True) == {}


def test_the_adapter_is_what_speaks(run):
    """Speech before training and after it differ; a copy of the base would go on saying the same."""
    for folder in (run / "listening").iterdir():
        assert (folder / "step-000000.wav").read_bytes() != (folder / "step-000004.wav").read_bytes()


def test_training_is_the_same_with_and_without(run, dataset, settings, tmp_path):
    silent = tmp_path / "silent"
    train(settings("train.listening_samples=0", "train.validation_fraction=0.3"), dataset, silent, RunOptions())
    assert not (silent / "listening").exists()
    assert [line["loss/total_loss"] for line in lines(run)] == [line["loss/total_loss"] for line in lines(silent)]
    assert [line["metrics/grad_norm"] for line in lines(run)] == [line["metrics/grad_norm"] for line in lines(silent)]


@pytest.mark.slow
@pytest.mark.parametrize(("shard_base", "compiler"), [("false", "off"), ("true", "aot_eager")])
def test_two_ranks_speak_what_one_speaks(run, dataset, tiny_dir, run_command, tmp_path, shard_base, compiler):
    """Compiled blocks too: speech runs beside them without being compiled for every length."""
    ranks = tmp_path / "ranks"
    given = ["train.listening_samples=2", "train.validation_fraction=0.3", f"train.shard_base={shard_base}"]
    options = [part for setting in [*QUICK, *given, f"train.compile={compiler}"] for part in ("--set", setting)]
    done = run_command(
        "train", dataset, ranks, "--config", tiny_dir / "pipeline.toml", "--gpus", 2, "--skip-preflight", *options
    )
    assert done.returncode == 0, done.stderr
    for folder in (run / "listening").iterdir():
        for path in folder.iterdir():
            assert path.read_bytes() == (ranks / "listening" / folder.name / path.name).read_bytes(), path.name
    alone, together = (
        [{k: v for k, v in line.items() if k.startswith(("eval/free_running", "accuracy/"))} for line in lines(folder)]
        for folder in (run, ranks)
    )
    assert together == [pytest.approx(line) for line in alone]


def test_without_held_out_data_it_speaks_training_samples(dataset, settings, tmp_path, monkeypatch):
    """A disk that takes no file stops no training."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.evaluation.listening.write_wave", full)
    train(settings("train.listening_samples=1", "train.max_steps=1"), dataset, tmp_path / "run", RunOptions())
    (folder,) = (tmp_path / "run" / "listening").iterdir()
    assert {path.name for path in folder.iterdir()} == {"text.txt"}
    logged = (tmp_path / "run" / "logs" / "training.log").read_text()
    assert "step-000001.wav: not written: [Errno 28] No space left on device; training goes on" in logged
    assert "x as long as recorded" in logged


def test_each_sample_is_of_another_speaker_and_short_first(tokenizer, make_dataset, make_sample, tmp_path):
    frames = [300, 20, 20, 20, 20]
    speakers = ["a", "b", "b", "c", "b"]
    samples = [make_sample(i, 5, frames[i], speaker=speakers[i]) for i in range(5)]
    folder = make_dataset(tmp_path / "set", samples)
    index = np.load(folder / "index.npy")
    reader, builder = SampleReader(folder), SequenceBuilder(tokenizer, SequenceSection())
    assert [sample.facts.row for sample in choose_samples(reader, index, None, 4, builder)] == [1, 3, 0, 2]
    keep_b = lambda rows: rows["speaker"] == hash64("b")  # noqa: E731 - one line is all there is to it
    assert [sample.facts.row for sample in choose_samples(reader, index, keep_b, 9, builder)] == [1, 2, 4]


def test_a_stream_speaks_too(dataset, settings, tmp_path):
    streamed = ["train.loader=stream", "train.shuffle_buffer=4", "train.max_steps=1", "train.listening_samples=3"]
    train(settings(*streamed), dataset, tmp_path / "run", RunOptions())
    assert len(list((tmp_path / "run" / "listening").glob("*/step-000001.wav"))) == 3


def test_a_signal_breaks_off_evaluation_but_not_the_checkpoint(dataset, settings, tmp_path, monkeypatch):
    """A signal in the middle of an evaluation: nothing more is evaluated or spoken, and the run saves and stops."""
    import os
    import signal

    from train.evaluation import held_out, listening
    from train.signals import Stopped

    asked = []
    whole = held_out.Evaluation.losses

    def signalled(self, model, section, interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        asked.append(whole(self, model, section, interrupted))
        return asked[-1]

    spoken = []
    monkeypatch.setattr(held_out.Evaluation, "losses", signalled)
    monkeypatch.setattr(listening.Listening, "_write", lambda self, path, codes: spoken.append(path.name))
    run = tmp_path / "run"
    with pytest.raises(Stopped, match="stopped by a signal after step 2"):
        train(settings("train.listening_samples=2", "train.validation_fraction=0.3"), dataset, run, RunOptions())
    assert asked == [{}]
    assert set(spoken) == {"reference.wav", "target.wav", "step-000000.wav"}
    assert (run / "checkpoints" / "checkpoint-2" / "COMPLETE").is_file()
    assert "evaluation interrupted by a signal" in (run / "logs" / "training.log").read_text()
    assert "eval/speech_ended" not in lines(run)[-1]


def test_speech_is_broken_off_within_a_second_of_it(model_dir, tokenizer, make_sample):
    from shards.config import SequenceSection
    from shards.sequence import SequenceBuilder
    from train.model.generate import generate
    from train.model.weights import load_model

    model = load_model(model_dir, torch.float32)
    prompt = SequenceBuilder(tokenizer, SequenceSection()).prompt(make_sample(0))
    asked = iter([False, True])
    speech = generate(model, prompt, 200, interrupted=lambda: next(asked))
    assert not speech.stopped
    assert 25 <= speech.codes.shape[1] <= 50


def test_speaking_takes_nothing_from_the_throughput_logged(dataset, settings, tmp_path, monkeypatch):
    """Every check takes eleven days here; the steps between them do not."""
    from train import loop, step

    days = []
    evaluate = loop.evaluate

    def long_evaluate(*given):
        days.append(11)
        return evaluate(*given)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 86_400 * sum(days), perf_counter=time.perf_counter)
    monkeypatch.setattr(step, "time", clock)
    monkeypatch.setattr(loop, "evaluate", long_evaluate)
    train(settings("train.listening_samples=1"), dataset, tmp_path / "run", RunOptions())
    assert len(days) == 3, "before the first step, and after steps 2 and 4"
    assert all(line["metrics/samples_per_second"] > 1e-3 for line in lines(tmp_path / "run"))


@pytest.mark.slow
def test_trackers_get_the_sound(dataset, settings, tmp_path):
    """Weights & Biases without a network, and TensorBoard."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    tracked = ["train.listening_samples=1", "train.max_steps=1", "wandb.mode=offline", "train.tensorboard=true"]
    train(settings(*tracked), dataset, run, RunOptions())
    (folder,) = (run / "listening").iterdir()
    spoken = {path.read_bytes() for path in folder.glob("step-*.wav")}
    assert {path.read_bytes() for path in run.rglob("wandb/offline-run-*/files/media/audio/listening/*.wav")} == spoken
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"audio": 0})
    events.Reload()
    assert [audio.step for audio in events.Audio(f"listening/{folder.name}")] == [0, 1]
