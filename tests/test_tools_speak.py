"""The command `speak`: what is wrong in it is one line before the model is loaded, and what it writes is what was asked for."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

import tools.audio_output
import tools.speaker
from tools.audio_output import numbered, pcm16, stream_header, write_audio
from tools.speak import main, read_texts

CLIP = "tests/data/arabic-mini/spk_00_36.flac"


@pytest.fixture
def speak(repository, tiny_dir, monkeypatch, tmp_path):
    """A function (arguments) -> result of `speak` in this process, with the tiny model and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    fixed = [tiny_dir / "model", "--config", tiny_dir / "pipeline.toml", "--device", "cpu"]

    def run(*arguments: object, reference: object = repository / CLIP):
        voice = [] if reference is None else ["--reference", reference]
        return CliRunner().invoke(main, [str(part) for part in (*fixed, *voice, *arguments)])

    return run


@pytest.fixture
def no_model(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(tools.speaker, "load_speaker", refuse)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--text", "نص", "--max-seconds", "-1"), 2, "max_seconds = -1.0: expected"),
        (("--text", "نص", "--max-seconds", "0"), 2, "max_seconds = 0.0: expected"),
        (("--text", "نص", "--max-seconds", "nan"), 2, "max_seconds = nan: expected"),
        (("--text", "نص", "--temperature", "-1"), 2, "temperature = -1.0: expected"),
        (("--text", "نص", "--top-p", "0"), 2, "top_p = 0.0: expected"),
        (("--text", "نص", "--top-p", "1.1"), 2, "top_p = 1.1: expected"),
        (("--text", "نص", "--out", "speech.m4a"), 2, "known are .wav, .flac, .mp3, .ogg"),
        (("--text", "نص", "--out", "speech"), 2, "known are"),
        (("--text", "نص", "--slots", "0"), 2, "--slots 0"),
        (("--text", "نص", "--reference-text", "أ", "--reference-text", "ب"), 2, "give one for each"),
        ((), 2, "--text or --text-file is missing"),
        (("--text", "نص", "--out", "a.wav", "--codes", "a.wav"), 2, "a.wav: it would be written twice"),
        (("--text", "نص", "--lines"), 2, "--lines"),
        (("--text", "نص", "--text", "نص", "--stream"), 2, "--stream speaks one text"),
        (("--text", "نص", "--stream", "--json"), 2, "without --json"),
        (("--text", "نص", "--stream", "--first-chunk", "1"), 2, "--first-chunk 1: expected 2 or more"),
        (
            ("--text", "نص", "--first-chunk", "8"),
            2,
            "--first-chunk 8: expected 2 or more (frames of 40 ms), and --stream",
        ),
        (("--text", "نص", "--play-codes", "x.npy"), 2, "--play-codes decodes"),
        (("--text", "<|AUDIO_OUT|>"), 1, "'<|AUDIO_OUT|>' in '<|AUDIO_OUT|>': no text may hold that"),
        (("--text", "نص <|eot\u200f_id|>"), 1, "'<|eot_id|>'"),
        (("--text", "نص", "--reference-text", "<|audio_eos|>"), 1, "--reference-text: '<|audio_eos|>'"),
        (("--text", "a\x1b[2Jb"), 1, "no text may hold that"),
        (("--text", " "), 1, "holds no letter or digit"),
        (("--text-file", "nowhere.txt"), 1, "nowhere.txt: No such file"),
        (("--text-file", "latin.txt"), 1, "not UTF-8 at byte 1"),
        (("--text-file", "empty.txt"), 1, "holds no text"),
        (("--text-file", "."), 1, "Is a directory"),
    ],
)
def test_mistakes_are_one_line_before_the_model_loads(speak, no_model, tmp_path, arguments, status, message):
    (tmp_path / "latin.txt").write_bytes(b"a\xe9")
    (tmp_path / "empty.txt").write_text("\n \n")
    result = speak(*arguments)
    assert result.exit_code == status, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("speech*"))


@pytest.mark.parametrize("reference", ["nowhere.wav", ".", "empty.txt"])
def test_an_unreadable_reference_is_one_line(speak, no_model, tmp_path, reference):
    (tmp_path / "empty.txt").write_text("")
    result = speak("--text", "نص", reference=reference)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: reference {reference}: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_the_suffix_decides_the_kind(tmp_path, suffix):
    wave = (0.5 * np.sin(np.arange(24000 * 31) / 20)).astype(np.float32)
    wave[:3] = 1.5
    path = tmp_path / f"speech.{suffix}"
    assert write_audio(path, wave, 24000) == 3
    read_back, rate = soundfile.read(path, dtype="float32")
    assert rate == 24000
    assert abs(len(read_back) - len(wave)) < 3000
    assert abs(np.abs(read_back[30000:-30000]).max() - 0.5) < 0.06
    assert soundfile.info(path).format == {"mp3": "MPEG"}.get(suffix, suffix.upper()) or suffix == "mp3"


