"""Hugging Face audio data sets on disk become lists: save_to_disk and Parquet shards, written here by pyarrow."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.cli import main
from preprocess.convert import convert_hugging_face
from preprocess.convert_hugging_face import HuggingFaceSource
from preprocess.sources import SourceRow, find_pair, read_rows
from shards.errors import PipelineError

NAMES = ["spk_00_04", "spk_00_07", "spk_01_06", "spk_01_13"]
AUDIO = pa.struct({"bytes": pa.binary(), "path": pa.string()})
FEATURES = {
    "audio": {"sampling_rate": 24000, "_type": "Audio"},
    "text": {"dtype": "string", "_type": "Value"},
    "speaker": {"names": ["amal", "badr"], "_type": "ClassLabel"},
}


@pytest.fixture(scope="module")
def clips(repository: Path) -> dict[str, bytes]:
    return {name: (repository / "tests/data/arabic-mini" / f"{name}.flac").read_bytes() for name in NAMES}


def table(clips: dict[str, bytes], **changes: Any) -> pa.Table:
    """Four clips of two speakers; a change replaces or adds a column, None takes one out."""
    columns: dict[str, Any] = {
        "audio": pa.array([{"bytes": data, "path": f"{name}.flac"} for name, data in clips.items()], AUDIO),
        "text": [f"نص {name}" for name in clips],
        "speaker": pa.array([0, 0, 1, 1]),
        "dialect": ["gulf", "gulf", None, "egyptian"],
        "embedding": [[0.5]] * 4,
        **changes,
    }
    return pa.table({name: column for name, column in columns.items() if column is not None})


def saved(folder: Path, whole: pa.Table, split: str | None = None, features: dict = FEATURES) -> Path:
    """As `save_to_disk` writes it: two Arrow streams, state.json, dataset_info.json."""
    folder.mkdir(parents=True)
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (whole.slice(0, 3), whole.slice(3)), strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, whole.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": split, "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def parquet(folder: Path, whole: pa.Table, name: str = "train") -> Path:
    """As push_to_hub writes it: shards whose metadata hold the features."""
    folder.mkdir(parents=True, exist_ok=True)
    known = whole.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})
    for number, part in enumerate((known.slice(0, 1), known.slice(1))):
        pq.write_table(part, folder / f"{name}-0000{number}-of-00002.parquet")
    return folder


def split_dict(folder: Path, whole: pa.Table) -> Path:
    saved(folder / "train", whole, "train")
    saved(folder / "test", whole.slice(0, 2), "test")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder


def one_file(folder: Path, whole: pa.Table, features: dict = FEATURES) -> Path:
    """As a cache's file, in Arrow's other form."""
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    with pa.OSFile(str(folder / "x.arrow"), "wb") as file:
        known = whole.replace_schema_metadata(metadata)
        with pa.ipc.new_file(file, known.schema) as writer:
            writer.write_table(known)
    return folder / "x.arrow"


def converted(path: Path, out: Path, **asked: Any):
    made = convert_hugging_face(HuggingFaceSource(path, out.with_suffix(""), **asked), out, 0)
    return made, [row for row in read_rows(out) if isinstance(row, SourceRow)]


@pytest.mark.parametrize("form", ["saved", "dict", "parquet", "file"])
def test_every_form_gives_the_same_list(clips, tmp_path: Path, form: str):
    whole = table(clips)
    path = {
        "saved": lambda: saved(tmp_path / "set", whole),
        "dict": lambda: split_dict(tmp_path / "set", whole),
        "parquet": lambda: parquet(tmp_path / "set" / "data", whole).parent,
        "file": lambda: one_file(tmp_path, whole),
    }[form]()
    made, rows = converted(path, tmp_path / "list.jsonl", split="train" if form == "dict" else None)
    assert (made.num_rows, made.num_speakers, made.ignored_columns) == (4, 2, ["embedding"])
    assert [row.chat.speaker for row in rows] == ["amal", "amal", "badr", "badr"]
    assert [row.extra.get("dialect") for row in rows] == ["gulf", "gulf", None, "egyptian"]
    for row, (name, data) in zip(rows, clips.items(), strict=True):
        pair = find_pair(row.chat)
        assert pair.target_text == f"نص {name}"
        assert Path(pair.target_path).read_bytes() == data
        assert row.extra["source_file"] == f"{name}.flac"
        assert Path(pair.target_path).suffix == ".flac"


def test_the_same_command_writes_nothing_twice(clips, tmp_path: Path, capsys):
    path = saved(tmp_path / "set", table(clips))
    arguments = ["convert", "hf", str(path), str(tmp_path / "list.jsonl")]
    main(arguments, standalone_mode=False)
    assert "4 rows of 2 speakers" in capsys.readouterr().err
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "list").rglob("*.flac")}
    listed = (tmp_path / "list.jsonl").read_bytes()
    half, *_ = files
    half.write_bytes(half.read_bytes()[:100])  # as a copy that was cut off
    main(arguments, standalone_mode=False)
    assert (tmp_path / "list.jsonl").read_bytes() == listed
    again = {file: file.stat().st_mtime_ns for file in (tmp_path / "list").rglob("*") if file.is_file()}
    assert {file for file in again if again[file] != files.get(file)} == {half}
    assert half.read_bytes() in clips.values()


def test_audio_beside_the_table_is_used_where_it_lies(clips, tmp_path: Path):
    paths = [{"bytes": None, "path": f"audio/{name}.flac"} for name in clips]
    path = saved(tmp_path / "set", table(clips, audio=pa.array(paths, AUDIO)))
    with pytest.raises(PipelineError, match="neither in the table nor at"):
        converted(path, tmp_path / "list.jsonl")
    (path / "audio").mkdir()
    for name, data in clips.items():
        (path / "audio" / f"{name}.flac").write_bytes(data)
    _, rows = converted(path, tmp_path / "list.jsonl")
    assert {find_pair(row.chat).target_path for row in rows} == {f"{path}/audio/{name}.flac" for name in clips}
    assert not (tmp_path / "list").exists()


def test_rows_that_lack_something_are_counted(clips, tmp_path: Path, capsys):
    audio = [{"bytes": data, "path": None} for data in clips.values()]
    double = pa.concat_tables([table(clips, audio=pa.array(audio, AUDIO))] * 2)
    text = [*double["text"].to_pylist()[:6], " ", None]
    holes = double.set_column(1, "text", pa.array(text))
    holes = holes.set_column(2, "speaker", pa.array([None, 0, 0, 1, 1, 1, 1, 1]))
    holes = holes.set_column(0, "audio", pa.array([*audio[:3], None, {"bytes": b"", "path": ""}, *audio[1:]], AUDIO))
    path = saved(tmp_path / "set", holes)
    main(["convert", "hf", str(path), str(tmp_path / "list.jsonl")], standalone_mode=False)
    said = capsys.readouterr().err
    for lacking in ("2 rows without text", "1 rows without speaker", "2 rows without audio"):
        assert f"skipped: {lacking}" in said
    assert {file.suffix for file in (tmp_path / "list").rglob("*") if file.is_file()} == {".flac"}


def test_a_column_of_another_name_is_named_by_hand(clips, tmp_path: Path):
    path = saved(tmp_path / "set", table(clips, text=None, words=["أ", "ب", "ت", "ث"], reader=["a", "a", "b", "b"]))
    with pytest.raises(PipelineError, match=r"words: string.*--text-column"):
        converted(path, tmp_path / "list.jsonl")
    _, rows = converted(path, tmp_path / "list.jsonl", text_column="words", speaker_column="reader")
    assert [find_pair(row.chat).target_text for row in rows] == ["أ", "ب", "ت", "ث"]
    assert [row.chat.speaker for row in rows] == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio": None}, r"columns text: string, .*expected one audio column, a struct of bytes and path"),
        ({"audio": pa.array([[0.1]] * 4)}, r"columns audio: list<.*expected one audio column"),
        ({"audio": [{"array": [0.1], "sampling_rate": 16000}] * 4}, r"audio: struct<array.*expected one audio column"),
        ({"voice": pa.array([None] * 4, AUDIO)}, r"expected one audio column.*remove_columns"),
        ({"text": pa.array([1, 2, 3, 4])}, "expected the text as a string"),
        ({"sentence": ["a"] * 4}, "text and sentence may be the text; choose one with --text-column"),
        ({"client_id": ["a"] * 4}, "speaker and client_id may be the speaker; choose one with --speaker-column"),
        ({"speaker": pa.array([0, 1, 7, 1])}, "row 2: speaker is class 7 of 2"),
        ({"speaker": pa.array([[1]] * 4)}, r"speaker is '\[1\]'; expected a text or a number"),
        ({"speaker": None}, "4 of 4 clips have no speaker"),
        ({"audio": pa.array([{"bytes": None, "path": "../x.wav"}] * 4, AUDIO)}, "leaves its folder"),
    ],
)
def test_columns_that_are_not_understood_are_refused(clips, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(PipelineError, match=message) as fault:
        converted(saved(tmp_path / "set", table(clips, **changes)), tmp_path / "list.jsonl")
    assert "\n" not in str(fault.value)
    assert not (tmp_path / "list.jsonl").exists()


def damage(name: str, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "data-00001-of-00002.arrow").unlink(), "data-00001-of-00002.arrow"),
        (damage("data-00000-of-00002.arrow", lambda data: b"no arrow at all" * 9), "."),
        (damage("state.json", lambda data: b"{"), "state.json: not readable"),
        (damage("state.json", lambda data: b"{}"), "no _data_files"),
        (damage("state.json", lambda data: b'{"_data_files": [{"filename": "../x.arrow"}]}'), "leaves its folder"),
        (
            damage("state.json", lambda data: data.replace(b'"_split"', b'"_indices_data_files": [1], "_split"')),
            "flatten_indices",
        ),
        (damage("dataset_info.json", lambda data: b'{"features": 7}'), "description of its columns is damaged"),
        (lambda folder: (folder / "state.json").unlink(), "expected state.json or dataset_dict.json"),
    ],
)
def test_damaged_data_sets_are_one_line(clips, tmp_path: Path, harm, message: str):
    path = saved(tmp_path / "set", table(clips))
    harm(path)
    with pytest.raises(PipelineError, match=message) as fault:
        converted(path, tmp_path / "list.jsonl")
    assert "\n" not in str(fault.value)


def test_a_split_is_asked_for_where_there_are_several(clips, tmp_path: Path):
    split_dict(tmp_path / "dict", table(clips))
    parquet(tmp_path / "pq", table(clips))
    parquet(tmp_path / "pq", table(clips), "validation")
    for folder, other in (("dict", "test"), ("pq", "validation")):
        with pytest.raises(PipelineError, match=rf"splits train, {other}|splits {other}, train"):
            converted(tmp_path / folder, tmp_path / "list.jsonl")
        with pytest.raises(PipelineError, match="none is 'dev'"):
            converted(tmp_path / folder, tmp_path / "list.jsonl", split="dev")
    _, rows = converted(tmp_path / "dict", tmp_path / "list.jsonl", split="test")
    assert len(rows) == 2
    parquet(tmp_path / "pq" / "english", table(clips))
    with pytest.raises(PipelineError, match=r"several sets, in \., english"):
        converted(tmp_path / "pq", tmp_path / "list.jsonl", split="train")


def test_without_pyarrow_the_install_line_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PipelineError, match=r"needs pyarrow.*: pip install -e '\.\[hf\]'"):
        converted(tmp_path, tmp_path / "list.jsonl")
