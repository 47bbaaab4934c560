"""Validation alone, and the rules of texts: what is changed, what is refused, what is reported."""

from __future__ import annotations

import copy
import json

import pytest
from click.testing import CliRunner

from preprocess.cli import main
from preprocess.reasons import REASONS, WRITTEN_WARNINGS
from preprocess.text import TextSection, arabic_share, clean, text_fault
from shards.manifest import open_dataset
from shards.reader import SampleReader


@pytest.mark.parametrize(
    ("text", "normalize", "expected", "changes"),
    [
        ("مَرْحَبًا ـ ١٢٫٥", [], "مَرْحَبًا ـ ١٢٫٥", []),
        ("\ufeffنص\u200f \u202bعربي\u202c", [], "نص عربي", ["invisible_marks_removed"]),
        ("كتـــاب", ["tatweel"], "كتاب", ["normalized_tatweel"]),
        ("رقم ٣٤٥ و ۱۲", ["digits"], "رقم 345 و 12", ["normalized_digits"]),
        ("\u0627\u0654", ["nfc"], "\u0623", ["normalized_nfc"]),
        ("نص", ["nfc", "tatweel", "digits"], "نص", []),
    ],
)
def test_texts_are_changed_only_as_asked(text, normalize, expected, changes):
    assert clean(text, TextSection(normalize=normalize)) == (expected, changes)


@pytest.mark.parametrize(
    ("text", "duration_s", "reason"),
    [
        ("م", 2.0, "text_too_short"),
        ("م" * 1001, 60.0, "text_too_long"),
        ("كلام كثير جدا في وقت قصير جدا لا يصدق", 1.0, "text_too_fast"),
        ("only Latin letters", 3.0, "text_not_arabic"),
        ("كلام عادي في وقت عادي", 3.0, None),
        ("١٢٣ ٤٥٦", 3.0, None),
    ],
)
def test_limits_are_in_characters(text, duration_s, reason):
    fault = text_fault(text, duration_s, TextSection(min_arabic_share=0.5))
    assert (fault[0] if fault else None) == reason
    assert reason is None or reason in REASONS


def test_arabic_share_counts_letters_only():
    assert arabic_share("نص text") == pytest.approx(2 / 6)
    assert arabic_share("123 !") == 1.0


@pytest.fixture
def rows(arabic_mini) -> list:
    return json.loads(arabic_mini.read_text())[:12]


def test_a_sound_list(run_command, arabic_mini, tmp_path):
    result = run_command("preprocess", arabic_mini, tmp_path / "out", "--validate-only", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["rows"], report["usable"], report["distinct_files"], report["uses_per_file"]) == (72, 72, 72, 2.0)
    assert sum(report["target_seconds_histogram"].values()) == 72
    assert report["dialects"] == {}
    assert report["rejects"] == {}
    assert report["target_hours"] == pytest.approx(318 / 3600, rel=0.02)
    assert not (tmp_path / "out" / "job.json").exists(), "no job was begun"


def test_every_fault_is_reported_and_the_job_itself_agrees(run_command, rows, tiny_dir, tmp_path):
    rows[1]["id"] = rows[4]["id"] = "same"
    rows[2]["messages"][1]["content"][1]["audio_url"] = "nowhere.wav"
    rows[3]["messages"][2]["content"][0]["text"] = "كلام " * 150
    rows[5]["messages"][1]["content"][1] = copy.deepcopy(rows[5]["messages"][2]["content"][1])
    rows[6]["messages"][2]["content"][0]["text"] = "\u200fنص آخر غير الذي في الطلب"
    data = tmp_path / "list.json"
    data.write_text(json.dumps(rows))
    expected = {"audio_missing": 1, "duplicate_id": 1, "reference_is_target": 1, "text_too_fast": 1}
    strict = run_command("preprocess", data, tmp_path / "out", "--validate-only")
    assert strict.returncode == 1
    assert "error: 4 of 12 rows rejected, more than preprocess.max_reject_fraction = 0.05" in strict.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rejects"] == expected
    assert report["warnings"] == {"instruction_text_differs": 1, "invisible_marks_removed": 1}
    [example] = report["warning_examples"]["instruction_text_differs"]
    assert example.startswith("row 6: 'نص آخر غير الذي في الطلب' was taken, the instruction says '")
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == [2, 3, 4, 5]
    assert rejects[2]["id"] == "same"
    assert rejects[2]["detail"] == "same id as row 1"
    options = ("--config", tiny_dir / "pipeline.toml", "--set", "preprocess.max_reject_fraction=0.5")
    made = run_command("preprocess", data, tmp_path / "out", *options)
    assert made.returncode == 0, made.stderr
    dataset, index = open_dataset(tmp_path / "out")
    assert dataset.rejects == expected
    assert dataset.warnings == report["warnings"]
    assert set(dataset.rejects) <= set(REASONS)
    assert set(dataset.warnings) <= WRITTEN_WARNINGS
    facts = {sample.facts.row: sample.facts for sample in SampleReader(tmp_path / "out").read_all(index)}
    assert facts[6].texts[facts[6].target_text] == "نص آخر غير الذي في الطلب"
    assert facts[1].extra == {"id": "same"}
    assert facts[0].target.num_channels == 1
    assert facts[0].target.trailing_silence_s > 0


def test_a_killed_validation_leaves_nothing_in_the_way(run_command, arabic_mini, tiny_dir, tmp_path):
    out = tmp_path / "out"
    assert run_command("preprocess", arabic_mini, out, "--validate-only", "--limit", 4).returncode == 0
    made = run_command("preprocess", arabic_mini, out, "--limit", 3, "--config", tiny_dir / "pipeline.toml")
    assert made.returncode == 0, made.stderr
    assert open_dataset(out)[0].num_samples == 3


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--nope"], ["a", "b", "c"]])
def test_usage_names_what_a_user_types(arguments):
    output = CliRunner().invoke(main, arguments, prog_name="preprocess").output
    assert output.startswith("Usage: preprocess [OPTIONS] DATA OUT\n")
