"""What is said in a slice: the files beside a recording give every piece the texts of its own clips, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from preprocess.slicing.recordings_folder import find_recordings, warn_of_named_speakers, with_transcripts
from preprocess.slicing.run import SliceRequest, slice_folder
from preprocess.slicing.transcripts import Cue, read_transcript, texts_of_speech
from preprocess.sources import SourceRow, find_pair, read_rows
from shards.errors import DataError

RATE = 24000
PAUSE_S = 0.6
Sentences = list[tuple[float, float, str]]


def stamp(seconds: float, point: str) -> str:
    ms = round(seconds * 1000)
    return f"{ms // 3600000:02d}:{ms // 60000 % 60:02d}:{ms // 1000 % 60:02d}{point}{ms % 1000:03d}"


def srt(sentences: Sentences) -> bytes:
    blocks = [
        f"{n}\n{stamp(a, ',')} --> {stamp(b, ',')}\n<i>{text}</i>\n" for n, (a, b, text) in enumerate(sentences, 1)
    ]
    return "\r\n".join("\n".join(blocks).split("\n")).encode("utf-8-sig")


def vtt(sentences: Sentences) -> bytes:
    blocks = [f"{stamp(a, '.')} --> {stamp(b, '.')} align:start\n<v Amal>{text}\n" for a, b, text in sentences]
    return ("WEBVTT - talk\n\nNOTE --\nnothing\n\n" + "\n".join(blocks)).encode()


def whisperx(sentences: Sentences) -> bytes:
    segments = []
    for start, end, text in sentences:
        words = text.split()
        step = (end - start) / len(words)
        timed = [
            {"word": word, "start": start + n * step, "end": start + (n + 0.9) * step} for n, word in enumerate(words)
        ]
        timed[1] = {"word": words[1]}  # as digits are: without times
        segments.append({"start": start, "end": end, "text": f" {text}", "words": timed})
    return json.dumps({"segments": segments, "language": "ar"}).encode()


def text_grid(sentences: Sentences) -> bytes:
    end = sentences[-1][1] + 1
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0 ",
        f"xmax = {end} ",
        "tiers? <exists> ",
    ]
    lines += ["size = 1 ", "item []: ", "    item [1]:", '        class = "IntervalTier" ', '        name = "نص" ']
    lines += ["        xmin = 0 ", f"        xmax = {end} ", f"        intervals: size = {2 * len(sentences)} "]
    before = 0.0
    for number, (start, stop, text) in enumerate(sentences):
        for place, (a, b, said) in enumerate(((before, start, ""), (start, stop, text)), 2 * number + 1):
            lines += [f"        intervals [{place}]:", f"            xmin = {a} ", f"            xmax = {b} "]
            lines += [f'            text = "{said}" ']
        before = stop
    return "\n".join(lines).encode("utf-16")


FORMS: dict[str, Callable[[Sentences], bytes]] = {"srt": srt, "vtt": vtt, "json": whisperx, "TextGrid": text_grid}


@pytest.fixture(scope="module")
def sentences(repository: Path) -> dict[str, tuple[np.ndarray, Sentences]]:
    """A recording of each of two speakers, and its sentences with their times 0.1 s off."""
    data = repository / "tests" / "data" / "arabic-mini"
    texts = {}
    for row in json.loads((data / "chatml.json").read_text()):
        item = row["messages"][2]["content"]
        texts[Path(item[1]["audio_url"]).stem] = item[0]["text"]
    made = {}
    for speaker in ("spk_05", "spk_06"):
        parts, spans, place = [], [], 0.0
        for clip in sorted(data.glob(f"{speaker}_*.flac")):
            wave, _ = soundfile.read(clip)
            parts += [wave, np.zeros(round(PAUSE_S * RATE))]
            spans.append((place + 0.1, place + len(wave) / RATE - 0.1, texts[clip.stem]))
            place += len(wave) / RATE + PAUSE_S
        made[speaker] = np.concatenate(parts), spans
    return made


def write(root: Path, sentences: dict[str, tuple[np.ndarray, Sentences]], form: str) -> None:
    for speaker, (wave, spans) in sentences.items():
        (root / speaker).mkdir(parents=True)
        soundfile.write(root / speaker / "talk.flac", wave, RATE)
        (root / speaker / f"talk.{form}").write_bytes(FORMS[form](spans))


def cut(source: Path) -> list[SourceRow]:
    out = source.parent / "list.jsonl"
    slice_folder(SliceRequest(source=source, out=out, pieces=source.parent / "list"))
    rows = [row for row in read_rows(out) if isinstance(row, SourceRow)]
    return sorted(rows, key=lambda row: (row.chat.speaker or "", row.extra["recording_start_s"]))


@pytest.mark.parametrize("form", FORMS)
def test_every_piece_has_the_text_of_its_clips(sentences, tmp_path: Path, form: str):
    write(tmp_path / "source", sentences, form)
    rows = cut(tmp_path / "source")
    for speaker, (_, spans) in sentences.items():
        mine = [row for row in rows if row.chat.speaker == speaker]
        assert len(mine) >= 2
        assert " ".join(find_pair(row.chat).target_text for row in mine) == " ".join(text for *_, text in spans)
        for row in mine:
            first, last = row.extra["recording_start_s"], row.extra["recording_end_s"]
            inside = [text for a, b, text in spans if first < (a + b) / 2 < last]
            if form != "json":
                assert find_pair(row.chat).target_text == " ".join(inside)


def test_stage_one_takes_the_list(sentences, tmp_path: Path, run_command, tiny_dir: Path):
    write(tmp_path / "source", sentences, "srt")
    rows = cut(tmp_path / "source")
    config = ("--config", tiny_dir / "pipeline.toml", "--set", "preprocess.workers=1")
    result = run_command("preprocess", tmp_path / "list.jsonl", tmp_path / "out", *config)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out" / "dataset.json").read_bytes())
    assert (record["num_samples"], record["rejects"]) == (len(rows), {})
    assert set(record["speakers"]) == {"spk_05", "spk_06"}


def test_speech_without_a_text_is_in_no_piece(sentences, tmp_path: Path, capsys):
    lacking = {speaker: (wave, spans[:2] + spans[3:]) for speaker, (wave, spans) in sentences.items()}
    write(tmp_path / "source", lacking, "srt")
    path = tmp_path / "source" / "spk_05" / "talk.srt"
    path.write_bytes(path.read_bytes() + b"\n9\n00:50:00,000 --> 00:50:02,000\nof another talk\n")
    rows = cut(tmp_path / "source")
    assert "no_text" in capsys.readouterr().err
    told = [json.loads(line) for line in (tmp_path / "list" / "skipped.jsonl").read_text().splitlines()]
    beyond = {"recording": "spk_05/talk.flac", "recording_start_s": 3000.0, "recording_end_s": 3002.0}
    assert [row for row in told if row["reason"] != "no_text"] == [{**beyond, "reason": "text_without_speech"}]
    for speaker, (_, spans) in sentences.items():
        middle = (spans[2][0] + spans[2][1]) / 2
        for row in rows:
            if row.chat.speaker == speaker:
                assert not row.extra["recording_start_s"] < middle < row.extra["recording_end_s"]


def test_a_sentence_keeps_its_pauses(tmp_path: Path):
    said = texts_of_speech([Cue(0.9, 6.1, "one sentence"), Cue(6.9, 9, "another")], [(1, 3), (4, 6), (7, 9), (20, 21)])
    assert [(part.text, part.goes_on) for part in said] == [
        ("one sentence", True),
        ("", False),
        ("another", False),
        ("", False),
    ]
    assert [part.is_covered for part in said] == [True, True, True, False]


def test_no_cut_beside_a_word_without_times(tmp_path: Path):
    timed = [("سنة", 1.0, 1.5), ("1998", None, None), ("ولد", 4.0, 4.4), ("هنا", 6.0, 6.5)]
    words = [{"word": word, **({} if a is None else {"start": a, "end": b})} for word, a, b in timed]
    (tmp_path / "x.json").write_text(json.dumps({"segments": [{"start": 1, "end": 6.5, "text": "", "words": words}]}))
    said = texts_of_speech(read_transcript(tmp_path / "x.json"), [(0.9, 1.6), (2.5, 4.5), (5.9, 6.6)])
    assert [(part.text, part.goes_on) for part in said] == [("سنة 1998 ولد", True), ("", False), ("هنا", False)]
    assert all(part.is_covered for part in said)


def test_a_corrected_transcript_gives_new_texts(sentences, tmp_path: Path):
    write(tmp_path / "source", sentences, "srt")
    cut(tmp_path / "source")
    path = tmp_path / "source" / "spk_05" / "talk.srt"
    path.write_bytes(path.read_bytes().replace(b"<i>", "<i>جديد ".encode()))
    texts = [find_pair(row.chat).target_text for row in cut(tmp_path / "source")]
    assert any("جديد" in text for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.srt", "", "no text in it"),
        ("x.srt", "just words\n", "expected 00:00:01,000"),
        ("x.srt", "1\n00:00:01 --> 00:00:02\ntext\n", "expected 00:00:01,000"),
        (
            "x.srt",
            "1\n00:00:01,000 --> 00:00:02,000\na\n2\n00:00:02,000 --> 00:00:03,000\nb\n",
            "expected 00:00:01,000",
        ),
        ("x.srt", "1\n00:00:03,000 --> 00:00:02,000\na\n", "expected a span"),
        ("x.srt", "1\n00:00:01,000 --> 00:00:05,000\na\n\n2\n00:00:02,000 --> 00:00:06,000\nb\n", "overlap"),
        ("x.vtt", "WEBVTT\n\n00:01.000 --> nowhere\na\n", "expected 00:00:01,000"),
        ("x.json", "[1]", "expected WhisperX"),
        ("x.json", '{"segments": [{"start": 1, "text": "a"}]}', "expected WhisperX"),
        ("x.json", '{"segments": [{"start": 1, "end": NaN, "text": "a"}]}', "expected WhisperX"),
        ("x.json", "[" * 100000, "expected WhisperX"),
        ("x.TextGrid", "not a grid", "not a whole TextGrid"),
        (
            "x.TextGrid",
            '"ooTextFile" "TextGrid" 0 1 <exists> 1 "IntervalTier" "a" 0 1 2 0 1 "x"',
            "not a whole TextGrid",
        ),
        ("x.TextGrid", '"ooTextFile" "TextGrid" 0 1 2 "TextTier" "a" 0 1 0 "TextTier" "b" 0 1 0', "tiers none"),
        (
            "x.TextGrid",
            '"ooTextFile" "TextGrid" 0 1 2 "IntervalTier" "a" 0 1 1 0 1 "x" "IntervalTier" "b" 0 1 1 0 1 "y"',
            "tiers a, b",
        ),
        (
            "x.TextGrid",
            '"ooTextFile" "TextGrid" 0 1 2 "IntervalTier" "words" 0 1 1 0 1 "x" "IntervalTier" "words" 0 1 1 0 1 "y"',
            "two tiers are called words",
        ),
    ],
)
def test_transcripts_that_are_not_understood_are_one_line(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as fault:
        read_transcript(tmp_path / name)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("second", ["Sara", "Omar"])
@pytest.mark.parametrize("form", ["vtt", "json", "json by words"])
def test_several_names_in_a_transcript_are_told(tmp_path: Path, capsys, form: str, second: str):
    """They would all be learned as one voice, the folder's."""
    path = tmp_path / f"talk.{form.split()[0]}"
    if form == "vtt":
        cues = f"00:01.000 --> 00:02.000\n<v.loud Sara>a</v>\n\n00:03.000 --> 00:04.000\n<v {second}>b\n"
        path.write_text(f"WEBVTT\n\n{cues}")
    else:
        said = [{"start": n, "end": n + 1, "text": name, "speaker": name} for n, name in enumerate(("Sara", second))]
        words = [{"word": one["text"], **one} for one in said]
        segments = said if form == "json" else [{"start": 0, "end": 2, "text": "a b", "words": words}]
        path.write_text(json.dumps({"segments": segments}))
    (tmp_path / "talk.wav").touch()
    sources = with_transcripts(find_recordings(tmp_path), is_needed=True)
    warn_of_named_speakers(sources)
    told = capsys.readouterr()
    assert ("1 of 1 transcripts name several speakers" in told.out + told.err) == (second == "Omar")
    assert "Traceback" not in told.err


