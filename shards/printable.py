"""Text of strangers made fit to be shown: speakers, transcripts, file names, URLs.

In: any string. Out: the same string with what a terminal or a log would act on written out (`\\x1b`, `\\u202e`) and with
passwords and tokens as `***`. Letters of every script stay as they are, with the joiners and direction marks that Arabic
and Persian need; overrides and isolates of direction do not, because they can make a line say what it does not hold.
The price: a backslash is not doubled, so what is shown cannot be turned back. For that there is JSON (`printable_json`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

# Format characters (Cf) that are visible, or that change only how neighbouring letters are joined or ordered.
HARMLESS_FORMAT = frozenset(
    "\u061c\u200c\u200d\u200e\u200f\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u0890\u0891\u08e2"
)
ESCAPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

EXCERPT_CHARS = 60  # of a text, wherever a message quotes one
ERROR_CHARS = 200  # of the first line of a library's error
HIDDEN = "***"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,40}://[^\s\"'<>\\]+")
# The spellings of secrets outside of a URL's query: --set x.token=..., "password": "...", AccountKey=...;
SECRET_NAME = (
    r"(?:token|secret|passw(?:or)?d|api[_-]?key|access[_-]?key(?:[_-]?id)?|account[_-]?key|signature|credentials?)"
)
SECRET_WORDS = ("token", "secret", "passw", "key", "signature", "credential")  # one of them is in every SECRET_NAME
ASSIGNMENT = re.compile(rf"((?<![A-Za-z0-9]){SECRET_NAME}(?:=[\"']?|[\"']\s*:\s*[\"']))([^\s\"'&;,]+)", re.IGNORECASE)
BEARER = re.compile(r"(\b(?:bearer|basic)\s+)([A-Za-z0-9._~+/=-]{8,})", re.IGNORECASE)
KNOWN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|sk-[\w-]{16,}"
    r"|glpat-[\w-]{16,}|xox[abpr]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)
SECRET_VARIABLE = re.compile(rf"(?:^|_){SECRET_NAME}(?:_|$)", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters of an environment variable's value: shorter ones stand in words by chance


def excerpt(text: str) -> str:
    """The beginning of a text that may be of any length, for a message."""
    return text if len(text) <= EXCERPT_CHARS else f"{text[: EXCERPT_CHARS - 3]}..."


def first_line(error: BaseException) -> str:
    """What an error of a library says, without the pages that some append."""
    said = str(error).strip()
    return said.splitlines()[0][:ERROR_CHARS] if said else type(error).__name__


def printable(text: str) -> str:
    """One line that a terminal shows and does not obey: controls, line breaks and overrides of direction are escaped."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(escaped(letter) if is_harmful(letter) else letter for letter in text)


def is_harmful(letter: str) -> bool:
    return unicodedata.category(letter) in ESCAPED_CATEGORIES and letter not in HARMLESS_FORMAT


def escaped(letter: str) -> str:
    """As Python and JSON write it: \\n, \\x1b, \\u202e, \\U000e0041."""
    named = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(letter)
    number = ord(letter)
    return named or (
        f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"
    )


def printable_lines(text: str) -> str:
    """A message that may have several lines, as a list of faults has; those after the first are indented.

    A line break inside a name then cannot pass for the next log line. Tokens in URLs are hidden.
    """
    return "\n  ".join(printable(line.strip("\r")) for line in redact(text).expandtabs(4).split("\n"))


def printable_json(value: Any, indent: int | None = None) -> str:
    """JSON that reads as what was stored and holds no raw control or format character, valid wherever JSON is read."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return "".join(json.dumps(letter)[1:-1] if letter != "\n" and is_harmful(letter) else letter for letter in text)


def file_name(text: str) -> str:
    """A name for a file or folder of this key, id or speaker, inside whatever folder it is joined to.

    A key is data: `../../x` or `/etc/x` must not choose where something is written. Plain short names stay, so that a person
    finds them; every other one becomes a digest, the same one for the same text.
    """
    if PLAIN_NAME.fullmatch(text):
        return text
    return f"sample-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` without passwords and tokens: of URLs (user:password@, every value of a query), of assignments and headers,
    of well-known shapes, and whatever a variable of the environment named like a secret holds."""
    for value in secrets_of(os.environ if environment is None else environment):
        text = text.replace(value, HIDDEN)
    if "://" in text:
        text = URL.sub(lambda found: redact_url(found[0]), text)
    lowered = text.lower()  # nearly every text holds none of the words, and looking for them is cheap
    if any(word in lowered for word in SECRET_WORDS):
        text = ASSIGNMENT.sub(rf"\g<1>{HIDDEN}", text)
    if "bearer" in lowered or "basic" in lowered:
        text = BEARER.sub(rf"\g<1>{HIDDEN}", text)
    return KNOWN_SHAPES.sub(HIDDEN, text)


def redact_url(url: str) -> str:
    """Scheme, host and path stay; the user part and every value of the query and the fragment do not."""
    scheme, _, rest = url.partition("://")
    address, mark, query = re.match(r"([^?#]*)([?#]?)(.*)", rest, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    host, slash, path = address.partition("/")
    if "@" in host:
        host = f"{HIDDEN}@{host.rpartition('@')[2]}"
    query = re.sub(r"(^|[&;#])([^=&;#]*=)?([^&;#]+)", rf"\g<1>\g<2>{HIDDEN}", query)
    return f"{scheme}://{host}{slash}{path}{mark}{query}"


def redact_values(value: Any) -> Any:
    """`redact` for every string inside lists and dictionaries, for records that are kept."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: redact_values(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(part) for part in value]
    return value


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Values of variables like HF_TOKEN or AWS_SECRET_ACCESS_KEY, longest first; a variable may name a file of secrets."""
    values = {environment[name] for name in environment if _names_secret(name)}
    found = [value for value in values if len(value) >= SHORTEST_SECRET and not value.startswith(("/", "~", "./"))]
    return sorted(found, key=len, reverse=True)


@functools.lru_cache(maxsize=4096)
def _names_secret(variable: str) -> bool:
    return SECRET_VARIABLE.search(variable) is not None
