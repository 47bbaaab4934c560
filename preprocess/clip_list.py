"""Clips of people, and the ChatML list that `preprocess` takes of them.

In: `Clip`s, of `preprocess convert`'s readers or cut by `preprocess slice`. Out: a row for each clip as the target. Its
reference is another clip of the same speaker, drawn with a seed, never itself nor the same recording under another suffix; a
clip without another one of its speaker is given back, to be counted.
"""

from __future__ import annotations

import json
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from preprocess.list_encoding import encoding_of, named_encoding
from preprocess.list_row import HALF_PAIR
from shards.cloning import cloning_messages
from shards.errors import DataError
from shards.writer import write_bytes

PYAV_SUFFIXES = (".m4a", ".mp4", ".webm", ".mka", ".aac", ".wma", ".amr")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", *PYAV_SUFFIXES)

SPOKEN_WITH = ("dialect", "dialect_tag", "accents", "accent", "variant", "locale", "gender", "age")  # kept where said


class Clip(msgspec.Struct, frozen=True):
    audio: str
    text: str
    speaker: str | None  # None: the source names none
    extra: dict[str, Any] = {}  # more of the target's row, to be kept
    offset_s: float = 0.0
    duration_s: float | None = None  # of the part of the file that is meant; None: to its end

    def recording(self) -> str:
        """The same for a.wav and a.flac of one folder, another one for each part of a file."""
        whole = self.audio.removesuffix(Path(self.audio).suffix)
        return whole if self.is_whole else f"{whole} {self.offset_s!r} {self.duration_s!r}"

    @property
    def is_whole(self) -> bool:
        return self.offset_s == 0 and self.duration_s is None


def spoken_with(fields: dict[str, Any]) -> dict[str, Any]:
    """What a source says of how a clip is spoken: its texts and numbers under the names of SPOKEN_WITH."""
    said = {name: fields.get(name) for name in SPOKEN_WITH}
    return {name: value for name, value in said.items() if isinstance(value, str | int) and value != ""}


def paired_rows(clips: Iterable[Clip], seed: int) -> tuple[list[dict[str, Any]], list[str], int]:
    """(ChatML rows, audio of clips without another recording of their speaker, number of speakers in the rows)."""
    by_speaker: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        by_speaker[clip.speaker or ""].append(clip)
    rows: list[dict[str, Any]] = []
    lonely: list[str] = []
    num_speakers = 0
    for number, clips_of in enumerate(by_speaker.values()):
        paired = list(pairs(clips_of, np.random.Generator(np.random.Philox(key=[seed, number]))))
        rows += [chat_row(reference, target) for reference, target in paired if reference]
        lonely += [target.audio for reference, target in paired if not reference]
        num_speakers += any(reference for reference, _ in paired)
    return rows, lonely, num_speakers


def pairs(clips: list[Clip], rng: np.random.Generator) -> Iterator[tuple[Clip | None, Clip]]:
    """(reference, target) for every clip of one speaker; no reference where all others are the same recording."""
    for number, target in enumerate(clips):
        other = int(rng.integers(len(clips) - 1)) if len(clips) > 1 else 0
        first = other + (other >= number)
        turned = (clips[(first + step) % len(clips)] for step in range(len(clips)))
        yield next((clip for clip in turned if clip.recording() != target.recording()), None), target


def chat_row(reference: Clip, target: Clip) -> dict[str, Any]:
    messages = cloning_messages(reference.text, reference.audio, target.text, target.audio)
    for clip, item in ((reference, messages[1]["content"][1]), (target, messages[2]["content"][1])):
        if not clip.is_whole:
            item["offset"] = clip.offset_s
            if clip.duration_s is not None:
                item["duration"] = clip.duration_s
    return {"messages": messages, "speaker": target.speaker, **target.extra}


def write_list(out: Path, rows: list[dict[str, Any]]) -> None:
    """JSON Lines for .jsonl, else a JSON array. Raises DataError for a file name that neither can hold."""
    for row in rows:
        for item in (row["messages"][1]["content"][1], row["messages"][2]["content"][1]):
            if not is_unicode(item["audio_url"]):
                raise DataError(
                    f"{item['audio_url']}: the name is not valid Unicode, so no list can hold it; rename it"
                )
    if out.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        place = text[max(0, error.start - 40) : error.start]
        raise DataError(
            f"{out}: half of a surrogate pair (\\ud800 to \\udfff) behind {place!r}; correct the source"
        ) from None
    write_bytes(out, data)


def is_unicode(name: str) -> bool:
    """False for a file name of other bytes than UTF-8, as old archives have them."""
    return name.isascii() or not HALF_PAIR.search(name)


def read_text(path: Path) -> str:
    """A UTF-8 file's text, lines ending in \\n. Raises DataError that names another encoding and its line."""
    try:
        if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):
            raise DataError(
                f"{path}: not a regular file; write it to a file first"
            )  # a pipe without a writer waits for ever
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    encoding = named_encoding(data[:4])
    if encoding:
        raise DataError(f"{path}: is {encoding}, expected UTF-8; convert it: iconv -f {encoding} -t UTF-8")
    try:
        return re.sub("\r+\n", "\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line}: not UTF-8: {encoding_of(data)}") from None
