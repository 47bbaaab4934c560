"""What a text holds that nobody sees or speaks: invisible marks, controls, and signs of a wrong encoding.

In: a text. Out: the text without what copying and exporting leave behind; or words for what shows that it was damaged. Three
kinds, decided by what is lost: marks without a sound are removed, controls that only damaged bytes leave are a fault of the row,
and what looks like a wrong encoding but may be meant is a warning. Zero-width non-joiners stay between letters, because Persian,
Kurdish and Urdu spell with them; the price is that one left in an Arabic word by mistake stays, too.
"""

from __future__ import annotations

import re

# Unicode's default-ignorable code points but for the non-joiner, and the annotation marks U+FFF9-B. U+061C, U+200E/F, U+202A-E
# and U+2066-9 set direction; U+200B and U+2060 tell where lines break; U+200D joins letters that join anyway; U+FEFF is a byte
# order mark; U+00AD a soft hyphen; U+FE00-F choose a picture.
UNSEEN = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200d-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
UNSEEN_MARK = re.compile(f"[{UNSEEN}]")
NON_JOINER = "\u200c"
JOINABLE = "[^\\W\\d_]|[\u064b-\u065f\u0670]"  # a letter, or a diacritic on one
LOOSE_NON_JOINER = re.compile(rf"(?<!{JOINABLE})\u200c|\u200c(?![^\W\d_])")
LINE_END = re.compile("\r\n?|[\x0b\x0c\u2028\u2029]")
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
# U+FFFD and U+FFFC stand for what could not be shown; private use and noncharacters are letters of one font, or of none.
LOST = re.compile("[\ufffc\ufffd\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff]")
QUESTION_MARKS = re.compile(r"\?{4,}|\?{2,}\s+\?{2,}")  # what an export to a code page makes of Arabic words
ARABIC_LETTER = re.compile("[ء-ي]")
FOREIGN_RUN = re.compile("[^\x00-\x7f]{4,}")


def without_unseen(text: str) -> str:
    """`text` without invisible marks, line ends of other systems as \\n. Letters, diacritics and blanks stay as they are."""
    if text.isascii() and text.isprintable():
        return text
    text = LINE_END.sub("\n", UNSEEN_MARK.sub("", text))
    return LOOSE_NON_JOINER.sub("", re.sub(f"{NON_JOINER}+", NON_JOINER, text)) if NON_JOINER in text else text


def control_character(text: str) -> str | None:
    """The first NUL or other C0 or C1 control (blanks aside), as its number; None without one.

    UTF-16 read as bytes and code pages read as Latin-1 leave them: the letters around are not what was spoken, either.
    """
    found = CONTROL.search(text)
    return f"U+{ord(found[0]):04X}" if found else None


def garbled(text: str) -> str | None:
    """What shows that a text was read or written in a wrong encoding; None when nothing does."""
    if text.isascii() and "??" not in text:
        return None
    if found := LOST.search(text):
        return f"U+{ord(found[0]):04X} stands for a character that is lost"
    if found := QUESTION_MARKS.search(text):
        return f"{found[0]!r} stands where words may have been"
    for run in FOREIGN_RUN.findall(text):
        for codec, page in CODE_PAGES.items():
            data = bytes(page.get(letter, 0) for letter in run)
            meant = _utf8(data) if 0 not in data else None
            if meant and (codec != "cp1256" or ARABIC_LETTER.search(meant)):  # Persian letters are bytes of UTF-8, too
                return f"{run[:20]!r} is {meant[:20]!r} in UTF-8, read as {codec}"
    return None


def _utf8(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _code_page(codec: str) -> dict[str, int]:
    """letter -> byte from 0x80 on; a byte without a letter is the control of its number, as readers leave it."""
    page = {chr(byte): byte for byte in range(0x80, 0x100)}
    for byte in range(0x80, 0x100):
        letter = bytes([byte]).decode(codec, "replace")
        if letter != "\ufffd":
            page[letter] = byte
    return page


CODE_PAGES = {codec: _code_page(codec) for codec in ("cp1252", "cp1256", "latin-1", "mac_roman")}
