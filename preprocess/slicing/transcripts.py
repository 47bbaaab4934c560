"""What is said when, from a file beside a recording: SRT, VTT, TextGrid or WhisperX JSON.

In: a path. Out: `Cue`s in order. Subtitles say whole sentences, so a recording is never cut inside one of them; WhisperX and a
TextGrid's tier "words" say each word, which goes to the speech it lies in. Times may be off by a few tenths of a second, because
cuts follow the pauses, not them. The price: sentences that overlap, or a file that is understood only in part, are refused.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.clip_list import read_text
from preprocess.list_row import STRICT
from shards.errors import DataError
from shards.printable import excerpt

SUFFIXES = (".srt", ".vtt", ".TextGrid", ".textgrid", ".json")
TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[,.](\d{3})"
ARROW = re.compile(rf"{TIME}\s*-->\s*{TIME}")
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<\d[\d:.]*>|\{\\[^}]*\}")  # <i>, <v Name>, VTT's times of words, {\an8}
VTT_SPEAKER = re.compile(r"<v(?:\.[^\s>]*)?\s+([^>]+)>")
VTT_BLOCKS = re.compile(r"WEBVTT|NOTE|STYLE|REGION|X-TIMESTAMP")
OVERLAP_S = 0.05  # of two sentences; more is two texts at once
NEAR_S = 0.5  # a word this far from any speech is skipped
MOST_OFF_S = 0.25  # a sentence's times are rarely better; speech that it overlaps by less is its neighbour's
MIN_COVERED = 0.5
SILENCE = frozenset({"<eps>", "sil", "sp", "<sil>", "<p:>"})  # of forced aligners
WORD_TIERS = frozenset({"words", "word", "ort-mau"})
GRID_VALUE = re.compile(r'"((?:[^"]|"")*)"|(?<![^\s=])(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?=\s|$)')


@dataclass(frozen=True)
class Cue:
    start_s: float
    end_s: float
    text: str
    is_word: bool = False


def transcript_of(audio: Path) -> Path | None:
    """The one transcript beside a recording, x.wav's x.srt. Raises DataError for two."""
    found = sorted({path.resolve(): path for end in SUFFIXES if (path := audio.with_suffix(end)).is_file()}.values())
    if len(found) > 1:
        raise DataError(f"{audio}: {found[0].name} and {found[1].name} stand beside it; leave one")
    return found[0] if found else None


def read_transcript(path: Path) -> list[Cue]:
    """Cues in order, without empty ones. Raises DataError naming the place that is not understood."""
    reader = {".srt": _subtitles, ".vtt": _subtitles, ".textgrid": _text_grid, ".json": _whisperx}[path.suffix.lower()]
    cues = [cue for cue in reader(path) if cue.text]
    if not cues:
        raise DataError(f"{path}: no text in it")
    for cue in cues:
        if not (math.isfinite(cue.start_s) and math.isfinite(cue.end_s) and 0 <= cue.start_s <= cue.end_s):
            raise DataError(f"{path}: {excerpt(cue.text)!r} from {cue.start_s:g} s to {cue.end_s:g} s; expected a span")
    cues.sort(key=lambda cue: (cue.start_s, cue.end_s))
    for left, right in pairwise(cues):
        if not left.is_word and not right.is_word and left.end_s - right.start_s > OVERLAP_S:
            both = f"{excerpt(left.text)!r} and {excerpt(right.text)!r}"
            raise DataError(f"{path}: {both} overlap at {right.start_s:g} s; leave one, or correct the times")
    return cues


def speakers_named(path: Path) -> list[str]:
    """Whom a transcript names: VTT's <v Name>, WhisperX's "speaker". `slice` does not go by them. Of a readable transcript."""
    text = read_any_text(path)
    if path.suffix.lower() == ".vtt":
        return sorted({html.unescape(name).strip() for name in VTT_SPEAKER.findall(text)})
    if path.suffix.lower() != ".json":
        return []
    segments = STRICT.decode(text)["segments"]
    parts = [*segments, *(word for segment in segments for word in segment.get("words") or [])]
    return sorted({str(part["speaker"]) for part in parts if part.get("speaker")})


def _subtitles(path: Path) -> list[Cue]:
    """SRT and VTT: a line with -->, then text up to a blank line."""
    cues: list[Cue] = []
    for block in re.split(r"\n(?:[ \t]*\n)+", read_any_text(path)):
        lines = [line.strip() for line in block.split("\n") if line.strip()]
        arrows = [number for number, line in enumerate(lines) if "-->" in line]
        if not lines or (not arrows and VTT_BLOCKS.match(lines[0])):
            continue
        found = ARROW.match(lines[arrows[0]]) if len(arrows) == 1 and arrows[0] < 2 else None
        if not found:
            raise DataError(
                f"{path}: {excerpt(' / '.join(lines))!r}; expected 00:00:01,000 --> 00:00:02,000, then the text"
            )
        numbers = [int(number or 0) for number in found.groups()]
        start_s, end_s = ((h * 60 + m) * 60 + s + ms / 1000 for h, m, s, ms in (numbers[:4], numbers[4:]))
        text = html.unescape(TAG.sub("", " ".join(lines[arrows[0] + 1 :])))
        cues.append(Cue(start_s, end_s, " ".join(text.split())))
    return cues


