"""What makes a row usable, apart from encoding it: cleaned texts, a clear pair, sound audio, texts that fit the audio.

`--validate-only` and the making of shards both go through here, so a row that passes the one passes the other.
"""

from __future__ import annotations

import msgspec

from preprocess.audio import AudioMeasures
from preprocess.reasons import RowFault, known_warnings
from preprocess.sources import Pair, SourceRow, find_pair
from preprocess.text import TextSection, clean, text_fault, text_warnings
from shards.sample import Message, TextItem

NO_SPEAKER = frozenset({"", "unknown", "none", "null", "nan", "n/a", "na", "undefined", "unk", "?", "-"})


class CheckedRow(msgspec.Struct, frozen=True):
    """A row with cleaned texts and its pair."""

    row: SourceRow
    pair: Pair
    warnings: list[str]


def check_row(row: SourceRow, section: TextSection) -> CheckedRow:
    """Clean the texts and find the pair. Raises RowFault."""
    changes: list[str] = []

    def cleaned(text: str) -> str:
        text, found = clean(text, section)
        changes.extend(found)
        return text

    messages = [
        Message(
            message.role,
            cleaned(message.content)
            if isinstance(message.content, str)
            else [TextItem(cleaned(item.text)) if isinstance(item, TextItem) else item for item in message.content],
        )
        for message in row.chat.messages
    ]
    row = msgspec.structs.replace(row, chat=msgspec.structs.replace(row.chat, messages=messages))
    pair = find_pair(row.chat)
    warnings = sorted(set(changes)) + pair.warnings
    return CheckedRow(row, pair, warnings if has_speaker(row) else [*warnings, "speaker_from_reference"])


def has_speaker(row: SourceRow) -> bool:
    return (row.chat.speaker or "").strip().casefold() not in NO_SPEAKER


def speaker_of(row: SourceRow, reference_sha256: str) -> str:
    """The row's speaker; without one, a name for its reference file, wherever that lies.

    One name for all would leave the contrastive loss without other speakers and validation without one to hold out. The price: a
    voice with several reference files counts as several, so it may be on both sides of the validation.
    """
    return row.chat.speaker or "" if has_speaker(row) else f"reference-{reference_sha256[:16]}"


def check_pair(
    checked: CheckedRow, section: TextSection, reference: AudioMeasures, target: AudioMeasures, same_audio: bool
) -> list[str]:
    """Hold texts against audio; returns all warnings of the row. Raises RowFault."""
    pair = checked.pair
    if same_audio:
        raise RowFault("pair", "reference_is_target", f"also the reference {pair.reference_path}", pair.target_path)
    warnings = list(checked.warnings)
    for role, text, measures, path in (
        ("reference", pair.reference_text, reference, pair.reference_path),
        ("target", pair.target_text, target, pair.target_path),
    ):
        fault = text_fault(text, measures.duration_s, section)
        if fault:
            raise RowFault("text", fault[0], f"{role}: {fault[1]}", path)
        codes = measures.warnings + text_warnings(text, measures.duration_s, section)
        warnings += [f"{role}_{code}" for code in codes]
    return known_warnings(warnings)
