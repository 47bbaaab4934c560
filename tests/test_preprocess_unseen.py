"""Invisible marks are removed, controls are faults, shapes have a normaliser, garbled texts give a warning; sound texts stay."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from preprocess.config import PreprocessConfig, deciding_keys
from preprocess.reasons import RowFault
from preprocess.sources import find_pair
from preprocess.text import TextSection, clean, text_warnings
from preprocess.unseen import control_character, garbled
from shards.config import read_config
from shards.sample import ChatRow

AS_WRITTEN = TextSection()


def chat(text: str) -> ChatRow:
    user = [{"type": "text", "text": "نص المرجع"}, {"type": "audio", "audio_url": "a.wav"}]
    assistant = [{"type": "text", "text": text}, {"type": "audio", "audio_url": "b.wav"}]
    return msgspec.convert(
        {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}, ChatRow
    )


def test_texts_of_sound_data_stay_byte_for_byte(arabic_mini: Path):
    for row in json.loads(arabic_mini.read_bytes()):
        for message in row["messages"]:
            content = message["content"]
            for text in [content] if isinstance(content, str) else [item.get("text", "") for item in content]:
                assert clean(text, AS_WRITTEN) == (text, [])
                assert garbled(text) is None
                assert control_character(text) is None
    for text in (
        "ثُمَّ قالَ: «نعم»، لا؟ ١٢٣…",
        "می\u200cخواهم",
        "نامه\u064e\u200cای",
        "Straße, déjà vu – naïve\tz\n",
        "Привет 你好 😀",
        "ماذا؟؟؟",
        "تکتک",
    ):
        assert clean(text, AS_WRITTEN) == (text, [])
        assert garbled(text) is None


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        *[(f"سلا{mark}م", "سلام") for mark in "\ufeff\u061c\u200b\u200d\u200e\u2060\u202e\u2066\u00ad\ufe0f\U000e0041"],
        ("\u200cسلا\u200c م\u200c", "سلا م"),
        ("می\u200c\u200cخواهم", "می\u200cخواهم"),
        ("a\r\nb\rc\u2028d\u2029e\x0bf\x0cg", "a\nb\nc\nd\ne\nf\ng"),
    ],
)
def test_marks_without_a_sound_are_removed_and_counted(text: str, kept: str):
    assert clean(text, AS_WRITTEN) == (kept, ["invisible_marks_removed"])
    assert clean(kept, AS_WRITTEN) == (kept, [])


@pytest.mark.parametrize("control", ["\0", "\x01", "\x08", "\x1b", "\x7f", "\x81", "\x85", "\x9f"])
def test_a_control_character_rejects_its_row(control: str):
    text = clean(f"نص{control} الهدف", AS_WRITTEN)[0]
    with pytest.raises(RowFault, match=f"U\\+{ord(control):04X}") as fault:
        find_pair(chat(text))
    assert fault.value.reason == "text_control_character"


ARABIC = "السلام عليكم"


@pytest.mark.parametrize(
    "text",
    [
        ARABIC.encode().decode("cp1252", "replace"),
        f"1. {ARABIC.encode().decode('cp1256', 'replace')}",
        ARABIC.encode().decode("mac_roman"),
        "دي".encode().decode("latin-1"),
        "السلام ???? عليكم",
        "?????? ??????",
        "?? ???",
        "سلا\ufffdم",
        "\ue123\ue124 نص",
    ],
)
def test_a_garbled_text_is_a_warning(text: str):
    assert "text_garbled" in text_warnings(text, 1.0, AS_WRITTEN)


def test_shapes_of_letters_are_reported_and_have_a_normaliser():
    shapes, letters = "ﻣﺮﺣﺒﺎ ﷺ ﻻ ﹷ﴾", "مرحبا صلى الله عليه وسلم لا َ﴾"
    assert clean(shapes, AS_WRITTEN) == (shapes, [])
    assert "text_presentation_forms" in text_warnings(shapes, 1.0, AS_WRITTEN)
    normalized = clean(shapes, TextSection(normalize=["presentation_forms"]))
    assert normalized == (letters, ["normalized_presentation_forms"])
    assert clean(ARABIC, TextSection(normalize=["presentation_forms"])) == (ARABIC, [])
    assert "text_presentation_forms" not in text_warnings(ARABIC, 1.0, AS_WRITTEN)


def test_text_rules_are_part_of_what_a_job_is():
    plain, asked = (
        deciding_keys(read_config(PreprocessConfig, None, overrides))
        for overrides in ([], ['text.normalize=["presentation_forms"]'])
    )
    assert plain["rules"] == {"text": 2}
    assert plain != asked
