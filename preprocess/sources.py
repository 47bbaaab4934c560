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
from typing import Any, BinaryIO, NoReturn

import ijson
import msgspec
import zstandard

from preprocess.reasons import RowFault, reject
from preprocess.segment import WHOLE, Segment
from preprocess.spoken_text import not_spoken
from shards.cloning import INSTRUCTION
from shards.errors import DataError
from shards.sample import AudioItem, ChatRow, Role, TextItem
from shards.writer import Reject

INSTRUCTION_PREFIX = INSTRUCTION.strip()
MIN_QUOTED_CHARS = 8  # of a target text that is looked for in the reference's: "yes" stands in many sentences
CONTROL_TOKEN = re.compile(r"<\|.*?\|>")
SCENE = re.compile(r"<\|scene_desc_start\|>(?:(?!<\|).)*<\|scene_desc_end\|>", re.DOTALL)
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
    details: dict[str, str] = {}  # warning code -> the texts it is about


class _Audio(msgspec.Struct, frozen=True):
    """An audio item and what is written before it in its own turn."""

    turn: int
    role: Role
    path: str
    segment: Segment
    own_text: str


class _Texts(msgspec.Struct, frozen=True):
    """All that is written in one turn on one side of an audio; pieces are joined by one blank."""

    turn: int
    role: Role
    num_audios_before: int
    text: str


def find_pair(chat: ChatRow) -> Pair:
    """Find reference and target of a row. Raises RowFault with a reason when it has no clear pair.

    The last audio is the target and stands in an assistant's turn; the only other audio is the reference. An audio's text is
    what its own turn says before it, all of it; else what the user's turn right before says. Only for the target, that turn may
    also be the user's last one, without the known instruction. What stands behind an audio is never its text, and a text that
    may be a label or an instruction in other words is a reject: training on it would teach words that nobody spoke.
    """
    audios, texts = _audios_and_texts(chat)
    if len(audios) != 2 or audios[1].role != "assistant":
        where = ", ".join(audio.role for audio in audios) or "none"
        detail = f"{len(audios)} audio items ({where}); expected a reference, then an assistant's target"
        raise RowFault("pair", "audio_count", detail)
    reference, target = audios
    details: dict[str, str] = {}
    reference_text = _reference_text(reference, texts)
    target_text = _target_text(reference, target, texts, details)
    _refuse_request_before_reference(reference_text, target_text)
    if reference_text == target_text:
        details["texts_are_the_same"] = f"{_quote(target_text)} for both"
    behind = " ".join(part.text for part in texts if part.num_audios_before == 2)
    if behind:
        details["text_behind_target"] = f"{_quote(behind)} behind {_quote(target_text)}"
    system = [part.text for part in texts if part.role == "system"]
    return Pair(
        reference_path=reference.path,
        target_path=target.path,
        system_text=system[0] if system else None,
        reference_text=reference_text,
        target_text=target_text,
        warnings=list(details),
        reference_segment=reference.segment,
        target_segment=target.segment,
        details=details,
    )


def _audios_and_texts(chat: ChatRow) -> tuple[list[_Audio], list[_Texts]]:
    """Raises RowFault for a text with a control token."""
    audios: list[_Audio] = []
    texts: list[_Texts] = []
    for turn, message in enumerate(chat.messages):
        pieces: list[str] = []
        for item in [TextItem(message.content)] if isinstance(message.content, str) else message.content:
            if isinstance(item, AudioItem):
                _end_of_side(texts, turn, message.role, len(audios), pieces)
                segment = Segment(item.offset or 0.0, item.duration)
                audios.append(_Audio(turn, message.role, item.audio_url, segment, " ".join(pieces)))
                pieces = []
                continue
            _refuse_control_tokens(item.text, message.role)
            if item.text.strip():
                pieces.append(item.text.strip())
        _end_of_side(texts, turn, message.role, len(audios), pieces)
    return audios, texts


def _end_of_side(texts: list[_Texts], turn: int, role: Role, num_audios: int, pieces: list[str]) -> None:
    if pieces:
        texts.append(_Texts(turn, role, num_audios, " ".join(pieces)))


def _reference_text(reference: _Audio, texts: list[_Texts]) -> str:
    before = [part for part in texts if part.num_audios_before == 0 and part.turn < reference.turn]
    text = reference.own_text if reference.role != "system" else ""
    if not text and before and before[-1].role == "user" and before[-1].turn == reference.turn - 1:
        text = _without_instruction(before[-1].text)
        if len(before) > 1 and before[-2].role == "user" and before[-2].turn == before[-1].turn - 1:
            _unclear("reference", f"two user turns before it: {_quote(before[-2].text)}, {_quote(text)}")
    if not text:
        raise RowFault("pair", "text_missing", "no reference text: nothing the user says right before the reference")
    fault = not_spoken(text)
    if fault:
        _unclear("reference", f"{_quote(text)} {fault}")
    return text


def _target_text(reference: _Audio, target: _Audio, texts: list[_Texts], details: dict[str, str]) -> str:
    between = [
        part for part in texts if part.num_audios_before == 1 and (part.turn, part.role) != (target.turn, "assistant")
    ]
    request = next((part for part in reversed(between) if part.role == "user"), None)
    asked = _without_instruction(request.text) if request else ""
    is_known = request is not None and asked != request.text
    own = target.own_text
    if own:
        if is_known and asked and asked != own:
            details["instruction_text_differs"] = f"{_quote(own)} was taken, the instruction says {_quote(asked)}"
        fault = None if own == asked else not_spoken(own)
        if fault:
            _unclear("target", f"{_quote(own)} {fault}")
        return own
    if not request or not asked:
        behind = [part.text for part in texts if part.num_audios_before == 2]
        place = f"; a text stands only behind it: {_quote(behind[0])}" if behind else ""
        raise RowFault("pair", "text_missing", f"no target text in the assistant's turn or the instruction{place}")
    others = [part.text for part in between if part is not request]
    if others:
        _unclear("target", f"{_quote(others[-1])} and {_quote(asked)} stand before it")
    if request.turn == reference.turn and not is_known:
        _unclear("target", f"{_quote(asked)} may be an instruction in other words")
    fault = not_spoken(asked, is_request=True)
    if fault:
        _unclear("target", f"{_quote(asked)} {fault}")
    details["target_text_from_instruction"] = f"{_quote(asked)} was taken from {_quote(request.text)}"
    return asked


def _refuse_request_before_reference(reference_text: str, target_text: str) -> None:
    """An instruction before the reference that holds the text to say, and no transcript of the reference."""
    if len(target_text) >= MIN_QUOTED_CHARS and reference_text != target_text and target_text in reference_text:
        _unclear("reference", f"{_quote(reference_text)} holds the target's text {_quote(target_text)}")


def _without_instruction(text: str) -> str:
    return text.removeprefix(INSTRUCTION_PREFIX).strip()


def _unclear(role: str, detail: str) -> NoReturn:
    fix = {
        "reference": "write what is said in it, and nothing else, right before it",
        "target": "write what is said in it, and nothing else, before it in the assistant's turn",
    }
    raise RowFault("pair", "text_unclear", f"{role}: {detail}; {fix[role]}")


def _quote(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}")


def _refuse_control_tokens(text: str, role: Role) -> None:
    """A system's text may hold a scene as the released prompts do, opened and closed; no other text holds any."""
    checked = SCENE.sub("", text) if role == "system" else text
    found = CONTROL_TOKEN.search(checked)
    if found:
        raise RowFault("pair", "text_control_token", f"{found.group()!r} in {_quote(text)}")
