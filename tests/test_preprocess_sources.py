"""The user's list: every accepted form gives the same rows; every broken one says which row and why."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from preprocess.reasons import RowFault
from preprocess.sources import INSTRUCTION_PREFIX, SourceRow, find_pair, read_rows
from shards.errors import DataError
from shards.writer import Reject

ROW = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "نص المرجع"},
                {"type": "audio", "audio_url": "a.wav"},
                {"type": "text", "text": f"{INSTRUCTION_PREFIX} نص الهدف"},
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "نص الهدف"}, {"type": "audio", "audio_url": "b.wav"}],
        },
    ],
    "speaker": "s",
    "misc": {"duration": 4.1, "other": [1]},
    "dialect": "gulf",
}


def rows_of(path: Path) -> list:
    return list(read_rows(path))


def changed(path: str, value: object) -> dict:
    """ROW with one place changed: `messages.1.content.1.audio_url`."""
    row = copy.deepcopy(ROW)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = row
    for part in way:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return row


def test_all_forms_give_the_same_rows(tmp_path: Path):
    rows = [ROW, changed("speaker", "t")]
    array = json.dumps(rows, ensure_ascii=False).encode()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    forms = {
        "array.json": array,
        "indented.json": json.dumps(rows, indent=2).encode(),
        "bom.json": b"\xef\xbb\xbf" + array,
        "lines.jsonl": lines,
        "array.json.gz": gzip.compress(array),
        "lines.jsonl.zst": zstandard.compress(lines),
        "array.json.zst": zstandard.compress(array),
    }
    for name, data in forms.items():
        (tmp_path / name).write_bytes(data)
    first = rows_of(tmp_path / "array.json")
    assert [row.row for row in first] == [0, 1]
    assert first[0].extra == {"dialect": "gulf"}
    assert first[0].chat.misc == {"duration": 4.1, "other": [1]}
    for name in forms:
        assert rows_of(tmp_path / name) == first, name


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        (changed("messages.1.content.1.audio_url", None), "missing required field `audio_url`"),
        (changed("messages.1.content.1.type", "adio"), "Invalid value 'adio'"),
        (changed("messages.0.role", "usr"), "$.messages[0].role"),
        (changed("misc", "4.1"), "$.misc"),
        (changed("messages", []), "$.messages"),
        ({"text": "x", "messages": "no"}, "$.messages"),
        ("just text", "Expected `object`"),
    ],
)
def test_a_row_without_the_form_is_rejected_with_its_place(tmp_path: Path, row, detail):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([ROW, row, ROW]))
    first, bad, last = rows_of(path)
    assert isinstance(first, SourceRow)
    assert isinstance(last, SourceRow)
    assert isinstance(bad, Reject)
    assert bad.reason == "row_invalid"
    assert detail in bad.detail
    assert "row 1" in bad.detail


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the list is empty"),
        ("[]", "the list is empty"),
        ('{"data": []}', "the list itself must be the top level"),
        ('{\n "data": [\n', "the list itself must be the top level"),
        ("text", "begins with b't'; expected a JSON array"),
        (f"[{json.dumps(ROW)},\n{{broken", "line 2: the list ends without its closing ']'"),
        (f"[{json.dumps(ROW)}, {json.dumps(ROW)}", "line 1: the list ends without its closing ']'"),
        (f"{json.dumps(ROW)}\n\n{json.dumps(ROW)[:-9]}", "line 3: the list ends inside a row"),
        (f"[{json.dumps(ROW)}]\n[{json.dumps(ROW)}]", "line 2: '[' behind the list's closing ']'"),
    ],
)
def test_a_broken_list_says_where(tmp_path: Path, text: str, message: str):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"list\.json") as error:
        rows_of(path)
    assert message in str(error.value)


def pair_of(row: dict):
    import msgspec

    from shards.sample import ChatRow

    return find_pair(msgspec.convert(row, ChatRow))


def test_the_pair_of_the_users_form():
    pair = pair_of(ROW)
    assert (pair.reference_path, pair.target_path) == ("a.wav", "b.wav")
    assert (pair.reference_text, pair.target_text) == ("نص المرجع", "نص الهدف")
    assert pair.system_text == "You are a helpful assistant."
    assert pair.warnings == []


def test_the_pair_of_the_released_form():
    row = {
        "messages": [
            {"role": "user", "content": "نص المرجع"},
            {"role": "assistant", "content": [{"type": "audio", "audio_url": "a.wav"}]},
            {"role": "user", "content": " نص الهدف "},
            {"role": "assistant", "content": [{"type": "audio", "audio_url": "b.wav"}]},
        ]
    }
    pair = pair_of(row)
    assert (pair.reference_text, pair.target_text) == ("نص المرجع", "نص الهدف")
    assert pair.warnings == ["target_text_from_instruction"]


def test_texts_that_differ_are_a_warning():
    pair = pair_of(changed("messages.2.content.0.text", "نص آخر"))
    assert pair.target_text == "نص آخر", "the assistant's text is what is said"
    assert pair.warnings == ["instruction_text_differs"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (changed("messages.1.content.1", None), "audio_count"),
        (changed("messages.2.content.1", None), "audio_count"),
        (changed("messages.2.role", "user"), "audio_count"),
        (changed("messages.1.content.0.text", " "), "text_missing"),
        (changed("messages.1.content.0.text", "x <|eot_id|> y"), "text_control_token"),
    ],
)
def test_rows_without_a_clear_pair(row, reason):
    with pytest.raises(RowFault) as fault:
        pair_of(row)
    assert fault.value.reason == reason


@pytest.mark.slow
def test_a_200_mb_list_is_read_within_100_mb(tmp_path: Path):
    """Rows of 2 kB: it is the bytes that must not stay in memory, and every row takes its time."""
    import os
    import subprocess
    import sys

    row = json.dumps({**ROW, "note": "س" * 800}, ensure_ascii=False)
    count = 200_000_000 // len(row.encode()) + 1
    with (tmp_path / "list.json").open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(("[" if number == 0 else ",\n") + row)
        file.write("]")
    code = (
        "import sys; from pathlib import Path; from preprocess.plan import Request, ingest;"
        "print(ingest(Request(Path(sys.argv[1]), Path(sys.argv[2])), 0));"
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "list.json"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    counts, peak_kb = result.stdout.splitlines()
    assert counts == str((count, count))
    assert int(peak_kb) < 100_000