def _whisperx(path: Path) -> list[Cue]:
    try:
        cues: list[Cue] = []
        for segment in STRICT.decode(read_any_text(path))["segments"]:
            words = [word for word in segment.get("words") or [] if word["word"].strip()]
            if any("start" in word for word in words):
                cues += _words(words)
            else:
                cues.append(Cue(float(segment["start"]), float(segment["end"]), " ".join(segment["text"].split())))
        return cues
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{path}: {detail}; expected WhisperX's {{'segments': [{{start, end, text, words}}]}}"
        ) from None


def _words(words: list[dict[str, Any]]) -> list[Cue]:
    """Words without times (digits have none) make one cue with their neighbours, which is never cut inside: where they are said
    is not known. At the beginning or end of a segment they stay with the one neighbour there.
    """
    cues: list[Cue] = []
    waiting: list[str] = []
    for word in words:
        text = word["word"].strip()
        if "start" not in word:
            waiting.append(text)
            continue
        start_s, end_s = float(word["start"]), float(word["end"])
        if waiting and cues:
            before = cues.pop()
            first_s, last_s = min(before.start_s, start_s), max(before.end_s, end_s)
            cues.append(Cue(first_s, last_s, " ".join([before.text, *waiting, text])))
        else:
            cues.append(Cue(start_s, end_s, " ".join([*waiting, text]), True))
        waiting = []
    if waiting:
        cues[-1] = dataclasses.replace(cues[-1], text=" ".join([cues[-1].text, *waiting]))
    return cues


def _text_grid(path: Path) -> list[Cue]:
    """Praat's long and short form alike: the values in order, whatever stands between them."""
    values = [number or word.replace('""', '"') for word, number in GRID_VALUE.findall(read_any_text(path))]
    tiers: dict[str, list[Cue]] = {}
    try:
        place = values.index("TextGrid") + 3  # behind its own times
        num_tiers = int(values[place])
        place += 1
        for _ in range(num_tiers):
            kind, name, count = values[place], values[place + 1], int(values[place + 4])
            place += 5
            if name in tiers:
                raise DataError(f"{path}: two tiers are called {excerpt(name)}; leave one, or rename the other")
            if kind == "IntervalTier":
                is_word = name.lower() in WORD_TIERS
                triples = [values[place + 3 * number : place + 3 * number + 3] for number in range(count)]
                tiers[name] = [Cue(float(a), float(b), " ".join(text.split()), is_word) for a, b, text in triples]
            place += count * (3 if kind == "IntervalTier" else 2)
    except (ValueError, IndexError):
        raise DataError(f"{path}: not a whole TextGrid; save it anew in Praat") from None
    chosen = [name for name in tiers if name.lower() in WORD_TIERS] or list(tiers)
    if len(chosen) != 1:
        raise DataError(f"{path}: tiers {', '.join(tiers) or 'none'}; leave the one with the text, or call it words")
    return [cue for cue in tiers[chosen[0]] if cue.text.lower() not in SILENCE]


def read_any_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark, as Praat and Windows write it; every line ends in \\n."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if data[:2] not in (b"\xff\xfe", b"\xfe\xff") or data[:4] == b"\xff\xfe\0\0":
        text = read_text(path)
    else:
        try:
            text = data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-16 as its mark says: {error.reason}") from None
    return re.sub("\r+\n", "\n", text).replace("\r", "\n")


# --- to the speech that was detected -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpokenText:
    """Of one stretch of speech. `is_covered`: the transcript has something for half of its length or more."""

    text: str
    goes_on: bool  # a sentence of it ends in the next stretch
    is_covered: bool


def texts_of_speech(cues: list[Cue], spans: list[tuple[float, float]]) -> list[SpokenText]:
    """Speech (start_s, end_s) in order -> what is said in each.

    A word belongs to the speech that it overlaps most or lies nearest to; a sentence to all speech that it overlaps, its text to
    the first of it. What lies in no speech is skipped.
    """
    texts: list[list[str]] = [[] for _ in spans]
    goes_on = [False] * len(spans)
    if not spans:
        return []
    covered = np.zeros(len(spans))
    starts, ends = np.array(spans, float).T
    for cue in cues:
        overlaps = np.minimum(cue.end_s, ends) - np.maximum(cue.start_s, starts)
        best = int(overlaps.argmax())
        if overlaps[best] < -NEAR_S:
            continue  # told by texts_without_speech
        covered += np.maximum(0.0, overlaps)
        heard = np.flatnonzero(overlaps > MOST_OFF_S)
        if cue.is_word or not len(heard):
            texts[best].append(cue.text)
            continue
        texts[int(heard[0])].append(cue.text)
        goes_on[int(heard[0]) : int(heard[-1])] = [True] * int(heard[-1] - heard[0])
    is_covered = covered >= MIN_COVERED * (ends - starts)
    return [SpokenText(" ".join(texts[n]), goes_on[n], bool(is_covered[n])) for n in range(len(spans))]


def texts_without_speech(cues: list[Cue], spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(start_s, end_s) of what `texts_of_speech` skips; words that follow each other are one part."""
    found: list[tuple[float, float]] = []
    for cue in cues:
        if any(min(cue.end_s, end_s) - max(cue.start_s, start_s) >= -NEAR_S for start_s, end_s in spans):
            continue
        if found and cue.is_word and cue.start_s - found[-1][1] < NEAR_S:
            found[-1] = found[-1][0], max(cue.end_s, found[-1][1])
        else:
            found.append((cue.start_s, cue.end_s))
    return found
