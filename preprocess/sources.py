"""What the rows of the user's list mean: the ChatML form, and who is cloned from whom.

In: a path. Out: one `SourceRow` per row, or a `Reject` for a row that does not have the form; `list_file` finds the rows. A row's
cloning pair (who is the reference, what is the target) is found by `find_pair`; the rules stand there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from preprocess.audio_url import not_a_file, part_in_other_words
from preprocess.list_file import BadRow, RawRow, read_raw_rows
from preprocess.reasons import RowFault, reject
from preprocess.segment import WHOLE, Segment
from preprocess.spoken_text import not_spoken
from preprocess.unseen import control_character
from shards.cloning import INSTRUCTION
from shards.errors import DataError
from shards.sample import AudioItem, ChatRow, Role, TextItem
from shards.writer import Reject

INSTRUCTION_PREFIX = INSTRUCTION.strip()
MIN_QUOTED_CHARS = 8  # of a target text that is looked for in the reference's: "yes" stands in many sentences
CONTROL_TOKEN = re.compile(r"<\|.*?\|>")
# The same with blanks or line ends inside, or in full-width, small or other look-alike signs: no token for the released
# tokenizer, but nothing that anybody said, either.
LIKE_CONTROL_TOKEN = re.compile(r"[<＜﹤‹]\s*[|｜∣]\s*[\w/][\w\s/-]{0,60}?[|｜∣]\s*[>＞﹥›]")
SCENE = re.compile(r"<\|scene_desc_start\|>(?:(?!<\|).)*<\|scene_desc_end\|>", re.DOTALL)
KNOWN_KEYS = frozenset(field.name for field in msgspec.structs.fields(ChatRow))


class SourceRow(msgspec.Struct, frozen=True):
    """A row with the right form; `extra` holds the keys ChatML does not know, to be kept."""

    row: int
    id: str
    chat: ChatRow
    extra: dict[str, Any]


def read_rows(path: Path) -> Iterator[SourceRow | Reject]:
    """Every row of the list in order. Raises DataError for a list that is missing, empty, cut off or no list."""
    number = -1
    for raw in read_raw_rows(path):
        number = raw.number
        if isinstance(raw, BadRow):
            yield _row_invalid(raw, f"row-{number}", raw.detail)
        else:
            yield _typed(raw)
    if number < 0:
        raise DataError(f"{path}: the list is empty; it must hold at least one ChatML row")


def _row_invalid(raw: RawRow | BadRow, name: str, detail: str) -> Reject:
    return reject(raw.number, name, "ingest", "row_invalid", f"row {raw.number} (line {raw.line}): {detail}")


def _typed(raw: RawRow) -> SourceRow | Reject:
    value = raw.value
    name = str(value["id"]) if isinstance(value, dict) and has_own_id(value) else f"row-{raw.number}"
    for reason, fault in (("audio_not_a_file", not_a_file(value)), ("audio_segment", part_in_other_words(value))):
        if fault:
            return reject(raw.number, name, "ingest", reason, f"row {raw.number} (line {raw.line}): {fault}")
    try:
        chat = msgspec.convert(value, ChatRow)
    except msgspec.ValidationError as error:
        return _row_invalid(raw, name, str(error))
    return SourceRow(raw.number, name, chat, {key: item for key, item in value.items() if key not in KNOWN_KEYS})


def has_own_id(extra: dict[str, Any]) -> bool:
    """null and "" are what exporters write for no id."""
    return extra.get("id") not in (None, "")


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
    """Raises RowFault for a text with a control token or a control character."""
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
            refuse_control_tokens(item.text, message.role)
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


def refuse_control_tokens(text: str, role: Role) -> None:
    """A system's text may hold a scene as the released prompts do, opened and closed; no other text holds any.

    Raises RowFault, for characters that control a terminal as well.
    """
    control = control_character(text)
    if control:
        raise RowFault("pair", "text_control_character", f"{control} in {_quote(text)}")
    checked = SCENE.sub("", text) if role == "system" else text
    found = CONTROL_TOKEN.search(checked) or LIKE_CONTROL_TOKEN.search(checked)
    if found:
        raise RowFault("pair", "text_control_token", f"{found.group()!r} in {_quote(text)}")
