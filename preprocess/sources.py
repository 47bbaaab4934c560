"""Reads the user's list: a JSON array or JSON Lines of ChatML rows, plain, .gz or .zst, in constant memory.

In: a path. Out: one `SourceRow` per row, or a `Reject` for a row that does not have the form; a syntax error ends the
list, because nothing behind it can be trusted. A row's cloning pair (who is the reference, what is the target) is found
by `find_pair`; the rules stand there.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import msgspec
import zstandard

from preprocess.reasons import RowFault, reject
from preprocess.segment import WHOLE, Segment
from shards.errors import DataError
from shards.sample import AudioItem, ChatRow, TextItem
from shards.writer import Reject

INSTRUCTION_PREFIX = "Please generate speech for given text in reference audio's voice:"
CONTROL_TOKEN = re.compile(r"<\|.*?\|>")
# A list that ends early or is not compressed as its name says; JSON faults come beside these.
UNREADABLE = (OSError, EOFError, zlib.error, zstandard.ZstdError, UnicodeDecodeError)
KNOWN_KEYS = frozenset(field.name for field in msgspec.structs.fields(ChatRow))


class SourceRow(msgspec.Struct, frozen=True):
    """A row with the right form; `extra` holds the keys ChatML does not know, to be kept."""

    row: int
    id: str
    chat: ChatRow
    extra: dict[str, Any]


def read_rows(path: Path) -> Iterator[SourceRow | Reject]:
    """Every row of the list in order. Raises DataError for a list that is missing, empty or not JSON."""
    number = -1
    with _open(path) as file:
        for number, value in enumerate(_values(file, path)):
            yield _typed(number, value)
    if number < 0:
        raise DataError(f"{path}: the list is empty; it must hold at least one ChatML row")


def _typed(number: int, value: Any) -> SourceRow | Reject:
    name = str(value.get("id", f"row-{number}")) if isinstance(value, dict) else f"row-{number}"
    try:
        chat = msgspec.convert(value, ChatRow)
    except msgspec.ValidationError as error:
        return reject(number, name, "intake", "row_invalid", f"row {number}: {error}")
    return SourceRow(number, name, chat, {key: item for key, item in value.items() if key not in KNOWN_KEYS})


def _open(path: Path) -> BinaryIO:
    if path.is_dir():
        raise DataError(f"{path}: a folder; give the ChatML list (a .json or .jsonl file) inside it")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a ChatML list (.json or .jsonl, also .gz or .zst)") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file))  # pyright: ignore - a GzipFile is a raw reader
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(file), buffer_size=1 << 16)
    return file  # pyright: ignore[reportReturnType]


def _values(file: BinaryIO, path: Path) -> Iterator[Any]:
    buffered = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)  # pyright: ignore
    try:
        if buffered.peek(3)[:3] == b"\xef\xbb\xbf":
            buffered.read(3)  # a byte order mark, which JSON parsers refuse
        first = buffered.peek(4096).lstrip()[:1]
    except UNREADABLE as error:
        raise DataError(f"{path}: not readable as a {path.suffix} file: {error}") from None
    if first == b"[":
        yield from _array(buffered, path)
    elif first == b"{":
        yield from _lines(buffered, path)
    elif first:
        raise DataError(f"{path}: begins with {first!r}; expected a JSON array of ChatML rows, or one row per line")


def _array(file: BinaryIO, path: Path) -> Iterator[Any]:
    number = 0
    try:
        for value in ijson.items(file, "item", use_float=True):
            yield value
            number += 1
    except (ijson.JSONError, *UNREADABLE) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: row {number}: not valid JSON: {reason}; nothing behind it was read") from None


def _lines(file: BinaryIO, path: Path) -> Iterator[Any]:
    number = 0
    try:
        for line in file:
            if not line.strip():
                continue
            if number == 0:
                _refuse_wrapped_list(line, path)
            yield msgspec.json.decode(line)
            number += 1
    except (msgspec.DecodeError, *UNREADABLE) as error:
        raise DataError(f"{path}: row {number}: not valid JSON: {error}; nothing behind it was read") from None


def _refuse_wrapped_list(line: bytes, path: Path) -> None:
    """`{"data": [...]}` would otherwise look like one strange row; a row with a list of its own beside messages is one."""
    head = line.strip()[:4096]
    try:
        row = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        is_wrapped = b'"messages"' not in head  # an object over many lines
    else:
        is_wrapped = "messages" not in row and any(bytes(value).lstrip()[:1] == b"[" for value in row.values())
    if is_wrapped:
        raise DataError(
            f"{path}: the top level is an object, {head[:40].decode('utf-8', 'replace')} ...; the list itself must be the "
            "top level: [ {row}, {row}, ... ], or one row per line"
        )


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of all frames of a file. zstandard's own reader takes a frame that was cut off for its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._packed = b""
        self._ready = memoryview(b"")  # a view, because one block may unpack to megabytes
        self._is_inside = False  # a frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(1 << 14)
            if not self._packed:
                if self._is_inside:
                    raise EOFError("the compressed file is cut off")
                return 0
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._is_inside, self._packed = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


# --- who is cloned, and what is said --------------------------------------------------------------------------------


class Pair(msgspec.Struct, frozen=True):
    """The cloning pair of a row. `*_text` are the texts as the clone layout says them: stripped, without instruction."""

    reference_path: str
    target_path: str
    system_text: str | None
    reference_text: str
    target_text: str
    warnings: list[str]
    reference_segment: Segment = WHOLE
    target_segment: Segment = WHOLE


def find_pair(chat: ChatRow) -> Pair:
    """Find reference and target of a row. Raises RowFault with a reason when it has no clear pair.

    The last audio is the target and stands in the last assistant turn; the only other audio is the reference. The
    reference text is the last user text before the reference. The target text is the text of the target's turn, else
    the last user text before the target, without the known instruction prefix.
    """
    reference_path = target_path = ""
    audios: list[tuple[str, str]] = []  # (role, path)
    segments: list[Segment] = []
    user_text = reference_text = target_text = ""
    system_text: str | None = None
    for message in chat.messages:
        items = [TextItem(message.content)] if isinstance(message.content, str) else message.content
        turn_text = ""
        for item in items:
            if isinstance(item, AudioItem):
                audios.append((message.role, item.audio_url))
                segments.append(Segment(item.offset or 0.0, item.duration))
                if len(audios) == 1:
                    reference_text = user_text
                continue
            _refuse_control_tokens(item.text)
            if message.role == "system" and system_text is None:
                system_text = item.text.strip()
            elif message.role == "user":
                user_text = item.text.strip()
            elif message.role == "assistant":
                turn_text = turn_text or item.text.strip()
        if message.role == "assistant" and len(audios) == 2:
            target_text = turn_text
    if len(audios) != 2 or audios[1][0] != "assistant":
        where = ", ".join(role for role, _ in audios) or "none"
        raise RowFault(
            "pair",
            "audio_count",
            f"{len(audios)} audio items ({where}); expected a reference, then an assistant's target",
        )
    reference_path, target_path = audios[0][1], audios[1][1]
    instructed = user_text.removeprefix(INSTRUCTION_PREFIX).strip() if user_text != reference_text else ""
    warnings: list[str] = []
    if not target_text:
        target_text = instructed
        warnings.append("target_text_from_instruction")
    elif instructed and instructed != target_text and user_text.startswith(INSTRUCTION_PREFIX):
        warnings.append("instruction_text_differs")
    for name, text in (("reference", reference_text), ("target", target_text)):
        if not text:
            raise RowFault("pair", "text_missing", f"no {name} text")
    return Pair(reference_path, target_path, system_text, reference_text, target_text, warnings, *segments)


def _refuse_control_tokens(text: str) -> None:
    found = CONTROL_TOKEN.search(text)
    if found:
        raise RowFault("pair", "text_control_token", f"{found.group()!r} in {text[:60]!r}")