def test_missing_and_double_transcripts_are_refused_first(sentences, tmp_path: Path):
    write(tmp_path / "source", sentences, "srt")
    (tmp_path / "source" / "spk_05" / "talk.vtt").write_bytes(b"WEBVTT\n")
    with pytest.raises(DataError, match="leave one"):
        cut(tmp_path / "source")
    for path in (tmp_path / "source" / "spk_05").glob("talk.[sv]*t"):
        path.unlink()
    with pytest.raises(DataError, match="1 of 2 recordings have no transcript"):
        cut(tmp_path / "source")
    assert not (tmp_path / "list").exists()


CUES = [(0.5, 1.5, "أهلا بكم"), (2.0, 3723.25, "كيف الحال")]
LONG_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 4000
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "TextTier"
        name = "notes ""x"" 7"
        xmin = 0
        xmax = 4000
        points: size = 1
        points [1]:
            number = 1
            mark = "12"
    item [2]:
        class = "IntervalTier"
        name = "Text"
        xmin = 0
        xmax = 4000
        intervals: size = 3
        intervals [1]:
            xmin = 0.5
            xmax = 1.5
            text = "أهلا بكم"
        intervals [2]:
            xmin = 1.5
            xmax = 2
            text = ""
        intervals [3]:
            xmin = 2
            xmax = 3723.25
            text = "كيف
 الحال"
