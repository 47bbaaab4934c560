"""`preprocess slice --asr`: figures kept, limits that list what they reject, no piece heard twice, and the real recognizer."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
import soundfile
from fake_recognizer import FakeRecognizer

from preprocess.slicing.pieces_folder import Heard
from preprocess.slicing.recognition import HearingLimits, load_recognizer
from preprocess.slicing.run import SliceRequest, slice_folder
from preprocess.sources import SourceRow, find_pair, read_rows
from shards.errors import ConfigError, DataError

RATE = 24000


@pytest.fixture(scope="module")
def recordings(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One speaker, two recordings of three clips; the second one has a transcript."""
    root = tmp_path_factory.mktemp("recordings")
    clips = sorted((repository / "tests" / "data" / "arabic-mini").glob("spk_03_*.flac"))
    (root / "spk_03").mkdir()
    for name, chosen in (("heard", clips[:3]), ("written", clips[3:6])):
        parts = [part for clip in chosen for part in (soundfile.read(clip)[0], np.zeros(RATE))]
        soundfile.write(root / "spk_03" / f"{name}.flac", np.concatenate(parts), RATE)
    (root / "spk_03" / "written.srt").write_text("1\n00:00:00,000 --> 00:00:14,900\nمكتوب\n")
    return root


def sliced(recordings: Path, folder: Path, recognizer: FakeRecognizer, **changes) -> list[SourceRow]:
    fields = {"source": recordings, "out": folder / "list.jsonl", "pieces": folder / "list"}
    slice_folder(SliceRequest(**{**fields, **changes}), recognizer)
    return [row for row in read_rows(folder / "list.jsonl") if isinstance(row, SourceRow)]


@pytest.fixture(scope="module")
def done(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done") / "same"
    sliced(recordings, folder, FakeRecognizer())
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"") for path in files}


def test_rows_keep_the_figures_and_a_transcript_counts_more(done: Path):
    rows = [row for row in read_rows(done / "list.jsonl") if isinstance(row, SourceRow)]
    heard = [row for row in rows if row.extra["recording"] == "spk_03/heard.flac"]
    assert 2 <= len(heard) < len(rows)
    for row in heard:
        assert find_pair(row.chat).target_text.startswith("نص ")
        assert row.extra["asr_log_probability"] == -0.3
        assert row.extra["asr_no_speech_probability"] == 0.1
        assert row.extra["asr_compression_ratio"] == 1.2
    written = [row for row in rows if row not in heard]
    assert {find_pair(row.chat).target_text for row in written} == {"مكتوب"}
    assert not any("asr_log_probability" in row.extra for row in written)


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ((-1.1, 0.1, 1.2), "asr_unsure"),
        ((float("nan"), 0.1, 1.2), "asr_unsure"),
        ((-0.3, 0.7, 1.2), "asr_no_speech"),
        ((-0.3, 0.1, 2.5), "asr_repeats"),
    ],
)
def test_what_a_limit_rejects_is_counted_and_listed(recordings, tmp_path: Path, capsys, figures, reason: str):
    rows = sliced(recordings, tmp_path, FakeRecognizer(figures=((-0.3, 0.1, 1.2), figures)))
    skipped = [json.loads(line) for line in (tmp_path / "list" / "skipped.jsonl").read_text().splitlines()]
    rejected = [row for row in skipped if row["reason"] == reason]
    assert rejected
    assert f"{reason} {len(rejected)} (" in capsys.readouterr().err
    assert all(Path(row["audio"]).is_file() and row["text"].startswith("نص ") for row in rejected)
    places = {(row["recording"], row["recording_start_s"]) for row in rejected}
    assert not places & {(row.extra["recording"], row.extra["recording_start_s"]) for row in rows}
    told = [row for row in skipped if row["reason"] == "only_piece"]
    assert len(list((tmp_path / "list").rglob("*.flac"))) == len(rows) + len(rejected) + len(told)


def test_other_limits_need_no_second_hearing(recordings: Path, tmp_path: Path):
    unsure = FakeRecognizer(figures=((-0.3, 0.1, 1.2), (-1.1, 0.1, 1.2)))
    fewer = sliced(recordings, tmp_path, unsure)
    before = unsure.num_heard
    all_rows = sliced(recordings, tmp_path, unsure, limits=HearingLimits(min_log_probability=-2.0))
    assert unsure.num_heard == before > 0
    assert len(all_rows) > len(fewer)
    other = FakeRecognizer("another model")
    sliced(recordings, tmp_path, other)
    assert other.num_heard == before


