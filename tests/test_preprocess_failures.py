"""Failures beyond a user's plain mistakes: --new-job on a foreign folder, cut-off compressed lists, half-written shards."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import zstandard

from preprocess import report
from preprocess.audio import AudioLimits, decode, read_bytes
from preprocess.job_folder import remove_job
from preprocess.reasons import AudioFault
from preprocess.sources import SourceRow, read_rows
from shards import writer
from shards.encoders.codec import codec_layout
from shards.errors import CheckpointError, DataError, ShardError
from shards.manifest import Fingerprints, Job
from shards.reader import SampleReader
from shards.writer import write_json

ROW = {"messages": [{"role": "user", "content": "مرحبا"}]}
JOB = Job(
    config={},
    fingerprints=Fingerprints("c", "t", None),
    input_sha256="i",
    input_path="p",
    num_rows=1,
    num_shards=1,
    rows_per_shard=1,
)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    for name in ("shards/source.py", "job/mine.txt", "encoded/mine.txt", "report.json", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not to be lost")
    return tmp_path


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_new_job_deletes_nothing_of_a_folder_that_is_no_job(foreign, run_command, arabic_mini, tiny_dir):
    before = names(foreign)
    options = ("--new-job", "--limit", 2, "--config", tiny_dir / "pipeline.toml")
    result = run_command("preprocess", arabic_mini, foreign, *options)
    assert result.returncode == 1
    assert "and no job of ours" in result.stderr
    assert names(foreign) == before
    (foreign / "job.json").write_text('{"somebody": "else"}')
    with pytest.raises(ShardError, match="unreadable Job record"):
        remove_job(foreign)
    assert names(foreign) == before | {"job.json"}


def test_new_job_goes_on_where_it_was_killed(foreign):
    write_json(foreign / "job.removed.json", JOB)
    remove_job(foreign)
    assert names(foreign) == {"notes.txt", "encoded/mine.txt", "job.removed.json"}  # the last until a new plan stands


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_list_that_is_cut_off_is_refused(tmp_path: Path, suffix: str):
    """Lines of 1 KiB end where compressed blocks end: every line that is left looks whole."""
    lines = b"".join(json.dumps({**ROW, "pad": os.urandom(460).hex()}).ljust(1023).encode() + b"\n" for _ in range(900))
    pack = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"list.jsonl.{suffix}"
    path.write_bytes(pack(lines))
    assert sum(isinstance(row, SourceRow) for row in read_rows(path)) == 900
    path.write_bytes(pack(lines)[: len(pack(lines)) // 2])
    with pytest.raises(DataError, match=r"line \d+: not readable any further"):
        list(read_rows(path))
    path.write_bytes(pack(lines[:1024]) + pack(lines[1024:]))  # two frames, as `cat a b` makes them
    assert len(list(read_rows(path))) == 900
    path.write_bytes(lines)
    with pytest.raises(DataError, match=f"not readable as a .{suffix} file"):
        list(read_rows(path))


def test_rows_with_lists_of_their_own_are_rows(tmp_path: Path):
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps({"tags": ["a"], **ROW}))
    row = next(read_rows(path))
    assert isinstance(row, SourceRow)
    assert row.extra == {"tags": ["a"]}
    path.write_text(json.dumps({"id": "a"}) + "\n" + json.dumps(ROW))
    assert [isinstance(row, SourceRow) for row in read_rows(path)] == [False, True]
    path.write_text(json.dumps({"data": [ROW]}))
    with pytest.raises(DataError, match="the top level is an object"):
        list(read_rows(path))


def test_a_path_the_system_refuses_is_a_fault_of_the_row():
    with pytest.raises(AudioFault) as fault:
        read_bytes("a" * 5000 + ".wav")
    assert fault.value.reason == "audio_unreadable"


def test_a_long_file_is_refused_by_its_header(monkeypatch):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(16000 * 90, 0.1), 16000, format="FLAC")
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(AudioFault) as fault:
        decode(buffer.getvalue(), AudioLimits())
    assert fault.value.reason == "audio_too_long"


def test_a_row_too_long_for_the_index_is_rejected(run_command, arabic_mini, tiny_dir, tmp_path):
    rows = json.loads(arabic_mini.read_text())[:3]
    rows[1]["messages"][0]["content"] = "كلمة " * 70000
    (tmp_path / "list.json").write_text(json.dumps(rows))
    options = ("--config", tiny_dir / "pipeline.toml", "--set", "preprocess.max_reject_fraction=0.5")
    result = run_command("preprocess", tmp_path / "list.json", tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    assert "text_too_long 1" in result.stderr


def test_a_wrong_codec_folder_does_not_become_part_of_the_job(run_command, arabic_mini, tiny_dir, tmp_path):
    options = ("--limit", 2, "--config", tiny_dir / "pipeline.toml")
    wrong = ("--set", f"model.codec={tiny_dir / 'model'}")
    result = run_command("preprocess", arabic_mini, tmp_path / "out", *options, *wrong)
    assert result.returncode == 1
    assert "neither a native codec" in result.stderr
    with pytest.raises(CheckpointError, match="neither a native codec"):
        codec_layout(tiny_dir / "model")
    assert run_command("preprocess", arabic_mini, tmp_path / "out", *options).returncode == 0


def test_a_worker_killed_inside_a_shard_leaves_no_partial_file(monkeypatch, make_sample, tmp_path):
    from preprocess.join import remove_partial_files

    pid = os.fork()
    if pid == 0:  # dies in the middle of its tar
        monkeypatch.setattr(writer, "pack_sample", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        writer.write_shard(tmp_path, 0, [make_sample(0)], [])
    os.waitpid(pid, 0)
    assert list(tmp_path.glob("shards/*/*.tmp.*"))
    monkeypatch.undo()
    writer.write_shard(tmp_path, 0, [make_sample(0)], [])
    remove_partial_files(tmp_path)
    assert not list(tmp_path.glob("shards/*/*.tmp.*"))
    assert len(list(tmp_path.glob("shards/*/*"))) == 3
    assert SampleReader(tmp_path)


def test_a_line_is_printed_while_the_first_shard_is_in_work(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    progress = report.Progress(num_shards=2, already_done=0, rows_per_shard=100)
    for _ in range(24):
        now[0] += 1.0
        progress.row()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("shards 0/2 | 1.0 rows/s |")
    assert lines[0].endswith("ETA 3 min")
    assert len(lines) == 2
