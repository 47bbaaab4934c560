"""One row's JSON text into a value, or the words why not: the same parser and the same limits for both forms of a list.

In: text, from a position on. Out: the value and where it ends. JSON as the standard writes it, and less: a key twice, NaN,
numbers beyond 64 bits, half a surrogate pair and brackets deeper than MAX_DEPTH are faults of the row, because they could not be
stored or would be chosen from in silence. The price: a row is encoded once to prove that it can be, 2 us.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from preprocess.list_encoding import encoding_of

MAX_DEPTH = 64  # brackets inside each other in one row; a row of the right form has 4
MAX_ROW_CHARS = 4 << 20  # what the `json` member of a sample may have at most
TOO_LARGE = f"a row of more than {MAX_ROW_CHARS >> 20} MB, or a quote without an end; give audio as the path of a file"
TOO_DEEP = f"brackets more than {MAX_DEPTH} deep inside each other"
DEPTH_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)
HALF_PAIR = re.compile("[\ud800-\udfff]")
UNDECODED = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, after decoding with "surrogateescape"


class RowError(Exception):
    """Why a row is none; `end` is where it ends if that is known. `is_open`: more text could show its end."""

    def __init__(self, detail: str, end: int | None = None, is_open: bool = False, is_syntax: bool = False) -> None:
        super().__init__(detail)
        self.detail, self.end, self.is_open, self.is_syntax = detail, end, is_open, is_syntax


def parse_row(text: str, start: int = 0) -> tuple[Any, int]:
    """(value, its end) of the JSON value at `start`. Raises RowError.

    `text` was decoded with "surrogateescape", so that bytes that are not UTF-8 are named here; it may go on behind the value.
    """
    try:
        value, end = PLAIN.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _syntax_fault(text, start, error) from None
    except RecursionError:
        raise RowError(TOO_DEEP) from None
    except ValueError as error:
        end = _lenient_end(text, start)
        raise RowError(str(error), end, is_open=end is None) from None
    if end - start > MAX_ROW_CHARS:
        raise RowError(TOO_LARGE, end)
    try:
        stored = msgspec.json.encode(value)
    except UnicodeEncodeError:  # of an escape, or of bytes that are not UTF-8
        check_utf8(text[start:end], end)
        raise RowError("half of a surrogate pair (\\ud800 to \\udfff) inside a string", end) from None
    except RecursionError:
        raise RowError(TOO_DEEP, end) from None
    # Cheap proofs for nearly every row; where they fail, the slow checks decide.
    if stored.count(b"{") + stored.count(b"[") > MAX_DEPTH:
        _check_depth(text[start:end], end)
    if stored.count(b":") != text.count(":", start, end) or text.find("\\u003", start, end) >= 0:
        _check_keys(text, start, end)
    return value, end


def check_utf8(text: str, end: int | None) -> None:
    """Raises RowError for a row's text that holds bytes that are not UTF-8."""
    found = UNDECODED.search(text)
    if found:
        data = text.encode("utf-8", "surrogateescape")
        place = len(text[: found.start()].encode())
        raise RowError(f"not UTF-8: byte 0x{data[place]:02x} at byte {place} of the row; {encoding_of(data)}", end)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number; write null, or leave the key out")


def _integer(digits: str) -> int:
    if len(digits) < 19:
        return int(digits)
    if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 64:
        raise ValueError(f"{_short(digits)} is beyond 64 bits; write it as a string")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{_short(digits)} is beyond 64 bits; write it as a string")
    return value


def _short(digits: str) -> str:
    return digits if len(digits) <= 40 else f"{digits[:30]}... ({len(digits)} digits)"


PLAIN = json.JSONDecoder(parse_constant=_constant, parse_int=_integer, parse_float=_float)
WITH_PAIRS = json.JSONDecoder(object_pairs_hook=_pairs)
STRICT = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_constant=_constant, parse_int=_integer, parse_float=_float
)  # all of these are ValueErrors
LENIENT = json.JSONDecoder(strict=False, parse_int=len, parse_float=len)


def _lenient_end(text: str, start: int) -> int | None:
    try:
        return LENIENT.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def _syntax_fault(text: str, start: int, error: json.JSONDecodeError) -> RowError:
    place, what = error.pos, error.msg
    if what.startswith("Invalid control character"):
        what = f"a raw {text[place]!r} inside a string, or a quote that is missing"
    is_open = what.startswith("Unterminated string") or place > len(text) - 16
    where = f"at character {place - start} of the row, before {text[place : place + 20]!r}"
    return RowError(f"not valid JSON: {what} {where}", is_open=is_open, is_syntax=True)


def _check_depth(row: str, end: int) -> None:
    depth = 0
    for token in DEPTH_TOKEN.finditer(row):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth > MAX_DEPTH:
            raise RowError(TOO_DEEP, end)


def _check_keys(text: str, start: int, end: int) -> None:
    """A key that stands twice takes the colon of the value that is lost with it."""
    try:
        WITH_PAIRS.raw_decode(text, start)
    except ValueError as error:
        raise RowError(str(error), end) from None