"""
SHORT_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
4000
<exists>
3
"IntervalTier"
"phones"
0
4000
1
0
4000
"a"
"IntervalTier"
"empty"
0
4000
0
"IntervalTier"
"Words"
0
4000
3
0.5
1.5
"أهلا بكم"
1.5
2
"<eps>"
2
3723.25
"كيف الحال"
"""
SRT = """1
00:00:00,500 --> 00:00:01,500
أهلا بكم

2
00:00:01,600 --> 00:00:01,700

3
0:00:02.000 --> 1:02:03.250
كيف
الحال
"""
VTT = """WEBVTT
Kind: captions

STYLE
::cue { color: red }

NOTE one

00:00.500 --> 00:01.500 line:0 align:start
أهلا بكم

id 2
00:02.000 --> 01:02:03.250
<v Amal>كيف</v> <00:05.000><c>الحال</c>"""
WORDS = {
    "segments": [
        {"start": 0.5, "end": 1.5, "text": " أهلا بكم ", "words": []},
        {"start": 2, "end": 3723.25, "text": "كيف الحال", "words": [{"word": "كيف الحال"}]},
    ]
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.srt", SRT),
        ("x.srt", f"\n\n \n{SRT}\n\n"),
        ("x.vtt", VTT),
        ("x.TextGrid", LONG_GRID),
        ("x.TextGrid", SHORT_GRID),
        ("x.json", json.dumps(WORDS, ensure_ascii=False)),
    ],
    ids=["srt", "blank lines", "vtt", "long grid", "short grid", "whisperx"],
)
def test_nasty_forms_say_the_same(tmp_path: Path, name: str, text: str):
    """Byte order marks, UTF-16 of both orders, and the line ends of Windows and of old Macs."""
    bodies = [text, text.replace("\n", "\r\n"), text.replace("\n", "\r")]
    forms = [body.encode(encoding) for body in bodies for encoding in ("utf-8", "utf-8-sig", "utf-16")]
    for data in [*forms, f"\ufeff{text}".encode("utf-16-be")]:
        (tmp_path / name).write_bytes(data)
        assert [(cue.start_s, cue.end_s, cue.text) for cue in read_transcript(tmp_path / name)] == CUES


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.srt", b"1\n-00:00:01,000 --> 00:00:02,000\na\n", "expected 00:00:01,000"),
        ("x.srt", b"1\n00:00:01,5 --> 00:00:02,0\na\n", "expected 00:00:01,000"),
        ("x.srt", SRT.encode("cp1256"), "not UTF-8"),
        ("x.srt", SRT.encode("utf-16")[:-1], "not UTF-16 as its mark says"),
        ("x.srt", b"\xff\xfe\0\0" + SRT.encode("utf-32-le"), "UTF-32"),
        ("x.vtt", b"WEBVTT\n\n00:01.000 --> 00:09.000\na b\n\n00:05.000 --> 00:12.000\nb c\n", "overlap"),
        ("x.json", b'{"segments": [{"start": null, "end": 1, "text": "a"}]}', "expected WhisperX"),
        ("x.json", b'{"segments": [{"start": 1, "end": 2, "text": "a", "words": [{"word": "a", "start": 1}]}]}', "end"),
        ("x.TextGrid", SHORT_GRID[:-30].encode(), "not a whole TextGrid"),
        ("x.TextGrid", SHORT_GRID.replace('"Words"', '"Amal - words"').encode(), "tiers phones, empty, Amal - words"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(tmp_path: Path, name: str, data: bytes, message: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as fault:
        read_transcript(tmp_path / name)
    assert "\n" not in str(fault.value)
