"""Lists that `evaluate` reads, and what is said in them about speakers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import soundfile
from mixed_sets import with_clips, write_columns

from preprocess.text import TextSection
from shards.cloning import cloning_messages, cloning_sample
from shards.errors import DataError, PipelineError
from tools.evaluate.dataset_items import dataset_items, in_words_of, read_samples, training_overlap
from tools.evaluate.items import Item, read_items
from tools.evaluate.request import Request
from tools.evaluate.run import open_items
from tools.evaluate.speaking import prompt_sample
from tools.evaluate.systems import System, find_wave, other_clips, strangers
from train.config import DataSource, TrainSection
from train.data.planned_source import PlannedSource
from train.world import ALONE


def wave(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(2400), 24000)
    return path


def test_a_chatml_list_gives_its_pairs(arabic_mini: Path, repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(repository)
    found = read_items(arabic_mini, limit=7)
    assert (found.kind, len(found.items)) == ("ChatML list", 7)
    first = found.items[0]
    assert (first.speaker, first.text) == ("spk_00", "هل تعرف الطريق إلى محطة الحافلات؟")
    assert first.real == "tests/data/arabic-mini/spk_00_08.flac"


def test_a_seed_tts_list_with_and_without_recordings(tmp_path: Path):
    wave(tmp_path / "prompt-wavs" / "p.wav")
    wave(tmp_path / "wavs" / "a.wav")
    (tmp_path / "meta.lst").write_text(
        "a|نص|prompt-wavs/p.wav|مرحبا\nb.wav|نص|prompt-wavs/p.wav|أهلا\nbad|line\nc||prompt-wavs/p.wav|نعم\n"
    )
    found = read_items(tmp_path)
    assert [(item.id, item.text, bool(item.real)) for item in found.items] == [
        ("a", "مرحبا", True),
        ("b", "أهلا", False),
    ]
    assert found.items[0].reference == str(tmp_path / "prompt-wavs" / "p.wav")
    assert ["line 3" in found.skipped[0], "line 4" in found.skipped[1]] == [True, True]


def test_a_zipvoice_list_is_separated_by_tabs(tmp_path: Path):
    (tmp_path / "list.tsv").write_text("\ufeffa\tنص\tp.wav\tمرحبا, يا | صديقي\r\n")
    found = read_items(tmp_path / "list.tsv")
    assert (found.items[0].id, found.items[0].text, found.items[0].real) == ("a", "مرحبا, يا | صديقي", None)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_habibi_folder_is_paired_as_the_benchmark_pairs(tmp_path: Path, form: str):
    rows = [
        {"file_name": f"audio/{name}.wav", "text": text, "speaker_id": speaker, "dialect": "EGY"}
        for name, text, speaker in (("1", "واحد", "s"), ("2", "اثنان", "s"), ("3", "ثلاثة", "s"), ("4", "أربعة", "t"))
    ]
    if form == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    else:
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (tmp_path / "metadata.csv").write_text("\n".join(lines))
    found = read_items(tmp_path)
    assert [(item.text, item.reference_text, item.dialect) for item in found.items] == [
        ("واحد", "ثلاثة", "EGY"),
        ("اثنان", "واحد", "EGY"),
        ("ثلاثة", "اثنان", "EGY"),
    ]
    assert "only entry of speaker t" in found.skipped[0]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("metadata.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("metadata.jsonl", b'{"a":\n', "line 1: not valid JSON"),
        ("metadata.jsonl", b"null\n", "line 1: expected an object, got 'null'"),
        ("metadata.jsonl", b'{"file_name": "\\ud800.wav"}', "line 1: not valid JSON"),
        ("metadata.csv", b"file_name,text,speaker_id\na.wav,\xe9,1\n", "not readable as UTF-8 CSV after 0 entries"),
        ("metadata.csv", b"file_name,text,speaker_id\na,b,c\nb," + b"x" * 200_000, "after 1 entries: field larger"),
        ("metadata.csv", b"a.wav,x,1\n", "its first line lacks file_name, text, speaker_id; expected names of columns"),
        ("metadata.csv", b"", "its first line lacks file_name, text, speaker_id"),
        ("meta.lst", "a|نص|p.wav|مرحبا\n".encode("utf-16"), "not readable as UTF-8 text"),
        ("meta.lst", b"a|\xe9|p.wav|b", "not readable as UTF-8 text"),
        ("chatml.json", b"RIFF....WAVE", "expected a JSON array of ChatML rows"),
        ("chatml.json", b"[]", "the list is empty"),
    ],
)
def test_a_list_that_is_none_is_one_fault_in_words(tmp_path: Path, name: str, content: bytes, fault: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PipelineError, match=re.escape(fault)):
        read_items(tmp_path)


def test_entries_of_another_form_cost_themselves_alone(tmp_path: Path):
    rows = [{"file_name": ["a"], "text": "x", "speaker_id": 1}, {"file_name": ".", "text": "x", "speaker_id": 1}]
    rows += [{"file_name": "1.wav", "text": 7, "speaker_id": 1}, {"file_name": "2.wav", "text": {}, "speaker_id": 1}]
    rows += [{"file_name": "y" * 5000, "text": "b", "speaker_id": 1}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_items(tmp_path)
    assert [(item.id[:4], item.text, item.reference_text) for item in found.items] == [
        ("1", "7", "b"),
        ("yyyy", "b", "7"),
    ]
    assert [line.split(": ", 1)[1] for line in found.skipped] == [
        "lacks file_name",
        "lacks a file in file_name",
        "lacks text",
    ]
    (tmp_path / "l.lst").write_text(f"{'b' * 5000}|x|{'p' * 5000}.wav|واحد\nc|x|p\0.wav|اثنان\n")
    assert [len(item.reference) for item in read_items(tmp_path / "l.lst").items] == [5004, 6]


def test_equal_ids_never_share_a_wave(tmp_path: Path):
    (tmp_path / "l.lst").write_text("a|x|p.wav|واحد\na-2|x|p.wav|اثنان\na|x|p.wav|ثلاثة\na|x|p.wav|أربعة\n")
    assert [item.id for item in read_items(tmp_path / "l.lst").items] == ["a", "a-2", "a-3", "a-4"]


@pytest.mark.parametrize("content", ["", "one|two\n"])
def test_a_list_without_items_is_refused_in_words(tmp_path: Path, content: str):
    (tmp_path / "l.lst").write_text(content)
    with pytest.raises(DataError, match="nothing to evaluate"):
        read_items(tmp_path / "l.lst")


def test_no_list_at_all_says_what_is_expected(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="ChatML list"):
            read_items(path)


def item(name: str, speaker: str, reference: str, real: str | None) -> Item:
    return Item(id=name, speaker=speaker, text="x", reference=reference, reference_text="y", real=real)


def test_strangers_are_of_another_speaker():
    items = [item(str(n), f"s{n // 3}", "r", "t") for n in range(7)]
    found = strangers(items)
    assert found is not None
    assert all(items[n].speaker != items[other].speaker for n, other in enumerate(found))
    assert strangers(items[:3]) is None


def test_another_clip_is_neither_prompt_nor_recording():
    items = [item("a", "s", "1.wav", "2.wav"), item("b", "s", "2.wav", "1.wav"), item("c", "s", "2.wav", "3.wav")]
    items += [item("d", "t", "4.wav", "5.wav")]
    assert other_clips(items) == [2, 2, 1, None]


def test_an_id_cannot_lead_out_of_the_folder(tmp_path: Path):
    wave(tmp_path / "secret.wav")
    inside = wave(tmp_path / "waves" / "sub" / "a.wav")
    assert find_wave(tmp_path / "waves", "sub/a") == inside
    assert find_wave(tmp_path / "waves", "../secret") == tmp_path / "waves" / "secret.wav"
    for name in ("a\0b", "x" * 5000, "a/" * 3000):
        found = find_wave(tmp_path / "waves", name)
        assert found.parent == tmp_path / "waves"
        assert not found.is_file()


def test_a_data_set_is_said_by_the_rules_of_the_voice(make_sample, tokenizer):
    """Where it was made with other rules: what the tuned model was trained on, not what lies in the shards."""
    codes = make_sample(0).reference_codes
    stored = cloning_sample(tokenizer, "الجـسر", codes, "ـ نـعم ٣", codes)
    fresh = cloning_sample(tokenizer, "الجسر", codes, "نعم ٣", codes)
    said = in_words_of(stored, TextSection(normalize=["tatweel"]), tokenizer)
    for item in (said.facts.reference_text, said.facts.target_text):
        assert said.facts.texts[item] == fresh.facts.texts[item]
        assert said.text_item_ids(item).tolist() == fresh.text_item_ids(item).tolist()
    assert in_words_of(fresh, TextSection(normalize=["tatweel"]), tokenizer) is fresh

    speaker = SimpleNamespace(rules=TextSection(normalize=["tatweel"]), tokenizer=tokenizer)
    asked_for, system = (
        Item(id="a", speaker="s", text="x", reference="1.wav", reference_text="y"),
        System(name="t", kind="tuned"),
    )
    for made_with, expected in ((None, stored), (["tatweel"], stored), ([], said)):
        asked = prompt_sample(cast(Any, speaker), system, asked_for, stored, Path(), made_with)
        assert asked.facts.texts == expected.facts.texts


def test_an_instruction_with_invisible_marks_is_one(tmp_path: Path):
    messages = cloning_messages("مرحبا بكم", "a.wav", "كيف حالك اليوم", "b.wav")
    messages[1]["content"][2]["text"] = messages[1]["content"][2]["text"].replace("generate", "gene\u200brate")
    messages[2]["content"] = messages[2]["content"][1:]
    (tmp_path / "list.json").write_text(json.dumps([{"messages": messages}]))
    assert [one.text for one in read_items(tmp_path / "list.json").items] == ["كيف حالك اليوم"]


def test_held_out_speakers_are_those_training_leaves_out(short_data: Path):
    section = TrainSection(validation_fraction=0.3)
    everything, held = dataset_items([short_data]), dataset_items([short_data], section)
    speakers = {row.speaker for row in held.items}
    assert 0 < len(speakers) < len({row.speaker for row in everything.items})
    assert [row for row in everything.items if row.speaker in speakers] == held.items
    assert training_overlap(held, [short_data], section).startswith("unseen: none of the 1 speakers")
    assert training_overlap(everything, [short_data], section).startswith("SEEN IN TRAINING: 2 of 3 speakers")


@pytest.mark.parametrize("has_columns", [True, False])
def test_speakers_are_held_out_of_all_data_sets_of_a_run(make_dataset, make_sample, tmp_path: Path, has_columns: bool):
    """As `train` does it: of the joined sets other speakers than of each alone, and who shares a clip goes to one side."""
    sets = []
    for name, sizes in (("first", (20, 5)), ("second", (12, 4))):
        samples = [make_sample(n, speaker=f"{name}-{n % sizes[1]}") for n in range(sizes[0])]
        samples = [with_clips(one, f"{name}-{n}-r", f"{name}-{n}") for n, one in enumerate(samples)]
        if name == "second":
            samples[0] = with_clips(samples[0], "first-1-r", "second-0")
        sets.append(make_dataset(tmp_path / name, samples))
        if has_columns:
            write_columns(sets[-1], samples)
    first, second = sets
    section = TrainSection(validation_fraction=0.3, data=[DataSource(path=str(first)), DataSource(path=str(second))])
    source = PlannedSource("", section)
    _, held_out = source.hold_out(0.3, ALONE)
    together = dataset_items([first, second], section, together=[first, second])
    assert (together.kind, len(together.items)) == (
        "held-out speakers of 2 data sets (0.3 of it, seed 0)",
        int(held_out(source.index).sum()),
    )
    assert {item.dataset for item in together.items} == {str(first), str(second)}
    wanted = [source.reader.read(row).facts.target.path for row in source.index[held_out(source.index)]]
    assert [item.real for item in together.items] == wanted
    assert [sample.facts.target.path for _, sample in read_samples(together)] == wanted
    assert training_overlap(together, [first, second], section).startswith("unseen")
    config = SimpleNamespace(train=section)
    of_one, said = open_items(Request(data=second, out=tmp_path, train_data=[first, second]), cast(Any, config))
    assert [item.real for item in of_one.items] == [item.real for item in together.items if item.dataset == str(second)]
    assert said.startswith("unseen: none of")
    assert training_overlap(dataset_items([second]), [first, second], section).startswith("SEEN IN TRAINING")
