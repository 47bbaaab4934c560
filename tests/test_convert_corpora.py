"""Published corpora's layouts become lists that stage one accepts; what is damaged, hostile or unknown is one line."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from preprocess.convert import convert
from preprocess.sources import SourceRow, find_pair, read_rows
from shards.errors import DataError

NAMES = ["spk_00_04", "spk_00_07", "spk_01_06", "spk_01_13"]
TEXTS = {name: f"نص، {name}" for name in NAMES}


@pytest.fixture
def data(repository: Path, tmp_path: Path) -> Path:
    for folder in ("wavs", "clips"):
        (tmp_path / folder).mkdir()
        for name in NAMES:
            shutil.copy(repository / "tests/data/arabic-mini" / f"{name}.flac", tmp_path / folder)
    return tmp_path


def ljspeech(data: Path) -> Path:
    (data / "metadata.csv").write_text("".join(f"{name}.flac|raw|{text}\n" for name, text in TEXTS.items()))
    return data


def common_voice(data: Path) -> Path:
    lines = ["client_id\tpath\tsentence\tup_votes\taccents\tlocale"]
    lines += [f"{name[:6]}\t{name}.flac\t{text}\t2\tEgyptian\tar" for name, text in TEXTS.items()]
    (data / "validated.tsv").write_text("\n".join(lines) + "\n")
    return data / "validated.tsv"


def kaldi(data: Path, segments: bool = True) -> Path:
    (data / "text").write_text("".join(f"{name} {text}\n" for name, text in TEXTS.items()))
    (data / "utt2spk").write_text("".join(f"{name} {name[:6]}\n" for name in NAMES))
    (data / "wav.scp").write_text("".join(f"{name} {data}/clips/{name}.flac\n" for name in NAMES))
    if segments:
        (data / "segments").write_text("".join(f"{name} {name} 0.25 2.5\n" for name in NAMES))
    return data


def lhotse_cut(data: Path, name: str, **changes) -> dict:
    source = {"type": "file", "channels": [0], "source": f"{data}/clips/{name}.flac"}
    said = {"text": TEXTS[name], "speaker": name[:6], "gender": "F", "custom": {"dialect": "EGY", "snr": 3.5}}
    return {
        "id": name,
        "start": 0.2,
        "duration": 3.0,
        "channel": 0,
        "supervisions": [{"id": name, "start": 0.05, "duration": 2.25, **said}],
        "recording": {"id": name, "sources": [source], "sampling_rate": 24000, "num_samples": 96000, "duration": 4.0},
        "type": "MonoCut",
        **changes,
    }


def lhotse(data: Path) -> Path:
    lines = "".join(json.dumps(lhotse_cut(data, name)) + "\n" for name in NAMES)
    (data / "cuts.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return data / "cuts.jsonl.gz"


@pytest.mark.parametrize("kind", ["ljspeech", "commonvoice", "kaldi", "lhotse"])
def test_corpora_become_lists(data: Path, kind: str):
    source = {"ljspeech": ljspeech, "commonvoice": common_voice, "kaldi": kaldi, "lhotse": lhotse}[kind](data)
    made = convert(kind, source, data / "list.jsonl", 0, speaker="LJ" if kind == "ljspeech" else None)
    assert (made.num_rows, made.num_speakers) == (4, 1 if kind == "ljspeech" else 2)
    for row in read_rows(data / "list.jsonl"):
        assert isinstance(row, SourceRow)
        pair = find_pair(row.chat)
        for path, text in ((pair.target_path, pair.target_text), (pair.reference_path, pair.reference_text)):
            assert Path(path).is_file()
            assert text == TEXTS[Path(path).stem]
        if kind in ("kaldi", "lhotse"):
            assert (pair.target_segment.offset_s, pair.target_segment.duration_s) == (0.25, 2.25)
        if kind == "lhotse":
            assert row.extra == {"dialect": "EGY", "gender": "F"}
        if kind == "commonvoice":
            assert row.extra == {"accents": "Egyptian", "locale": "ar"}
            assert made.ignored_columns == ["up_votes"]


def test_parts_of_one_recording_are_references_of_each_other(data: Path):
    kaldi(data)
    (data / "segments").write_text("".join(f"{name} {NAMES[0]} {n} {n + 0.9}\n" for n, name in enumerate(NAMES)))
    assert convert("kaldi", data, data / "list.jsonl", 0).num_rows == 4


def test_kaldi_without_segments_takes_whole_files(data: Path):
    convert("kaldi", kaldi(data, segments=False), data / "list.jsonl", 0)
    assert "offset" not in (data / "list.jsonl").read_text()


def test_kaldi_utterances_without_a_text_are_told(data: Path):
    kaldi(data)
    with (data / "segments").open("a") as file:
        file.write(f"more {NAMES[0]} 1 2\n")
    assert convert("kaldi", data, data / "list.jsonl", 0).ignored_columns == ["1 utterances without a text, first more"]


def write(name: str, content: str):
    return lambda data: (data / name).write_text(content)


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("ljspeech", write("metadata.csv", "id|text|speaker|more\n"), "4 fields"),
        ("ljspeech", write("metadata.csv", "file_name|transcription\nspk_00_04|نص\n"), "is a header"),
        ("ljspeech", write("metadata.csv", "../secret|نص\n"), "leaves its folder"),
        ("ljspeech", write("metadata.csv", "/etc/passwd|نص\n"), "no path inside"),
        ("ljspeech", write("metadata.csv", "spk_00_04.flac|\n"), "2 fields"),
        ("ljspeech", write("metadata.csv", ""), "no clip found"),
        (
            "ljspeech",
            write("metadata.csv", "".join(f"{name}.flac|{text}|sara\n" for name, text in TEXTS.items())),
            "1 values in the third column for 4 texts, first 'sara'",
        ),
        ("commonvoice", write("validated.tsv", "speaker\tfile\ttext\na\tb\tc\n"), "the header is 'speaker"),
        ("commonvoice", write("validated.tsv", "client_id\tpath\tsentence\na\t../x.mp3\tنص\n"), "leaves its folder"),
        ("commonvoice", write("validated.tsv", "client_id\tpath\tsentence\na\t/x.mp3\tنص\n"), "no path inside"),
        ("commonvoice", write("validated.tsv", "client_id\tpath\tsentence\na\tx.mp3\n"), "2 fields for 3 columns"),
        ("commonvoice", write("validated.tsv", "client_id\tpath\tsentence\n\tx.mp3\tنص\n"), "no client_id"),
        ("commonvoice", lambda data: shutil.rmtree(data / "clips"), "no folder clips/"),
        ("kaldi", write("wav.scp", "spk_00_04 touch {data}/ran |\n"), "a command, which is never run"),
        ("kaldi", write("wav.scp", "spk_00_04 raw.ark:17\n"), "inside an archive"),
        ("kaldi", write("wav.scp", "spk_00_04 ../../x.wav\n"), "leaves its folder"),
        ("kaldi", write("wav.scp", "spk_00_04\n"), "nothing behind"),
        ("kaldi", write("wav.scp", "other x.wav\n"), "no recording 'spk_00_04'"),
        ("kaldi", write("utt2spk", "spk_00_04 a\nspk_00_04 b\n"), "stands there twice"),
        ("kaldi", write("utt2spk", "spk_00_04 a\n"), "no speaker of 'spk_00_07'"),
        ("kaldi", write("segments", "spk_00_04 spk_00_04 one two\n"), "expected RECORDING START END"),
        ("kaldi", write("segments", "spk_00_04 spk_00_04 3 2\n"), "expected a part of the recording"),
        ("kaldi", write("segments", "spk_00_04 spk_00_04 nan 2\n"), "expected a part of the recording"),
        ("kaldi", write("segments", "other spk_00_04 1 2\n"), "expected RECORDING START END"),
        ("kaldi", lambda data: (data / "text").unlink(), "No such file"),
        ("lhotse", write("cuts.jsonl.gz", "not gzip"), "[Nn]ot a gzipped file"),
    ],
)
def test_damaged_and_hostile_corpora_are_one_line(data: Path, kind: str, damage, message: str):
    source = {"ljspeech": ljspeech, "commonvoice": common_voice, "kaldi": kaldi, "lhotse": lhotse}[kind](data)
    damage(data)
    with pytest.raises(DataError, match=message) as fault:
        convert(kind, source, data / "list.jsonl", 0, speaker="LJ" if kind == "ljspeech" else None)
    assert "\n" not in str(fault.value)
    assert not (data / "list.jsonl").exists()
    assert not (data / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "MixedCut"}, "expected a MonoCut"),
        ({"type": "PaddingCut"}, "expected a MonoCut"),
        ({"supervisions": []}, "expected one supervision"),
        ({"supervisions": [{"start": 0, "duration": 1}]}, "expected one supervision"),
        ({"supervisions": [{"start": 0, "duration": 1, "text": "x", "speaker": 7}]}, "must be texts"),
        ({"supervisions": [{"start": 0, "duration": -1, "text": "x", "speaker": "a"}]}, "a part of the recording"),
        ({"recording": {"sources": [{"type": "command", "source": "touch ran"}]}}, "neither run nor fetched"),
        ({"recording": {"sources": [{"type": "url", "source": "http://x"}]}}, "neither run nor fetched"),
        ({"recording": {"sources": [{"type": "file", "source": "../../x.wav"}]}}, "leaves its folder"),
        ({"recording": "x"}, "one source"),
        ({"recording": {"sources": [{"type": "file", "channels": [0, 1], "source": "x.wav"}]}}, "file with 2"),
        (
            {
                "recording": {
                    "sources": [{"type": "file", "channels": [0], "source": "x.wav"}],
                    "transforms": [{"name": "Speed", "kwargs": {"factor": 0.9}}],
                }
            },
            "changed while lhotse reads it",
        ),
    ],
)
def test_lhotse_cuts_of_other_forms_are_refused(data: Path, changes: dict, message: str):
    (data / "cuts.jsonl").write_text(json.dumps(lhotse_cut(data, NAMES[0], **changes)) + "\n")
    with pytest.raises(DataError, match=message):
        convert("lhotse", data / "cuts.jsonl", data / "list.jsonl", 0)


def test_a_cut_manifest_that_ends_early_is_refused(data: Path):
    whole = lhotse(data).read_bytes()
    (data / "cuts.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="ended before"):
        convert("lhotse", data / "cuts.jsonl.gz", data / "list.jsonl", 0)


def test_the_manual_says_of_each_layout_its_use_and_source(repository: Path):
    from preprocess.cli import main
    from preprocess.slicing.transcripts import SUFFIXES

    lines = (repository / "preprocess" / "README.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
        for line in lines
        if "https://" in line
    ]
    told = {name: row for row in rows for name in row[0].replace("`", "").split(", ")}
    kinds: Any = next(option.type for option in main.commands["convert"].params if option.name == "kind")
    files = [f"x{end}" for end in (*SUFFIXES, ".rttm") if end != ".textgrid"]
    assert [name for name in (*kinds.choices, *files) if name not in told] == []
    for row in rows:
        assert len(row) >= 3
        assert len(row[-2].split()) > 3, "what it is good for"
        assert row[-1].startswith("https://")
