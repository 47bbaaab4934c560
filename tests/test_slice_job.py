"""`preprocess slice` as a job: the same bytes however often it is killed, memory, and what it refuses in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_forms import by_ffmpeg

from preprocess.slicing.cutting import CutRules, Piece
from preprocess.slicing.recording import open_recording
from preprocess.slicing.run import SliceRequest, pieces_of, slice_folder
from preprocess.slicing.voice_activity import _frames
from shards.errors import DataError

RATE = 24000


@pytest.fixture(scope="module")
def recordings(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speakers with two recordings of 3 clips each."""
    root = tmp_path_factory.mktemp("recordings")
    data = repository / "tests" / "data" / "arabic-mini"
    for speaker in ("spk_03", "spk_04"):
        (root / speaker).mkdir()
        clips = [soundfile.read(path)[0] for path in sorted(data.glob(f"{speaker}_*.flac"))]
        for number in range(2):
            parts = [part for clip in clips[3 * number : 3 * number + 3] for part in (clip, np.zeros(RATE // 2))]
            soundfile.write(root / speaker / f"talk {number}.flac", np.concatenate(parts), RATE)
    return root


def cut(source: Path, folder: Path, **changes) -> Path:
    fields = {"source": source, "out": folder / "list.jsonl", "pieces": folder / "list", "without_text": True}
    slice_folder(SliceRequest(**{**fields, **changes}))
    return folder


@pytest.fixture(scope="module")
def done(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(recordings, tmp_path_factory.mktemp("done") / "same")


def tree(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"") for path in files}


def test_a_second_run_changes_nothing(recordings: Path, done: Path, capsys):
    before, times = tree(done), {path: path.stat().st_mtime_ns for path in (done / "list").rglob("*.flac")}
    cut(recordings, done)
    assert "4 of 4, 4 of them cut before" in capsys.readouterr().err
    assert tree(done) == before
    assert {path: path.stat().st_mtime_ns for path in (done / "list").rglob("*.flac")} == times


def test_a_killed_run_ends_with_the_same_bytes(recordings: Path, done: Path, tmp_path: Path, repository: Path):
    folder = tmp_path / "same"
    arguments = ["preprocess", "slice", str(recordings), str(folder / "list.jsonl"), "--without-text"]
    code = f"import sys; sys.argv = {arguments!r}; from preprocess.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=repository, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list(folder.glob("list/*/*.flac"))) < 4 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "list.jsonl").exists(), "killed before its end"
    cut(recordings, folder)
    assert tree(folder) == tree(done)


def test_a_damaged_piece_is_made_again(recordings: Path, done: Path, tmp_path: Path):
    folder = tmp_path / "same"
    shutil.copytree(done, folder)
    first, second, *_ = sorted(folder.rglob("*.flac"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    cut(recordings, folder)
    assert tree(folder) == tree(done)


def test_other_rules_leave_no_old_pieces(recordings: Path, done: Path, tmp_path: Path, capsys):
    folder = tmp_path / "same"
    shutil.copytree(done, folder)
    cut(recordings, folder, rules=CutRules(min_s=2.0, max_s=5.0))
    fresh = cut(recordings, tmp_path / "fresh", rules=CutRules(min_s=2.0, max_s=5.0))
    assert tree(folder) == tree(fresh)
    assert "0 of them cut before" in capsys.readouterr().err


def test_a_recording_that_is_gone_takes_its_pieces(recordings: Path, tmp_path: Path, capsys):
    shutil.copytree(recordings, tmp_path / "source")
    cut(tmp_path / "source", tmp_path / "same")
    shutil.rmtree(tmp_path / "source" / "spk_04")
    cut(tmp_path / "source", tmp_path / "same")
    assert {path.parent.name for path in (tmp_path / "same").rglob("*.flac")} == {"spk_03"}
    assert "pieces of an earlier run" in capsys.readouterr().err


def test_a_foreign_folder_is_left_alone(recordings: Path, tmp_path: Path):
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "mine-000000.flac").write_bytes(b"mine")
    with pytest.raises(DataError, match="not made by slice"):
        cut(recordings, tmp_path)
    assert (tmp_path / "list" / "mine-000000.flac").read_bytes() == b"mine"


def test_memory_does_not_grow_with_the_recording(tmp_path: Path):
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 48000, 2, "PCM_16") as file:
        for _ in range(200):  # 77 MB as floats
            file.write(np.zeros((48000, 2), np.int16))
    recording = open_recording(path)
    tracemalloc.start()
    try:
        assert sum(len(frames) for frames in _frames(recording.mono_16k())) == 200 * 16000 // 512
        pieces = [Piece(start, start + 14.5, ()) for start in np.arange(0.0, 185.0, 14.5)]
        assert {len(samples) for _, samples in pieces_of(recording, pieces)} == {14.5 * 48000}
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def damaged(recordings: Path, kind: str, folder: Path) -> None:
    """A source folder with one recording that is none, or half of one."""
    whole = (recordings / "spk_03" / "talk 0.flac").read_bytes()
    wave, rate = soundfile.read(recordings / "spk_03" / "talk 0.flac")
    (folder / "s").mkdir(parents=True)
    if kind == "half a wav":
        soundfile.write(folder / "s" / "x.wav", wave, rate)
        data = (folder / "s" / "x.wav").read_bytes()
        (folder / "s" / "x.wav").write_bytes(data[: len(data) // 2])
    elif kind == "half a flac":
        (folder / "s" / "x.flac").write_bytes(whole[: len(whole) // 2])
    elif kind == "a page":
        (folder / "s" / "x.mp3").write_bytes(b"<html>not found</html>")
    elif kind == "m4a":
        (folder / "s" / "x.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + b"\0" * 64)
    elif kind in ("half an m4a", "half a webm"):
        container, codec = {"half an m4a": ("mp4", "aac"), "half a webm": ("webm", "libopus")}[kind]
        data = by_ffmpeg(wave.astype(np.float32), container, codec, 48000)
        (folder / "s" / f"x.{container}").write_bytes(data[: len(data) // 2])
    elif kind == "nothing":
        (folder / "s" / "x.wav").write_bytes(b"")
    elif kind == "a pipe":
        os.mkfifo(folder / "s" / "x.wav")
    elif kind == "nan":
        wave[RATE] = np.nan
        soundfile.write(folder / "s" / "x.wav", wave, rate, subtype="FLOAT")
    elif kind == "two joined wavs":
        soundfile.write(folder / "s" / "x.wav", wave, rate)
        data = (folder / "s" / "x.wav").read_bytes()
        (folder / "s" / "x.wav").write_bytes(data + data)
    elif kind == "silence":
        soundfile.write(folder / "s" / "x.wav", np.zeros(RATE * 5), rate)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("half a wav", "audio_truncated"),
        ("half a flac", "audio_(truncated|unreadable)"),
        ("a page", "audio_unreadable: a web page"),
        ("m4a", "audio_unreadable: m4a or mp4"),
        ("half an m4a", "audio_(truncated|unreadable)"),
        ("half a webm", "audio_(truncated|unreadable)"),
        ("nothing", "audio_unreadable: an empty file"),
        ("a pipe", "audio_missing: not a regular file"),
        ("nan", "audio_not_finite"),
        ("two joined wavs", "audio_several"),
        ("silence", "no speech found"),
    ],
)
def test_damaged_recordings_are_named(recordings: Path, tmp_path: Path, kind: str, message: str):
    damaged(recordings, kind, tmp_path / "source")
    with pytest.raises(DataError, match=message) as fault:
        cut(tmp_path / "source", tmp_path / "out")
    assert "\n" not in str(fault.value)
    assert not list((tmp_path / "out").rglob("*.flac"))


def test_one_damaged_recording_does_not_end_the_others(recordings: Path, tmp_path: Path, capsys):
    damaged(recordings, "half a wav", tmp_path / "source")
    shutil.copytree(recordings / "spk_03", tmp_path / "source" / "spk_03")
    cut(tmp_path / "source", tmp_path / "out")
    said = capsys.readouterr().err
    assert "x.wav: audio_truncated" in said
    assert "2 of 3" in said


def test_odd_recordings_and_names_are_cut_or_named(recordings: Path, tmp_path: Path, capsys):
    """8 and 96 kHz, six channels; blanks, Arabic letters and a line end in names; a name that is no Unicode is skipped."""
    wave, _ = soundfile.read(recordings / "spk_03" / "talk 0.flac", dtype="float32")
    odd = {
        "متحدث أول/تسجيل ١.wav": (wave[::3], 8000, "PCM_16"),
        "six/ch.wav": (np.stack([wave * 0.9**channel for channel in range(6)], axis=1), RATE, "PCM_16"),
        "high/x.wav": (np.repeat(wave, 4), 4 * RATE, "PCM_24"),
        "new\nline/x\ny & z.flac": (wave, RATE, "PCM_16"),
    }
    for name, (samples, rate, subtype) in odd.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        soundfile.write(tmp_path / "in" / name, samples, rate, subtype=subtype)
    unnamed = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xfe.wav"))
    unnamed.write_bytes((tmp_path / "in" / "six" / "ch.wav").read_bytes())
    (tmp_path / "in" / "notes.pdf").write_bytes(b"x")
    out = cut(tmp_path / "in", tmp_path / "out")
    said = capsys.readouterr().err
    assert "its name is not valid Unicode" in said
    assert "not looked at  .pdf 1" in said
    assert "recordings     4 of 5" in said
    rows = [json.loads(line) for line in (out / "list.jsonl").read_text().splitlines()]
    for name, (samples, rate, _) in odd.items():
        mine = [row["messages"][2]["content"][1]["audio_url"] for row in rows if row["recording"] == name]
        assert len(mine) >= 2
        for path in mine:
            assert (soundfile.info(path).samplerate, soundfile.info(path).channels) == (
                rate,
                6 if samples.ndim > 1 else 1,
            )
    before = tree(out)
    cut(tmp_path / "in", tmp_path / "out")
    assert tree(out) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no recording found"),
        (
            lambda folder: [folder.mkdir(), *((folder / f"x{end}").write_bytes(b"1") for end in (".wav", ".mp3"))],
            "one name",
        ),
    ],
)
def test_folders_without_recordings_are_refused(make, message: str, tmp_path: Path):
    make(tmp_path / "source")
    with pytest.raises(DataError, match=message):
        cut(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("webm", "libopus")])
def test_m4a_and_webm_are_cut_where_the_wav_is(recordings: Path, tmp_path: Path, container: str, codec: str):
    wave, _ = soundfile.read(recordings / "spk_03" / "talk 0.flac", dtype="float32")
    slow = np.repeat(wave, 2)  # 48 kHz, for Opus
    for name in ("packed", "plain"):
        (tmp_path / name / "s").mkdir(parents=True)
    soundfile.write(tmp_path / "plain" / "s" / "x.wav", slow, 48000)
    (tmp_path / "packed" / "s" / f"x.{'m4a' if container == 'mp4' else container}").write_bytes(
        by_ffmpeg(slow, container, codec, 48000)
    )
    bounds = []
    for name in ("packed", "plain"):
        cut(tmp_path / name, tmp_path / f"{name}-out")
        rows = [json.loads(line) for line in (tmp_path / f"{name}-out" / "list.jsonl").read_text().splitlines()]
        bounds.append(sorted((row["recording_start_s"], row["recording_end_s"]) for row in rows))
        for path in (tmp_path / f"{name}-out").rglob("*.flac"):
            assert soundfile.info(path).samplerate == 48000
    assert len(bounds[0]) >= 2
    np.testing.assert_allclose(bounds[0], bounds[1], atol=0.13)  # two frames of voice activity, and AAC's priming


def test_pieces_among_the_recordings_are_refused(recordings: Path, tmp_path: Path):
    shutil.copytree(recordings, tmp_path / "in")
    before = tree(tmp_path / "in")
    for pieces in (tmp_path / "in" / "list", tmp_path / "in", tmp_path / "out" / ".." / "in" / "x"):
        with pytest.raises(DataError, match="the next run would cut the pieces again"):
            cut(tmp_path / "in", tmp_path / "out", pieces=pieces)
    assert tree(tmp_path / "in") == before
