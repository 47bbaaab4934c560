"""`preprocess slice --speakers rttm`: whose a piece is, what two speakers share, and turns that are not understood."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from preprocess.cli import main
from preprocess.slicing.cutting import CutRules, Unit, cut
from preprocess.slicing.labelling import labelled
from preprocess.slicing.recordings_folder import Source
from preprocess.slicing.run import SliceRequest, slice_folder
from preprocess.slicing.turns import Turn, read_turns, speakers_of_speech
from shards.errors import DataError

RATE = 24000
PAUSE_S = 0.7


def line(start_s: float, end_s: float, speaker: str, file: str = "talk") -> str:
    return f"SPEAKER {file} 1 {start_s:.3f} {end_s - start_s:.3f} <NA> <NA> {speaker} <NA> <NA>\n"


@pytest.fixture(scope="module")
def dialogue(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[float, float, str]]]:
    """Two recordings of clips of two voices by turns, each with an RTTM; of the first, both voices speak in the last clip."""
    root = tmp_path_factory.mktemp("dialogue")
    data = repository / "tests" / "data" / "arabic-mini"
    voices = {name: sorted(data.glob(f"{name}_*.flac")) for name in ("spk_07", "spk_08")}
    turns: list[tuple[float, float, str]] = []
    for recording in ("talk", "more"):
        parts, place, lines = [], 0.0, []
        for number, name in enumerate(("spk_07", "spk_08", "spk_07", "spk_08", "spk_07")):
            wave, _ = soundfile.read(voices[name].pop())
            label = f"SPEAKER_0{['spk_07', 'spk_08'].index(name)}"
            end = place + len(wave) / RATE
            lines.append(line(place + 0.1, end - 0.1, label, recording))
            if number == 4 and recording == "talk":
                lines.append(line(place + 1.0, place + 2.0, "SPEAKER_01", recording))
            if recording == "talk":
                turns.append((place, end, label if number < 4 else "both"))
            parts += [wave, np.zeros(round(PAUSE_S * RATE))]
            place = end + PAUSE_S
        soundfile.write(root / f"{recording}.flac", np.concatenate(parts), RATE)
        (root / f"{recording}.rttm").write_text(";; made by hand\n" + "".join(lines))
    return root, turns


@pytest.mark.parametrize(("speakers", "num_voices"), [("rttm", 4), ("rttm-names", 2)])
def test_pieces_have_one_speaker_each(dialogue, tmp_path: Path, speakers: str, num_voices: int, capsys):
    root, turns = dialogue
    options = ["--without-text", "--speakers", speakers, "--min-s", "1", "--max-s", "8"]
    main(["slice", str(root), str(tmp_path / "list.jsonl"), *options], standalone_mode=False)
    rows = [json.loads(text) for text in (tmp_path / "list.jsonl").read_text().splitlines()]
    skipped = [json.loads(text) for text in (tmp_path / "list" / "skipped.jsonl").read_text().splitlines()]
    parts = [(row["recording_start_s"], row["recording_end_s"], row["speaker"], row["recording"]) for row in rows]
    parts += [
        (row["recording_start_s"], row["recording_end_s"], row["speaker"], row["recording"])
        for row in skipped
        if row["reason"] == "only_piece"
    ]
    names = {"talk/SPEAKER_00", "talk/SPEAKER_01", "more/SPEAKER_00", "more/SPEAKER_01"}
    assert {speaker for _, _, speaker, _ in parts} == (names if num_voices == 4 else {"SPEAKER_00", "SPEAKER_01"})
    shared = [row for row in skipped if row["reason"] == "two_speakers"]
    assert shared
    assert f"two_speakers {len(shared)} (" in capsys.readouterr().err
    for start, end, speaker, recording in parts:
        if recording == "talk.flac":
            inside = {name for first, last, name in turns if start < (first + last) / 2 < end}
            assert inside == {speaker.rpartition("/")[2]}
    begin, end, _ = turns[-1]
    assert all(begin - 0.5 < row["recording_start_s"] < row["recording_end_s"] < end + 0.5 for row in shared)


def test_a_short_overlap_at_the_ends_is_the_diarizers():
    turns = [Turn(0, 3.2, "a"), Turn(3.0, 6, "b"), Turn(8, 12, "a"), Turn(9, 9.4, "b"), Turn(20, 21, "c")]
    spans = [(0.1, 2.9), (3.1, 6), (8, 12), (15, 16), (20.9, 22)]
    assert speakers_of_speech(turns, spans) == [
        ("a", ""),
        ("b", ""),
        ("", "two_speakers"),
        ("", "no_speaker"),
        ("c", ""),
    ]


def test_long_turns_under_short_ones_are_not_lost():
    turns = [Turn(0, 100, "a"), Turn(1, 2, "b"), Turn(50, 60, "b")]
    assert speakers_of_speech(turns, [(30, 35), (55, 58)]) == [("a", ""), ("", "two_speakers")]


def test_a_sentence_of_two_speakers_is_in_no_piece(tmp_path: Path):
    (tmp_path / "x.srt").write_text("1\n00:00:00,000 --> 00:00:08,000\na b\n\n2\n00:00:10,000 --> 00:00:14,000\nc\n")
    (tmp_path / "x.rttm").write_text(line(0, 4, "a") + line(4, 8, "b") + line(10, 14, "b"))
    source = Source(tmp_path / "x.wav", "x.wav", "f", "x", tmp_path / "x.srt", tmp_path / "x.rttm")
    units, texts = labelled([Unit(0, 3.6), Unit(4.2, 8), Unit(10, 14)], source, is_name_global=True)
    assert [(unit.label, unit.unfit) for unit in units] == [("a", "two_speakers"), ("b", "two_speakers"), ("b", "")]
    pieces, skipped = cut(units, 15, CutRules())
    assert [texts[piece.units[0]] for piece in pieces] == ["c"]
    assert [part.reason for part in skipped] == ["two_speakers"] * 2


@pytest.mark.parametrize("word", ["<unk>", "spn", "c"])
def test_a_sentence_with_an_aligners_unknown_word_is_skipped(tmp_path: Path, word: str):
    grid = f'"ooTextFile" "TextGrid" 0 4 <exists> 1 "IntervalTier" "text" 0 4 1 0 4 "a {word} b"'
    (tmp_path / "x.TextGrid").write_text(grid)
    units, _ = labelled([Unit(0, 3.6)], Source(tmp_path / "x.wav", "x.wav", "f", "x", tmp_path / "x.TextGrid"))
    assert [unit.unfit for unit in units] == ["" if word == "c" else "no_text"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no turn in it"),
        ("hello\n", "expected SPEAKER FILE"),
        ("SPEAKER x 1 0 1\n", "expected SPEAKER FILE"),
        (line(0, 1, "<NA>"), "expected SPEAKER FILE"),
        ("SPEAKER x 1 a 1 <NA> <NA> s <NA> <NA>\n", "expected SPEAKER FILE"),
        ("SPEAKER x 1 nan 1 <NA> <NA> s <NA> <NA>\n", "not negative"),
        ("SPEAKER x 1 1 -1 <NA> <NA> s <NA> <NA>\n", "not negative"),
        (line(0, 1, "s", "a") + line(0, 1, "s", "b"), "turns of a, b; none of them is x"),
    ],
)
def test_turns_that_are_not_understood_are_one_line(tmp_path: Path, content: str, message: str):
    (tmp_path / "x.rttm").write_text(content)
    with pytest.raises(DataError, match=message) as fault:
        read_turns(tmp_path / "x.rttm")
    assert "\n" not in str(fault.value)


def test_of_several_recordings_the_one_of_its_name_counts(tmp_path: Path):
    lines = f"SPKR-INFO a 1 <NA> <NA> <NA> unknown s <NA> <NA>\n{line(0, 1, 's', 'a')}{line(2, 3, 't', 'x')}"
    (tmp_path / "x.rttm").write_bytes(lines.replace("\n", "\r\n").encode("utf-16"))
    assert read_turns(tmp_path / "x.rttm") == [Turn(2, 3, "t")]


def test_a_recording_without_turns_is_refused_first(dialogue, tmp_path: Path):
    root, _ = dialogue
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "alone.flac").write_bytes((root / "talk.flac").read_bytes())
    fields = {"source": tmp_path / "in", "out": tmp_path / "l.jsonl", "pieces": tmp_path / "l", "without_text": True}
    with pytest.raises(DataError, match=r"1 of 1 recordings have no turns, first .*alone\.flac"):
        slice_folder(SliceRequest(**fields, speakers="rttm"))
    assert not (tmp_path / "l").exists()
