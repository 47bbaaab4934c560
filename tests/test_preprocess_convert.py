"""Converters: the neighbours' data sets become lists that stage one accepts; references are never the target itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from preprocess.convert import convert
from preprocess.sources import SourceRow, find_pair, read_rows
from shards.errors import DataError

CLIPS = {"a": ["spk_00_04", "spk_00_07", "spk_00_08"], "b": ["spk_01_06", "spk_01_13"], "c": ["spk_02_00"]}


@pytest.fixture
def clips(repository: Path, tmp_path: Path) -> Path:
    """Six real clips in a folder per speaker, with texts beside them."""
    for speaker, names in CLIPS.items():
        (tmp_path / speaker).mkdir()
        for name in names:
            shutil.copy(repository / "tests/data/arabic-mini" / f"{name}.flac", tmp_path / speaker)
            (tmp_path / speaker / f"{name}.{'lab' if speaker == 'b' else 'txt'}").write_text(f" نص {name}\n")
    return tmp_path


def write_metadata(folder: Path) -> Path:
    samples = []
    for speaker, names in CLIPS.items():
        for number, name in enumerate(names):
            sample = {"audio_file": f"{speaker}/{name}.flac", "speaker_id": speaker}
            if number == 0:
                sample["transcript"] = f"نص {name}"
            else:
                sample["transcript_file"] = f"{speaker}/{name}.{'lab' if speaker == 'b' else 'txt'}"
            samples.append(sample)
    path = folder / "metadata.json"
    path.write_text(json.dumps({"dataset_info": {"total_samples": 6}, "samples": samples}))
    return path


def write_csv(folder: Path, delimiter: str, header: bool) -> Path:
    lines = [delimiter.join(["audio_file", "text", "speaker"])] if header else []
    for speaker, names in CLIPS.items():
        lines += [delimiter.join([f"{speaker}/{name}.flac", f"نص {name}", speaker]) for name in names]
    path = folder / "list.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("form", ["metadata", "csv", "csv with header", "csv with tabs", "csv with commas", "folder"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_all_forms_become_the_same_list(clips: Path, form: str, suffix: str):
    sources = {
        "metadata": lambda: ("metadata", write_metadata(clips)),
        "csv": lambda: ("csv", write_csv(clips, "|", header=False)),
        "csv with header": lambda: ("csv", write_csv(clips, "|", header=True)),
        "csv with tabs": lambda: ("csv", write_csv(clips, "\t", header=True)),
        "csv with commas": lambda: ("csv", write_csv(clips, ",", header=True)),
        "folder": lambda: ("folder", clips),
    }
    kind, source = sources[form]()
    out = clips / f"list{suffix}"
    made = convert(kind, source, out, seed=3)
    assert (made.num_rows, made.num_speakers) == (5, 2)
    assert made.lonely_clips == [str(clips / "c" / "spk_02_00.flac")]
    targets = []
    for row in read_rows(out):
        assert isinstance(row, SourceRow)
        pair = find_pair(row.chat)
        assert pair.reference_path != pair.target_path
        assert Path(pair.reference_path).parent == Path(pair.target_path).parent, "the same speaker"
        assert pair.target_text == f"نص {Path(pair.target_path).stem}"
        assert pair.reference_text == f"نص {Path(pair.reference_path).stem}"
        assert pair.warnings == []
        targets.append(Path(pair.target_path).stem)
    assert sorted(targets) == sorted([*CLIPS["a"], *CLIPS["b"]])


def test_references_follow_the_seed(clips: Path):
    lists = [clips / f"{number}.json" for number in range(3)]
    for path, seed in zip(lists, (0, 0, 5), strict=True):
        convert("folder", clips, path, seed)
    assert lists[0].read_bytes() == lists[1].read_bytes()
    assert lists[0].read_bytes() != lists[2].read_bytes()


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("metadata", "metadata.json", "{}", "no list of samples"),
        ("metadata", "metadata.json", '{"samples": [{"text": "x"}]}', "sample 0 has no audio_file"),
        ("metadata", "metadata.json", '{"samples": [{"audio_file": "x.wav"}]}', "sample 0: transcript"),
        ("metadata", "metadata.json", "[", "not readable as metadata.json"),
        ("csv", "list.csv", "x.wav|\n", "line 1: 2 fields; expected audio_file|text|speaker"),
        ("csv", "list.csv", "", "no clip found"),
        ("csv", "list.csv", "x.wav|نص|a\ny.wav|نص|b\n", "every speaker has one clip only"),
        ("folder", "only/x.wav", "", "no text beside it"),
        ("csv", "list.csv", "x.wav,نعم، لا, ثم,a\n", "line 1: 4 fields for 3 columns"),
        ("csv", "list.csv", "audio_file|text|speaker\nx.wav|نص|a|b\n", "line 2: 4 fields for 3 columns"),
        ("csv", "list.csv", "x.wav|نص\ny.wav|نص\n", "2 of 2 clips have no speaker"),
        ("csv", "list.csv", "x.wav|نص|a\ny.wav|نص\n", "1 of 2 clips have no speaker"),
        ("csv", "list.csv", "path|sentence|client_id\nx.wav|نص|a\n", "'path' is no audio file"),
        ("csv", "list.csv", "audio_file|text|text\nx.wav|نص|a\n", "each once"),
        ("csv", "list.csv", 'x.wav,"نص,a\ny.wav,نص,a\n', "unexpected end of data"),
        ("csv", "list.csv", "speaker|speaker_name|audio_file|text\na|b|x.wav|نص\n", "speaker and speaker_name differ"),
        (
            "metadata",
            "metadata.json",
            '{"samples": [{"audio_file": "x.wav", "text": "a", "transcript": "b"}]}',
            "differ",
        ),
        ("metadata", "metadata.json", '{"samples": [{"audio_file": "x.wav", "text": ["a"]}]}', "expected a text"),
        ("metadata", "metadata.json", '{"samples": [{"audio_file": "x.wav", "text": "a"}]}', "have no speaker"),
        ("metadata", "metadata.json", "[" * 100000, "not readable as metadata.json"),
        ("metadata", "metadata.json", '[{"audio_file": "x.wav", "text": "a", "text": "b"}]', "'text' stands twice"),
        ("metadata", "metadata.json", '{"samples": [1], "samples": []}', "'samples' stands twice"),
        ("metadata", "metadata.json", f'[{{"audio_file": "x.wav", "speaker": {"9" * 5000}}}]', "beyond 64 bits"),
        ("metadata", "metadata.json", '[{"audio_file": "x.wav", "text": "a\\ud800"}]', "half of a surrogate pair"),
        ("metadata", "metadata.json", '[{"audio_file": "x.wav", "speaker": NaN}]', "NaN is no JSON number"),
        ("csv", "list.csv", "x.wav,نعم, لا\ny.wav,كلا, لا\n", "line 1: commas without a header"),
        ("csv", "list.csv", "x.wav|نص\ry.wav|a\nz.wav|نص|a\n", "line 1: a carriage return inside a line"),
    ],
)
def test_what_does_not_fit_is_one_error(tmp_path: Path, kind, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(DataError) as error:
        convert(kind, path.parent if kind == "folder" else path, tmp_path / "out.json", 0)
    assert message in str(error.value)
    assert not (tmp_path / "out.json").exists()


def test_the_command_and_stage_one_after_it(clips: Path, run_command, tiny_dir):
    made = run_command("preprocess", "convert", "folder", clips, clips / "list.jsonl")
    assert made.returncode == 0, made.stderr
    assert "5 rows of 2 speakers" in made.stderr
    assert "skipped: 1 clips whose speaker has no other clip" in made.stderr
    checked = run_command("preprocess", clips / "list.jsonl", clips / "out", "--validate-only")
    assert checked.returncode == 0, checked.stderr
    wrong = run_command("preprocess", "convert", "csv", clips / "nowhere.csv", clips / "x.json")
    assert wrong.returncode == 1
    assert "No such file" in wrong.stderr


@pytest.mark.parametrize(
    ("encoding", "named"), [("utf-16", "is UTF-16LE"), ("cp1256", "line 2: not UTF-8: it may be WINDOWS-1256")]
)
@pytest.mark.parametrize(("kind", "name"), [("csv", "list.csv"), ("metadata", "metadata.json")])
def test_another_encoding_is_named(tmp_path: Path, kind: str, name: str, encoding: str, named: str):
    path = tmp_path / name
    path.write_bytes("audio_file|text|speaker\nx.wav|السلام عليكم|a\n".encode(encoding))
    with pytest.raises(DataError, match=named):
        convert(kind, path, tmp_path / "out.json", 0)


def list_of(path: Path, **options) -> list[dict]:
    convert("csv", path, path.with_suffix(".json"), 0, **options)
    return json.loads(path.with_suffix(".json").read_bytes())


def test_only_a_line_feed_ends_a_line(tmp_path: Path):
    path = tmp_path / "list.csv"
    texts = ["قبل\u2028بعد", "قبل\x0bبعد", "قبل\x85بعد", "قبل\x1cبعد"]
    path.write_text("".join(f"{n}.wav|{text}|a\r\n" for n, text in enumerate(texts)), encoding="utf-8", newline="")
    assert [row["messages"][2]["content"][0]["text"] for row in list_of(path)] == texts


def test_speakers_are_asked_for_and_never_invented(tmp_path: Path):
    path = tmp_path / "list.csv"
    path.write_text(
        "audio_file|text|length\na/1.wav|نص|3\na/2.wav|نص|4\nb/3.wav|نص|5\nb/4.wav|نص|6\n", encoding="utf-8"
    )
    assert {row["speaker"] for row in list_of(path, speaker="سارة")} == {"سارة"}
    folders = [row["speaker"] for row in list_of(path, speaker_from_folder=True)]
    assert folders == ["a", "a", "b", "b"]
    assert convert("csv", path, tmp_path / "x.json", 0, speaker="s").ignored_columns == ["length"]
    path.write_text("1.wav|نص|a\n2.wav|نص|a\n", encoding="utf-8")
    with pytest.raises(DataError, match="names speakers itself"):
        list_of(path, speaker="b")


def test_what_a_source_says_of_the_speech_is_kept(tmp_path: Path):
    path = tmp_path / "list.csv"
    path.write_text("audio_file|text|speaker|dialect|age\n1.wav|نص|a|EGY|\n2.wav|نص|a||30\n", encoding="utf-8")
    rows = [{name: row.get(name) for name in ("dialect", "age")} for row in list_of(path)]
    assert rows == [{"dialect": "EGY", "age": None}, {"dialect": None, "age": "30"}]
    assert convert("csv", path, tmp_path / "x.json", 0).ignored_columns == []
    samples = [{"audio_file": f"{n}.wav", "text": "نص", "speaker": "a", "dialect": "\ud800"} for n in range(2)]
    (tmp_path / "metadata.json").write_text(json.dumps(samples))
    with pytest.raises(DataError, match="half of a surrogate pair"):
        convert("metadata", tmp_path, tmp_path / "x.json", 0)


def test_one_recording_in_two_files_is_no_reference(tmp_path: Path):
    path = tmp_path / "list.csv"
    path.write_text("1.wav|نص|a\n1.flac|نص|a\n2.wav|نص|a\n3.wav|نص|b\n3.mp3|نص|b\n", encoding="utf-8")
    made = convert("csv", path, tmp_path / "list.json", 0)
    assert (made.num_rows, made.num_speakers) == (3, 1)
    assert [Path(clip).name for clip in made.lonely_clips] == ["3.wav", "3.mp3"]
    for row in json.loads((tmp_path / "list.json").read_bytes()):
        reference, target = row["messages"][1]["content"][1], row["messages"][2]["content"][1]
        assert Path(reference["audio_url"]).stem != Path(target["audio_url"]).stem


@pytest.mark.parametrize("kind", ["metadata", "csv"])
def test_a_pipe_is_refused_and_never_waited_for(tmp_path: Path, kind: str):
    os.mkfifo(tmp_path / "list")
    with pytest.raises(DataError, match="list: not a regular file; write it to a file first"):
        convert(kind, tmp_path / "list", tmp_path / "out.json", 0)


def test_a_name_that_is_no_unicode_is_one_line(repository: Path, tmp_path: Path):
    clip = (repository / "tests/data/arabic-mini/spk_00_04.flac").read_bytes()
    for name in (b"a", b"\xfe"):
        place = os.fsencode(tmp_path) + b"/" + name
        Path(os.fsdecode(place + b".flac")).write_bytes(clip)
        Path(os.fsdecode(place + b".txt")).write_text("نص")
    with pytest.raises(DataError, match="the name is not valid Unicode"):
        convert("folder", tmp_path, tmp_path / "list.jsonl", 0)
    assert not (tmp_path / "list.jsonl").exists()