def test_a_killed_recognition_hears_nothing_twice(recordings: Path, done: Path, tmp_path: Path, repository: Path):
    folder = tmp_path / "same"
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "from fake_recognizer import FakeRecognizer\nfrom preprocess.slicing.run import SliceRequest, slice_folder\n"
        f"folder = Path({str(folder)!r})\n"
        f"request = SliceRequest(source=Path({str(recordings)!r}), out=folder / 'list.jsonl', pieces=folder / 'list')\n"
        "slice_folder(request, FakeRecognizer(seconds=0.3))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=repository, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list(folder.glob("list/.slice/heard/*.json")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    num_before = len(list(folder.glob("list/.slice/heard/*.json")))
    assert num_before > 0
    assert not (folder / "list.jsonl").exists(), "killed before its end"
    again = FakeRecognizer()
    sliced(recordings, folder, again)
    assert tree(folder) == tree(done)
    assert again.num_heard == len(list(folder.glob("list/.slice/heard/*.json"))) - num_before


def test_a_recognizer_that_fails_is_one_line(recordings: Path, tmp_path: Path):
    class Failing(FakeRecognizer):
        def hear(self, wave: np.ndarray) -> Heard:
            raise RuntimeError("out of memory\nmore")

    with pytest.raises(DataError, match=r"heard-000000.flac: the recognizer failed: RuntimeError: out of memory$"):
        sliced(recordings, tmp_path, Failing())


@pytest.mark.parametrize("name", ["google", "whisper:/nowhere", "faster-whisper", "faster-whisper:/nowhere"])
def test_an_unknown_recognizer_is_refused_in_words(name: str):
    with pytest.raises(ConfigError, match=r"--asr .*(known: faster-whisper:FOLDER|no model\.bin there)"):
        load_recognizer(name, "ar", "cpu")


def test_a_missing_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model.bin").write_bytes(b"x")
    real = builtins.__import__

    def without(name, *rest, **named):
        if name == "faster_whisper":
            raise ImportError(name, name=name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"--asr needs faster-whisper.*pip install -e '\.\[slice,asr\]'") as fault:
        load_recognizer(f"faster-whisper:{tmp_path}", "ar", "cpu")
    assert "\n" not in str(fault.value)


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path):
    pytest.importorskip("faster_whisper")
    (tmp_path / "model.bin").write_bytes(b"no model")
    with pytest.raises(ConfigError, match="not loadable") as fault:
        load_recognizer(f"faster-whisper:{tmp_path}", "ar", "cpu")
    assert "\n" not in str(fault.value)


@pytest.mark.models
def test_the_real_recognizer_gives_all_three_figures(whisper_base: Path, done: Path):
    recognizer = load_recognizer(f"faster-whisper:{whisper_base}", "ar", "cpu")
    with pytest.raises(ConfigError, match="the model knows no such language"):
        load_recognizer(f"faster-whisper:{whisper_base}", "arabic", "cpu")
    samples, _ = soundfile.read(sorted(done.rglob("heard-*.flac"))[0], dtype="float32")
    heard = recognizer.hear(
        np.ascontiguousarray(samples[::2][: 6 * 12000])
    )  # at a wrong speed: it need not be understood
    silent = recognizer.hear(np.zeros(16000 * 4, np.float32))
    assert heard.text
    assert -5 < heard.log_probability < 0
    assert 0 <= heard.no_speech_probability < silent.no_speech_probability or not silent.text
    assert heard.compression_ratio > 0.5
    assert HearingLimits().fault(silent) is not None


def test_the_command_hands_limits_and_recognizer_on(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from preprocess.cli import main

    asked = []
    fake = FakeRecognizer(figures=((-1.5, 0.7, 2.6),))
    monkeypatch.setattr("preprocess.slicing.recognition.load_recognizer", lambda *names: (asked.append(names), fake)[1])
    options = ["--min-log-probability", "-2", "--max-no-speech", "0.8", "--max-compression", "3", "--language", "arz"]
    arguments = ["slice", str(recordings), str(tmp_path / "list.jsonl"), "--asr", "faster-whisper:x", *options]
    main(arguments, standalone_mode=False)
    assert asked == [("faster-whisper:x", "arz", "cpu")]
    rows = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert sum("asr_log_probability" in row for row in rows) >= 2
    with pytest.raises(click.UsageError, match="exclude each other"):
        main([*arguments, "--without-text"], standalone_mode=False)
