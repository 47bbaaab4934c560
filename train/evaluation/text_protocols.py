"""Text rules before errors are counted, each with a name, because the same pair of texts scores 0 % or 67 % by rule set.

In: a text. Out: the text that is compared. `raw` changes nothing but blanks. `strict` is ours: spelling that a listener cannot
hear is folded, and it heads every report. `oualb` follows the Open Universal Arabic ASR Leaderboard letter by letter
(eval.py of Natural-Language-Processing-Elm/open_universal_arabic_asr_leaderboard, commit 8fce859 of 2026-07-27), with its
oddities: tatweel stays, a lone hamza goes, punctuation goes without leaving a blank. Rules here never touch what is spoken.
A name stands for fixed rules: whoever changes one raises its version.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

VERSIONS = {"raw": "1", "strict": "1", "oualb": "8fce859"}
HEADLINE = "strict"

DIGITS = {0x0660 + i: str(i) for i in range(10)}
MARKS = dict.fromkeys([*range(0x0610, 0x061B), 0x0640, *range(0x064B, 0x0660), 0x0670, *range(0x06D6, 0x06EE)])
INVISIBLE = dict.fromkeys([0xFEFF, *range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
STRICT_LETTERS = str.maketrans("أإآٱىة", "اااايه") | DIGITS
NO_WORD = re.compile(r"[^\w\s]")

LEADERBOARD_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~،؛؟"
LEADERBOARD_LETTERS = (
    dict.fromkeys([*map(ord, LEADERBOARD_PUNCTUATION), *range(0x064B, 0x0653), ord("ء")])
    | str.maketrans("پڤآأإؤئ", "بفاااوي")
    | DIGITS
)
LONE_WAW = re.compile(r"(^|\s)و\s+")


def raw(text: str) -> str:
    """Runs of blanks become one blank; all else counts."""
    return " ".join(text.split())


def strict(text: str) -> str:
    """NFKC; no marks, tatweel or invisible characters; one alef, ya and ha; Western digits; what is no word is a blank."""
    text = unicodedata.normalize("NFKC", text).translate(INVISIBLE).translate(MARKS).translate(STRICT_LETTERS)
    return " ".join(NO_WORD.sub(" ", text).split())


def oualb(text: str) -> str:
    """Punctuation, U+064B-0652 and hamza deleted; letters folded; a waw on its own joins the next word."""
    text = LONE_WAW.sub(r"\1و", text.translate(LEADERBOARD_LETTERS))
    return re.sub(r"\s+", " ", text).strip()


PROTOCOLS: dict[str, Callable[[str], str]] = {"raw": raw, "strict": strict, "oualb": oualb}


def groups_of(text: str, dialect: str | None = None) -> list[str]:
    """Groups of texts that are scored for themselves, because a recognizer and not the voice often decides them."""
    found = {
        "digits": any(letter.isdecimal() for letter in text),
        "latin words": any("LATIN" in unicodedata.name(letter, "") for letter in text if letter.isalpha()),
        "diacritised": any(0x064B <= ord(letter) <= 0x0652 for letter in text),
        f"dialect {dialect}": bool(dialect),
    }
    return [name for name, holds in found.items() if holds]
