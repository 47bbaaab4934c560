"""Mutated lists end in rows kept, rows rejected or one line of error, never in another exception."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from preprocess.reasons import MAX_FIELD_CHARS, RowFault
from preprocess.row_checks import check_row, speaker_of
from preprocess.sources import read_rows
from preprocess.text import TextSection, text_fault, text_warnings
from shards.errors import PipelineError
from shards.writer import Reject

SECTION = TextSection(normalize=["nfc", "tatweel", "digits", "presentation_forms"])
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 2**63, 2**64, 10**40, float("nan"), float("inf"), "", " ", "\ud800", "\0", "x" * 3000, [], {}, [[]],
    {"type": "text"}, {"type": "audio", "audio_url": "data:,x"}, "<|eot_id|>", "ﷺ", "????", "Ø§Ù„Ù„", "None", "http://x/y.wav",
]  # fmt: skip
ODD_BYTES = [
    b"[", b"]", b"{", b"}", b",", b":", b'"', b"'", b"\\", b"\n", b"\r\n", b"\r", b"\0", b"\xff", b"\xe9", b"\xef\xbb\xbf", b" ",
    b"null", b"NaN", b"-", b"1e999", b"9" * 400, b"\\u", b"\\ud83d", b"//x\n", b"/*x*/", b"[" * 300, b"{" * 300, b'{"a":' * 200,
    b'"speaker": "x", "speaker": "y",', b'{"messages":', b"\xe2\x80\xa8", b"<<<<<<< HEAD\n", b"Infinity",
]  # fmt: skip


def sound_rows(rng: random.Random) -> list[dict]:
    def row(number: int) -> dict:
        user = [{"type": "text", "text": "نص المرجع هنا"}, {"type": "audio", "audio_url": f"{number}.wav"}]
        user.append(
            {"type": "text", "text": f"Please generate speech for given text in reference audio's voice: قول {number}"}
        )
        assistant = [{"type": "text", "text": f"قول {number}"}, {"type": "audio", "audio_url": f"t{number}.wav"}]
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        row: dict[str, Any] = {"messages": turns, "speaker": f"s{number % 3}", "misc": {"n": number}}
        return {"id": f"r{number}", **row} if rng.random() < 0.5 else row

    return [row(number) for number in range(rng.randint(1, 6))]


def swap_a_value(value: Any, rng: random.Random) -> Any:
    """A copy with one place deep inside changed, removed or doubled."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(ODD_VALUES)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        kind = rng.random()
        middle = [] if kind < 0.1 else [value[place]] * 2 if kind < 0.2 else [swap_a_value(value[place], rng)]
        return value[:place] + middle + value[place + 1 :]
    place = rng.choice(list(value))
    changed = dict(value)
    kind = rng.random()
    if kind < 0.1:
        del changed[place]
    elif kind < 0.2:
        changed[rng.choice(["", "raw_audio", "type", "ROLE", "offset", "duration", "\0"])] = rng.choice(ODD_VALUES)
    else:
        changed[place] = swap_a_value(value[place], rng)
    return changed


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(ODD_BYTES) + data[place:]


def drop(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + data[place + rng.choice([1, 1, 2, 20, 300]) :]


def double(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:end] + data[end:]


def drop_a_sign(data: bytes, rng: random.Random) -> bytes:
    places = [place for place, byte in enumerate(data) if byte in b'{}[]",:'] or [0]
    place = rng.choice(places)
    return data[:place] + data[place + 1 :]


def encode(data: bytes, rng: random.Random) -> bytes:
    name = rng.choice(["utf-16", "utf-16-le", "utf-32", "cp1256", "utf-8-sig", "cp864", "utf-7"])
    return data.decode("utf-8", "replace").encode(name, "replace")


def end_lines(data: bytes, rng: random.Random) -> bytes:
    return data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b",\n", b"\n,", b" \n\t"]))


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    cut, flip, flip, insert, insert, insert, drop, drop, double, drop_a_sign, drop_a_sign, encode, end_lines,
]  # fmt: skip


def mutated_list(seed: int) -> tuple[str, bytes]:
    """(file name, bytes)."""
    rng = random.Random(seed)
    rows: Any = sound_rows(rng)
    for _ in range(rng.choice([0, 0, 1, 3])):
        rows = swap_a_value(rows, rng)
    rows = rows if isinstance(rows, list) else [rows]
    dump = [json.dumps(row, ensure_ascii=rng.random() < 0.3) for row in rows]
    form = rng.choice(["array", "lines", "indented"])
    text = "\n".join(dump) + "\n"
    if form != "lines":
        text = "[" + ",\n".join(dump) + "]" if form == "array" else json.dumps(rows, indent=rng.choice([0, 1, 4]))
    data = text.encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        data = rng.choice(MUTATIONS)(data, rng) if data else data
    name = "list.jsonl" if form == "lines" else "list.json"
    packed = rng.random()
    if packed < 0.05:
        return f"{name}.gz", cut(gzip.compress(data, 1), rng) if rng.random() < 0.5 else gzip.compress(data, 1)
    if packed < 0.1:
        return f"{name}.zst", flip(zstandard.compress(data), rng)
    return name, data


def try_list(folder: Path, seed: int) -> str:
    """ "kept", "rejected" or "error": what became of the list. Any other exception than the project's own is raised."""
    name, data = mutated_list(seed)
    path = folder / name
    path.write_bytes(data)
    kept = rejected = 0
    message = ""
    try:
        for number, item in enumerate(read_rows(path)):
            assert item.row == number
            assert msgspec.json.encode(item)
            if isinstance(item, Reject):
                assert len(item.detail) <= MAX_FIELD_CHARS + 30
                assert len(item.id) <= MAX_FIELD_CHARS + 30
                rejected += 1
                continue
            try:
                checked = check_row(item, SECTION)
            except RowFault:
                rejected += 1
                continue
            text = checked.pair.target_text
            assert text_fault(text, 1.0, SECTION) is None or text
            assert text_warnings(text, 1.0, SECTION) is not None
            assert speaker_of(item, "0" * 64).strip()
            kept += 1
    except PipelineError as error:
        message = str(error)
    if message:
        assert len(message.splitlines()) == 1
        assert len(message) < 500 + len(str(path))
        return "error"
    return "kept" if kept else "rejected"


def outcomes_of(folder: Path, seeds: range) -> dict[str, int]:
    found: dict[str, int] = {"kept": 0, "rejected": 0, "error": 0}
    for seed in seeds:
        try:
            found[try_list(folder, seed)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    return found


def test_a_thousand_mutated_lists_end_in_words(tmp_path: Path):
    found = outcomes_of(tmp_path, range(1000))
    assert min(found.values()) >= 50, found


@pytest.mark.long
def test_thirty_thousand_mutated_lists_end_in_words(tmp_path: Path):
    assert sum(outcomes_of(tmp_path, range(1000, 31000)).values()) == 30000
