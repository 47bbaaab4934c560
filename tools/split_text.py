"""A long text in parts that are spoken one after the other, split where a reader would breathe.

In: a text. Out: parts whose join is the text, to the letter. A text of at most `max_chars` stays whole. A longer one is
split behind sentence marks (. ! ? ؟ ؛ and a line's end), a sentence that is still too long behind commas, and what then is
too long at blanks; neighbours are joined again as far as they fit. Never split is what has no blank in it: a number (3.14,
1,000, ١٫٥, 10:30), a word, an address; only the Arabic marks ؟ ؛ ، end a sentence without a blank behind them, where no
digit stands on both sides. The price: a "word" longer than `max_chars` makes a part that is too long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

MAX_CHARS = 250  # about 18 s of Arabic speech; training clips are seldom longer
LOOK_BACK = 40  # characters, for the word before a full stop
CLOSERS = "\"'”’»)]}›"
# Words whose full stop does not end a sentence, without it; single letters (م. أ.د. U.S.) are known as such.
ABBREVIATIONS = frozenset(
    ["dr", "mr", "mrs", "ms", "prof", "st", "vs", "etc", "fig", "vol", "eg", "ie", "approx", "inc", "jr", "sr"]
)
SENTENCE_MARKS = re.compile(
    rf"(?<![.!?؟؛…])[.!?؟؛…]+[{re.escape(CLOSERS)}]*(?=\s|$)\s*"
    r"|[؟؛]+[!?؟؛.]*[»)\]}”’›]*[،,]?\s*"  # no " or ': without a blank behind them they may open
    r"|(?<!\s)[^\S\n]*\n\s*"  # the looks back keep a long run of marks or blanks from being read again from each of its letters
)
COMMAS = re.compile(rf"[،,][{re.escape(CLOSERS)}]*\s+|،")
BLANKS = re.compile(r"\s+")
LAST_WORD = re.compile(r"[^\s(«“\"']*$")
LIST_NUMBER = re.compile(r"(?:^|\n)\s*\d{1,3}$")


def split_text(text: str, max_chars: int = MAX_CHARS) -> list[str]:
    """The parts in order; "".join of them is `text`. Each holds a letter or digit, unless the text has none."""
    parts = [text]
    for ends in (_sentence_ends, _comma_ends, _word_ends):
        parts = [piece for part in parts for piece in _split(part, ends, max_chars)]
    return parts


def _split(text: str, ends: Callable[[str], Iterator[int]], max_chars: int) -> list[str]:
    """`text`, or pieces of it that end at `ends`, each as long as fits."""
    if len(text.strip()) <= max_chars:
        return [text]
    pieces: list[str] = []
    start = 0
    for end in [*ends(text), len(text)]:
        piece, start = text[start:end], end
        is_silent = not any(letter.isalnum() for letter in piece)
        fits = pieces and len((pieces[-1] + piece).strip()) <= max_chars
        if pieces and (fits or is_silent or not any(letter.isalnum() for letter in pieces[-1])):
            pieces[-1] += piece
        elif piece:
            pieces.append(piece)
    return pieces


def _sentence_ends(text: str) -> Iterator[int]:
    for match in SENTENCE_MARKS.finditer(text):
        if not _is_between_digits(text, match.start(), match.end()) and not _is_abbreviation(text, match):
            yield match.end()


def _comma_ends(text: str) -> Iterator[int]:
    for match in COMMAS.finditer(text):
        if not _is_between_digits(text, match.start(), match.end()):
            yield match.end()


def _word_ends(text: str) -> Iterator[int]:
    for match in BLANKS.finditer(text):
        yield match.end()


def _is_between_digits(text: str, start: int, end: int) -> bool:
    """Whether a mark without a blank stands in a number: ٣،٥."""
    return (
        start > 0
        and end < len(text)
        and text[start - 1].isdigit()
        and text[end].isdigit()
        and not text[end - 1].isspace()
    )


def _is_abbreviation(text: str, match: re.Match[str]) -> bool:
    """Whether a single full stop belongs to the word before it, or to the number of a list's item."""
    if match.group().strip() != "." or "\n" in match.group():
        return False
    before = text[max(0, match.start() - LOOK_BACK) : match.start()]
    if LIST_NUMBER.search(before):
        return True
    found = LAST_WORD.search(before)
    word = found.group() if found else ""
    letters = word.split(".")
    return word.replace(".", "").casefold() in ABBREVIATIONS or (
        all(len(letter) == 1 and letter.isalpha() for letter in letters) and bool(word)
    )
