"""The list as rows: where each one begins and ends, in constant memory; nothing of what a row means.

In: a path. Out: one `RawRow` per row of a JSON array or of JSON Lines, with its line; a row that cannot be read is one `BadRow`
and the next one is found again. In an array that is where an object begins as the list's first row does, or with a key of a row:
the price is that a row that begins with a key of its own, unlike the first, is counted with a broken one before it. A list that
ends before its end is an error, never a shorter list.
"""

from __future__ import annotations

import codecs
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from preprocess.list_encoding import UNREADABLE, UTF8_BOM, open_list, refuse_other_forms
from preprocess.list_row import MAX_ROW_CHARS, TOO_LARGE, RowError, parse_row
from shards.errors import DataError

BLOCK_BYTES = 1 << 18
MAX_LINE_BYTES = 4 * MAX_ROW_CHARS + 8
LINES_LOOKED_AT = 8  # whether a first line that is no row is one bad row, or the list no JSON Lines
MARK_CHARS = 256  # of a row's beginning, kept where the text is cut
BLANKS = " \t\r\n"
NOT_BLANK = re.compile(r"[^ \t\r\n]")
CR_ROWS = re.compile(rb"\}[ \t]*\r[ \t\r]*\{")  # never inside a row: there a comma stands between two objects
LINE_END = re.compile(rb"\r\n|\r|\n")
OTHER_KEYS = "|".join(("id", "speaker", "start_index", "misc"))  # that a row of another form may begin with
FIRST_KEY = re.compile(r'\{[ \t\r\n]*"([^"\\]{1,64})"')


class RawRow(msgspec.Struct, frozen=True):
    """A decoded row; `line` counts from 1 and is where it begins."""

    number: int
    line: int
    value: Any


class BadRow(msgspec.Struct, frozen=True):
    """A row that cannot be decoded, and why."""

    number: int
    line: int
    detail: str


def read_raw_rows(path: Path) -> Iterator[RawRow | BadRow]:
    """Every row in order. Raises DataError for a list that is missing, cut off, in another encoding or no list."""
    with open_list(path) as file:
        first = _first_byte(file, path)
        if first == b"[":
            yield from _array_rows(_Window(file, path))
        elif first == b"{":
            yield from _line_rows(file, path)
        elif first:
            raise DataError(f"{path}: begins with {first!r}; expected a JSON array of ChatML rows, or one row per line")


def _first_byte(file: io.BufferedReader, path: Path) -> bytes:
    """The first byte that is not blank; the file stands behind a byte order mark. Raises DataError for other formats."""
    try:
        start = file.peek(BLOCK_BYTES)
        refuse_other_forms(start, path)
        if start.startswith(UTF8_BOM):
            file.read(len(UTF8_BOM))
            start = file.peek(BLOCK_BYTES)
        while start and not start.strip(BLANKS.encode()):
            file.read(len(start))
            start = file.peek(BLOCK_BYTES)
        return start.lstrip(BLANKS.encode())[:1]
    except UNREADABLE as error:
        raise DataError(f"{path}: not readable as a {path.suffix} file: {error}") from None


# --- an array -------------------------------------------------------------------------------------------------------


def _array_rows(window: _Window) -> Iterator[RawRow | BadRow]:
    """Rows of `[row, row, ...]`; each is held until what follows has shown that it was a whole one."""
    window.next_letter()
    window.position += 1  # the opening bracket
    held: RawRow | BadRow | None = None
    number = 0
    while True:
        letter, line = window.next_letter(), window.line
        if letter == "]":
            if window.is_end_of_list():
                break
            row = BadRow(number, line, "a ']' that closes nothing")
        else:
            try:
                row = RawRow(number, line, window.take_row(letter))
            except RowError as fault:
                row = BadRow(number, line, fault.detail)
        if isinstance(row, BadRow) and letter in '"}]' and held:  # it is what the row before has left
            held = BadRow(held.number, held.line, f"not valid JSON: it ends early; behind it: {row.detail}")
            continue
        if held:
            yield held
        held, number = row, number + 1
    if held:
        yield held


