"""What an audio item may point at: the path of a file on this machine, and nothing else.

In: the raw value of a row, before it has the ChatML form. Out: words for what it holds instead. Addresses (http, s3, file and
any other scheme), `data:` URIs, audio inside the list and `pipe:` are named in every spelling: "no such file" hides the
cause. The price: a relative path that begins like an address ("http:/x.wav") cannot be given; "./http:/x.wav" can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

SUPPORTED = "audio_url must be the path of a file on this machine"
MAX_PATH_CHARS = 4096  # of a Linux path
EDGES = " \t\r\n\f\v\0\"'<>`\ufeff\u200b\u200e\u200f"  # what copying leaves around an address
ADDRESS = re.compile(
    r"([a-z][a-z0-9+.-]+)\s*:\s*[/\\]", re.IGNORECASE
)  # two letters at least: C:\x.wav is another fault
SCHEME = re.compile(
    r"(data|file|https?|s3a?|gs|gcs|hdfs|ftps?|sftp|blob|hf|azure|abfss?|wasbs?|pipe|fd|concat)\s*:", re.I
)
INLINE_KEYS = frozenset({"rawaudio", "audiobytes", "audiodata", "inputaudio", "audiobase64", "base64"})
# Other spellings of a part of the file: read without them, the whole file would stand beside the part's text.
PART_KEYS = frozenset(
    {"offset", "duration", "start", "end", "starttime", "endtime", "startsec", "endsec", "starts", "ends"}
)
USUAL_KEYS = frozenset({"type", "text", "audio_url", "offset", "duration"})  # of an item that needs no closer look
HINTS = {
    "data": "the audio itself stands in the list: write it to a file",
    "file": "write the plain path, without file://",
    "pipe": "a command's output cannot be read twice: write it to a file",
}


def not_a_file(row: Any) -> str | None:
    """Why an audio item of a row (a decoded JSON value) is no path of a file; None for what may be one."""
    return next(filter(None, map(_fault_of_item, _items(row))), None)


def part_in_other_words(row: Any) -> str | None:
    """Why a part of a file that an audio item of a row names would not be taken; None where it names none, or as it must."""
    for item in _items(row):
        for key, value in item.items() if "audio_url" in item and not item.keys() <= USUAL_KEYS else ():
            if _plain(key) in PART_KEYS and key not in USUAL_KEYS and type(value) in (int, float):
                return f"{key[:20]} of an audio item; a part of a file is named by offset and duration, in seconds"
    return None


def _items(row: Any) -> Iterator[dict[str, Any]]:
    messages = row.get("messages") if isinstance(row, dict) else None
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for item in content if isinstance(content, list) else ():
            if isinstance(item, dict):
                yield item


def _plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "")


def _fault_of_item(item: dict[str, Any]) -> str | None:
    for key, value in item.items() if not item.keys() <= USUAL_KEYS else ():
        if value and _plain(key) in INLINE_KEYS:
            return f"{key} holds the audio itself; {SUPPORTED}: write it to a file"
    url = item.get("audio_url")
    return fault_of_url(url) if isinstance(url, str) else None


def fault_of_url(url: str) -> str | None:
    """Why `url` is no path of a file, without the whole of it."""
    head = url[:200].strip(EDGES)
    if "%" in head:
        head = unquote(head)
    found = SCHEME.match(head) or ADDRESS.match(head)
    if found:
        scheme = found[1].lower()
        hint = HINTS.get(scheme, "fetch the files first")
        return f"{scheme}: in audio_url; {SUPPORTED}: {hint}"
    if len(url) > MAX_PATH_CHARS:
        return f"audio_url has {len(url)} characters, which no path has; {SUPPORTED}: is it the audio itself?"
    return None
