"""What people call a voice. In: names of requests. Out: names that can be kept, and the form in which two names are one.

A name chooses no file here. The surprising rule: letters that nobody sees, other widths and Arabic's presentation forms make no
other name, because a voice that cannot be distinguished from another by its name is one that somebody speaks by mistake.
"""

from __future__ import annotations

import re
import unicodedata

from shards.printable import is_harmful
from tools.serve.api_errors import ApiError

FOLDER = re.compile(r"voice_[0-9a-f]{16}")
MAX_NAME_CHARS = 100
BLANK_LETTERS = frozenset(
    "\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u17b5"
)  # letters and marks by class, seen by nobody
# Names that OpenAI's clients send when they know no other.
OPENAI_VOICES = frozenset(
    "alloy ash ballad cedar coral echo fable marin nova onyx sage shimmer verse".split()  # noqa: SIM905
)


def checked_name(name: str) -> str:
    """What people call a voice. It names no file here, but clients make file names and lines of it. Raises ApiError."""
    name = unicodedata.normalize("NFC", name).strip()
    wrong = None
    if not 0 < len(name) <= MAX_NAME_CHARS:
        wrong = f"expected 1 to {MAX_NAME_CHARS} characters, got {len(name)}"
    elif any(is_harmful(letter) or letter in BLANK_LETTERS or letter in '/\\:*?"<>|%' for letter in name):
        wrong = "expected letters, digits, blanks and - _ . ' ( ) only"
    elif name.startswith(".") or ".." in name:
        wrong = "a name neither begins with a full stop nor holds two in a row"
    elif not any(letter.isalnum() for letter in name):
        wrong = "expected at least one letter or digit"
    elif FOLDER.fullmatch(folded(name)):
        wrong = "that is how ids look; choose another"
    if wrong:
        raise ApiError(400, f"name: {wrong}", param="name")
    return name


def folded(name: str) -> str:
    """Equal for names that look alike: NFKC, without format characters, single blanks, lower case."""
    plain = unicodedata.normalize("NFKC", name)
    seen = "".join(letter for letter in plain if unicodedata.category(letter) != "Cf" and letter not in BLANK_LETTERS)
    return unicodedata.normalize("NFKC", " ".join(seen.split()).casefold())