class _Window:
    """The text of an array as far as it is read; what is not used yet begins at `position`."""

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._row_begin: re.Pattern[str] | None = None
        self.position = 0
        self._line, self._counted = 1, 0  # `_line` is that of the character at `_counted`

    @property
    def line(self) -> int:
        """Of the character at `position`, from 1 on."""
        self._line += self._text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def next_letter(self) -> str:
        """The next character that is no blank, without using it. Raises DataError where the list is cut off."""
        while not (found := NOT_BLANK.search(self._text, self.position)):
            self.position = len(self._text)
            if not self._more():
                self._fail("the list ends without its closing ']': it is cut off, and no part of a list is used")
        self.position = found.start()
        return found[0]

    def is_end_of_list(self) -> bool:
        """Use a ']' between rows; False for a stray one with more rows behind it. Raises DataError for other text there."""
        self.position += 1
        while not (found := NOT_BLANK.search(self._text, self.position)):
            self.position = len(self._text)
            if not self._more():
                return True
        self.position = found.end()
        if found[0] != ",":
            self._fail(
                f"{found[0]!r} behind the list's closing ']'; several lists in one are JSON Lines, a row per line"
            )
        return False

    def take_row(self, letter: str) -> Any:
        """The value that begins here with `letter`, used up to the next row. Raises RowError, and stands there as well."""
        if letter == ",":
            self.position += 1
            raise RowError("nothing stands before the comma")
        if self._row_begin is None:
            first = FIRST_KEY.match(self._text, self.position)
            names = "|".join(["messages", re.escape(first[1])] if first else ["messages"])
            self._row_begin = re.compile(
                rf'(\{{[ \t\r\n]*"(?:{names})"[ \t\r\n]*:)'
                rf'|[,\]}}][ \t\r\n]*(\{{[ \t\r\n]*"(?:{OTHER_KEYS})"[ \t\r\n]*:)'
            )
        try:
            value = self._parsed(is_open_ended=letter not in '{["')
        except RowError as fault:
            if fault.end is None:
                self._seek_row(self.position + 1)
            else:
                self.position = fault.end
                if not self._take_comma():
                    self._seek_row(self.position)
            raise
        if not self._take_comma():
            found = self._text[self.position]
            self._seek_row(self.position)
            raise RowError(f"not valid JSON: {found!r} behind it, expected ','")
        return value

    def _parsed(self, is_open_ended: bool) -> Any:
        """`is_open_ended`: a number may go on behind the text that is read."""
        while True:
            try:
                value, end = parse_row(self._text, self.position)
            except RowError as fault:
                if not fault.is_open:
                    raise
                if len(self._text) - self.position > MAX_ROW_CHARS:
                    raise RowError(TOO_LARGE if fault.is_syntax else fault.detail) from None
                if not self._more():
                    raise
                continue
            if is_open_ended and end == len(self._text) and self._more():
                continue
            self.position = end
            return value

    def _take_comma(self) -> bool:
        """False where neither a comma nor the list's end follows; `position` is at what does."""
        letter = self.next_letter()
        if letter == ",":
            self.position += 1
        return letter in ",]"

    def _seek_row(self, start: int) -> None:
        """Go to where a row begins, at `start` or behind it; without one, to the list's last character."""
        assert self._row_begin
        self.position = start
        while not (found := self._row_begin.search(self._text, self.position)):
            self.position = max(self.position, len(self._text) - MARK_CHARS)
            if not self._more():
                kept = self._text.rstrip(BLANKS)
                self.position = len(kept) - kept.endswith("]")
                return
        self.position = max(found.start(1), found.start(2))  # -1 of the one that was not found

    def _more(self) -> bool:
        """Drop what is used and read on, at least as much as is kept; False at the file's end."""
        size = max(BLOCK_BYTES, len(self._text) - self.position)
        try:
            data = self._file.read(size)
        except UNREADABLE as error:
            self._fail(f"not readable any further: {error}")
        line = self.line
        self._text = self._text[self.position :] + self._decoder.decode(data, final=not data)
        self.position = self._counted = 0
        self._line = line
        return bool(data)

    def _fail(self, detail: str) -> NoReturn:
        raise DataError(f"{self._path}: line {self.line}: {detail}")