def test_a_stream_is_a_wav_that_players_read():
    wave = np.linspace(-1, 1, 4800, dtype=np.float32)
    read_back, rate = soundfile.read(io.BytesIO(stream_header(24000) + pcm16(wave)), dtype="float32")
    assert rate == 24000
    np.testing.assert_allclose(read_back, wave, atol=1e-4)


def test_several_texts_become_numbered_files(speak, tmp_path, caplog):
    (tmp_path / "texts.txt").write_text("\ufeffنعم\n\nلا أعرف\n", encoding="utf-8")
    options = ("--max-seconds", 0.2, "--out", "new/said.flac", "--codes", "codes.npy", "--json", "--slots", 2)
    result = speak("--text", "أولا", "--text-file", "texts.txt", "--lines", *options)
    assert result.exit_code == 0, result.output
    names = ["new/said-001.flac", "new/said-002.flac", "new/said-003.flac"]
    facts = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["out"] for one in facts] == names
    for number, (name, one) in enumerate(zip(names, facts, strict=True), 1):
        assert soundfile.info(name).frames == 960 * one["frames"]
        assert np.load(f"codes-{number:03d}.npy").shape == (8, one["frames"])
        assert one["stop_reason"] == "max_seconds" or one["stopped"]
    assert "clones are better" in caplog.text
    assert numbered(Path("a.b.wav"), 3, 1) == Path("a.b.wav")


def test_given_codes_are_played(speak, tmp_path, monkeypatch):
    monkeypatch.setattr(tools.speaker, "load_speaker", None)
    np.save("codes.npy", np.random.default_rng(0).integers(0, 1024, (8, 12)))
    result = speak("--play-codes", "codes.npy", "--out", "played.wav", reference=None)
    assert result.exit_code == 0, result.output
    assert soundfile.info("played.wav").frames == 12 * 960


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((8, 0), np.int64), "expected whole numbers [8, T]"),
        (np.zeros((7, 4), np.int64), "expected whole numbers [8, T]"),
        (np.zeros((8, 4)), "expected whole numbers [8, T]"),
        (np.full((8, 4), 1024), "expected 0 to 1023"),
        (np.full((8, 4), -1), "expected 0 to 1023"),
        (np.array([[None]]), "allow_pickle"),
        (None, "No such file"),
        (b"\x93NUMPY\x01\x00\x0c\x00{'descr': ((", "not an .npy file of codes"),
        (b"PK\x03\x04 no archive", "not an .npy file of codes"),
    ],
)
def test_what_are_no_codes_is_one_line(speak, codes, message):
    if isinstance(codes, bytes):
        Path("codes.npy").write_bytes(codes)
    elif codes is not None:
        np.save("codes.npy", codes, allow_pickle=True)
    result = speak("--play-codes", "codes.npy", reference=None)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_stream_goes_to_stdout_piece_by_piece(speak, tmp_path):
    options = ("--text", "نعم", "--reference-text", "الجسر", "--max-seconds", 0.4, "--stream")
    result = speak(*options)
    assert result.exit_code == 0, result.output
    streamed, rate = soundfile.read(io.BytesIO(result.stdout_bytes), dtype="int16")
    assert rate == 24000
    assert not (tmp_path / "speech.wav").exists()
    assert speak(*options[:-1], "--out", "whole.wav").exit_code == 0
    whole, _ = soundfile.read("whole.wav", dtype="int16")
    assert len(streamed) == len(whole)
    assert np.abs(streamed.astype(int) - whole).max() <= 2
    early = speak(*options, "--first-chunk", 4)
    assert early.exit_code == 0, early.output
    assert len(early.stdout_bytes) == len(result.stdout_bytes)


def test_a_stream_into_a_closed_pipe_ends_without_a_fault(speak, monkeypatch):
    """As with `| head`: nobody listens any more, which is no fault to speak of."""

    def closed(_: object) -> bytes:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(tools.audio_output, "pcm16", closed)
    result = speak("--text", "نعم", "--reference-text", "الجسر", "--max-seconds", 0.4, "--stream")
    assert isinstance(result.exception, SystemExit)
    assert "error" not in result.stderr
    assert "Traceback" not in result.stderr


def test_a_recording_is_not_overwritten(speak, no_model, repository, tmp_path):
    for name, texts in (("speech.wav", ["نص"]), ("speech-002.wav", ["نص", "نص"])):
        recording = tmp_path / name
        recording.write_bytes((repository / CLIP).read_bytes())
        result = speak(*(part for text in texts for part in ("--text", text)), reference=name)
        assert result.exit_code == 2
        assert f"{name}: this command reads it" in result.stderr
        assert recording.read_bytes() == (repository / CLIP).read_bytes()


def test_only_line_ends_end_a_line(tmp_path):
    (tmp_path / "texts.txt").write_bytes("أولا\u2028وثانيا\r\n\r\nثالثا\x0bرابعا\n".encode())
    assert read_texts(tmp_path / "texts.txt", True) == ["أولا\u2028وثانيا", "ثالثا\x0bرابعا"]
