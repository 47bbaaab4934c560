"""Every line of the table "Lists and texts that nobody planned for" in preprocess/README.md, tried."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from preprocess import plan
from preprocess.plan import Request, ingest
from preprocess.reasons import RowFault
from preprocess.row_checks import check_row
from preprocess.sources import read_rows
from preprocess.text import TextSection, text_warnings
from shards.errors import DataError
from shards.writer import Reject

TABLE = "## Lists and texts that nobody planned for"
README = Path(__file__).resolve().parent.parent / "preprocess" / "README.md"
GOOD = "نص الهدف هنا"


def row(text: str = GOOD, audio: dict | None = None, **more: object) -> dict:
    user = [{"type": "text", "text": "نص المرجع"}, {"type": "audio", "audio_url": "a.wav"}]
    assistant = [{"type": "text", "text": text}, {"type": "audio", "audio_url": "b.wav", **(audio or {})}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages, "speaker": "s", **more}


def array(*rows: bytes | dict) -> bytes:
    return b"[" + b",\n".join(r if isinstance(r, bytes) else as_json(r) for r in rows) + b"]"


def as_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def with_misc(text: str) -> bytes:
    return as_json(row())[:-1] + b', "misc": {"x": ' + text.encode() + b"}}"


ROW = as_json(row())
BETWEEN = {  # begin of the kind's line -> rows that are tried between two sound ones
    "a syntax fault": [ROW[:-1], ROW[:-2] + b"}", ROW + b"}", ROW.replace(b'"s"', b"'s'"), ROW[:-1] + b",}", b"oops"],
    "brackets more than 64 deep": [with_misc("[" * 30000), with_misc("[" * 65 + "]" * 65)],
    "NaN, Infinity": [with_misc(x) for x in ("NaN", "Infinity", "1e400", str(2**64), '"\\ud800"', '1, "x": 2')],
    "bytes that are not UTF-8": [ROW.replace("نص".encode(), b"\xe1\xe2"), json.dumps(row(), ensure_ascii=False).encode("cp1256")],
    '`"id": null`': [row(id=None), row(id="")],
    "the same id twice": [array(row(id=1), row(id=1))[1:-1]],
    "`raw_audio`": [
        row(audio={"raw_audio": "UklGR"}),
        *(row(audio={"audio_url": url}) for url in ("DATA:,x", "file:///a", "HTTP://h/a", "s3://b/a", "x+y:/a")),
    ],
    "`start`, `end_time`": [row(audio={key: value}) for key, value in (("start", 1.0), ("end_time", 2), ("Offset", 0))],
    "no speaker": [row(speaker=speaker) for speaker in (None, "", "unknown", "None")],
    "U+061C": [row(f"نص{mark} الهدف") for mark in "\u061c\u200f\u202e\u2067\u200b\u2060\u200d\ufeff\u00ad\ufe0f"],
    "U+2028": [row(f"نص{mark}الهدف") for mark in "\u2028\u2029\x0b\x0c\r"],
    "a zero-width non-joiner": [row("می\u200cخواهم")],
    "NUL": [row(f"نص{control}") for control in "\0\x1b\x7f\x85\x90"],
    "control tokens": [row("نص <|eot_id|>")],
    "presentation forms": [row("ﻣﺮﺣﺒﺎ ﷺ")],
    "UTF-8 read as": [row("سلام".encode().decode(codec)) for codec in ("cp1252", "cp1256", "mac_roman")]
    + [row("نص\ufffd"), row("نص\ue001"), row("نعم ???? ??")],
}  # fmt: skip
WHOLE = {  # the same -> lists that are tried as they are
    "a UTF-8 mark": [
        b"\xef\xbb\xbf" + array(ROW, ROW),
        b" \r\n[\r\n" + ROW + b" ,\r\n\r\n" + ROW + b",]\n",
        ROW + b"\r\n\n" + ROW,
    ],
    "UTF-16, UTF-32": [
        as_json([row()]).decode().encode(name) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")
    ]
    + [magic + b"x" * 50 for magic in (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"PAR1")],
    "a list cut off": [array(ROW, ROW)[:-1], array(ROW, ROW)[:-40], ROW + b"\n" + ROW[:-40]],
    "the list inside an object": [b'{"data": ' + array(ROW) + b"}", array(ROW) + array(ROW), b"hello", b"", b"[]"],
}


def outcomes(path: Path) -> set[str]:
    """Reject reasons and warnings of a list, "read" for rows that are kept, or "error"."""
    found: set[str] = set()
    try:
        ingest(Request(path, path.parent / "out"), 0)
        rejects = (path.parent / "out/job/rejects.jsonl").read_bytes().splitlines()
        found |= {json.loads(line)["reason"] for line in rejects}
        for item in read_rows(path):
            if isinstance(item, Reject):
                continue
            try:
                checked = check_row(item, TextSection())
            except RowFault as fault:
                found.add(fault.reason)
                continue
            text = checked.pair.target_text
            found |= {"read", *checked.warnings, *text_warnings(text, 0.5 * len(text) / 5, TextSection())}
    except DataError as error:
        found.add("error" if len(str(error).splitlines()) == 1 else "more than a line")
    return found


def table() -> dict[str, str]:
    lines = README.read_text(encoding="utf-8").split(TABLE)[1].split("\n## ")[0].splitlines()
    rows = [line.strip("| ").partition(" | ") for line in lines if line.startswith("|")]
    return {kind: outcome for kind, _, outcome in rows[2:]}


def outcome_of(begin: str) -> str:
    return next(outcome for kind, outcome in table().items() if kind.startswith(begin))


def test_every_line_of_the_table_is_tried():
    tried = [*BETWEEN, *WHOLE, "a list that changes"]
    for kind in table():
        assert sum(kind.startswith(begin) for begin in tried) == 1, kind
    assert len(table()) == len(tried)


@pytest.mark.parametrize("begin", BETWEEN)
def test_a_row_of_the_table(tmp_path: Path, begin: str):
    outcome = outcome_of(begin)
    codes = set(re.findall(r"`([a-z]+_[a-z_]+)`", outcome))
    for number, tried in enumerate(BETWEEN[begin]):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = tried if isinstance(tried, bytes) else as_json(tried)
        for name, whole in {
            "list.json": array(ROW, data, ROW),
            "list.jsonl": b"\n".join([ROW, *data.split(b",\n"), ROW]),
        }.items():
            (folder / name).write_bytes(whole)
            assert outcomes(folder / name) == {"read", *codes}, (tried, name)
            shutil.rmtree(folder / "out")


@pytest.mark.parametrize("begin", WHOLE)
def test_a_list_of_the_table(tmp_path: Path, begin: str):
    expected = "error" if outcome_of(begin).startswith("error") else "read"
    path = tmp_path / "list.json"
    for data in WHOLE[begin]:
        path.write_bytes(data)
        assert outcomes(path) == {expected}, data[:40]
    if begin == "a list cut off":
        packed = tmp_path / "list.json.gz"
        packed.write_bytes(gzip.compress(os.urandom(9999).hex().join(["[", "]"]).encode())[:5000])
        assert outcomes(packed) == {"error"}
    if begin == "the list inside an object":
        os.mkfifo(tmp_path / "pipe")
        assert outcomes(tmp_path / "pipe") == {"error"}


def test_a_list_that_changes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "list.json"
    path.write_bytes(array(ROW, ROW))

    def changing(path: Path):
        yield from read_rows(path)
        path.write_bytes(array(ROW))

    monkeypatch.setattr(plan, "read_rows", changing)
    assert outcome_of("a list that changes") == "error"
    assert outcomes(path) == {"error"}