# --- JSON Lines -----------------------------------------------------------------------------------------------------


def _line_rows(file: io.BufferedReader, path: Path) -> Iterator[RawRow | BadRow]:
    """One row per line; blank lines are skipped. Only \\n ends a line, but \\r as well where it ends the first row (old Mac)."""
    lines = _lines(file, path)
    begin = list(itertools.islice(lines, LINES_LOOKED_AT))
    if not _may_be_row(begin[0][1]) and 2 * sum(_is_object(text) for _, text, _ in begin[1:]) < len(begin):
        raise DataError(
            f"{path}: the top level is an object, {begin[0][1][:40]!r} ...; the list itself must be the top level: "
            "[ {row}, {row}, ... ], or one row per line"
        )
    for number, (line, text, is_ended) in enumerate(itertools.chain(begin, lines)):
        try:
            yield RawRow(number, line, _value_of(text))
        except RowError as fault:
            if fault.is_open and not is_ended and not text.endswith("}"):
                raise DataError(
                    f"{path}: line {line}: the list ends inside a row: it is cut off, and no part of a list is used"
                ) from None
            yield BadRow(number, line, fault.detail)


def _lines(file: io.BufferedReader, path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line number, text, whether it has an end) of every line that is not blank; a longer one than any row is cut."""
    line = 0
    try:
        for data, is_ended in _ended_lines(file):
            line += 1
            text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff").strip(BLANKS)
            if text:
                yield line, text, is_ended
    except UNREADABLE as error:
        raise DataError(f"{path}: line {line + 1}: not readable any further: {error}") from None


def _ended_lines(file: io.BufferedReader) -> Iterator[tuple[bytes, bool]]:
    """(a line of at most MAX_LINE_BYTES, whether it has an end)."""
    data = file.readline(MAX_LINE_BYTES)
    if CR_ROWS.search(data):
        yield from _ended_by_cr(file, data)
        return
    while data:
        is_ended = data.endswith(b"\n")
        while not is_ended and (rest := file.readline(BLOCK_BYTES)):
            is_ended = rest.endswith(b"\n")
        yield data, is_ended
        data = file.readline(MAX_LINE_BYTES)


def _ended_by_cr(file: io.BufferedReader, data: bytes) -> Iterator[tuple[bytes, bool]]:
    """The same where \\r ends a line, as \\n and both together do; `data` was read already."""
    begun = b""
    while data:
        first, *others = LINE_END.split(data)
        begun = (begun + first)[:MAX_LINE_BYTES]  # beyond any row: the rest of it says nothing
        for line in others:
            yield begun, True
            begun = line
        data = file.read(BLOCK_BYTES)
    if begun:
        yield begun, False


def _value_of(text: str) -> Any:
    """The row on a line. Raises RowError."""
    if len(text) > MAX_ROW_CHARS:
        raise RowError(TOO_LARGE)
    value, end = parse_row(text)
    if end < len(text):
        raise RowError(f"not valid JSON: {text[end : end + 20]!r} behind it; one row per line, without commas")
    return value


def _is_object(text: str) -> bool:
    try:
        return isinstance(_value_of(text), dict)
    except RowError:
        return False


def _may_be_row(text: str) -> bool:
    """Whether the first line can be a row, a broken one too; `{"data": [...]}` is a list that was wrapped."""
    try:
        value = _value_of(text)
    except RowError:
        return '"messages"' in text[:4096]
    is_wrapped = isinstance(value, dict) and any(isinstance(part, list) for part in value.values())
    return isinstance(value, dict) and ("messages" in value or not is_wrapped)
