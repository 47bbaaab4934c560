"""Who speaks when, from an RTTM file beside a recording (pyannote.audio, NeMo and Kaldi write them), and whose speech is whose.

In: a path. Out: `Turn`s, and for each stretch its one speaker or the reason why it has none. A diarizer's times are off by a few
tenths of a second, so a stretch has two speakers only where the second one holds it for more than that, or has a whole turn
inside. The price: such speech is in no piece, because a model that hears two voices in a clip learns to mix them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from preprocess.slicing.transcripts import MOST_OFF_S, read_any_text
from shards.errors import DataError
from shards.printable import excerpt

# The other types of the format (NIST, RT-09 evaluation plan): they say nothing about who speaks.
OTHER_TYPES = frozenset(
    (
        "SEGMENT",
        "NOSCORE",
        "NO_RT_METADATA",
        "LEXEME",
        "NON-LEX",
        "NON-SPEECH",
        "FILLER",
        "EDIT",
        "IP",
        "CB",
        "A/P",
        "SU",
    )
) | {"SPKR-INFO"}
EXPECTED = "SPEAKER FILE CHANNEL START DURATION <NA> <NA> NAME <NA> <NA>, times in seconds"


@dataclass(frozen=True)
class Turn:
    start_s: float
    end_s: float
    speaker: str


def turns_file_of(audio: Path) -> Path | None:
    path = audio.with_suffix(".rttm")
    return path if path.is_file() else None


def read_turns(path: Path) -> list[Turn]:
    """The turns of the file's one recording, in order. Raises DataError naming the line that is not understood.

    An RTTM of several recordings gives those of the one that is named as the file.
    """
    found: dict[str, list[Turn]] = defaultdict(list)
    for number, line in enumerate(read_any_text(path).split("\n"), start=1):
        fields = line.split()
        if not fields or fields[0].startswith(";;") or fields[0] in OTHER_TYPES:
            continue
        where = f"{path}: line {number}: {excerpt(line)!r}"
        if fields[0] != "SPEAKER" or not 8 <= len(fields) <= 10 or fields[7] == "<NA>":
            raise DataError(f"{where}; expected {EXPECTED}")
        try:
            start_s, duration_s = float(fields[3]), float(fields[4])
        except ValueError:
            raise DataError(f"{where}; expected {EXPECTED}") from None
        if not (math.isfinite(start_s) and math.isfinite(duration_s) and start_s >= 0 and duration_s >= 0):
            raise DataError(f"{where}; expected a start and a duration that are not negative")
        found[fields[1]].append(Turn(start_s, start_s + duration_s, fields[7]))
    if not found:
        raise DataError(f"{path}: no turn in it; expected {EXPECTED}")
    if len(found) > 1 and path.stem not in found:
        raise DataError(f"{path}: turns of {', '.join(sorted(found)[:3])}; none of them is {path.stem}")
    turns = found[path.stem] if len(found) > 1 else next(iter(found.values()))
    return sorted(turns, key=lambda turn: (turn.start_s, turn.end_s, turn.speaker))


def speakers_of_speech(turns: list[Turn], spans: list[tuple[float, float]]) -> list[tuple[str, str]]:
    """Speech (start_s, end_s) in order -> (its speaker, "") or ("", "two_speakers" or "no_speaker") for each."""
    said: list[tuple[str, str]] = []
    first = 0
    for start_s, end_s in spans:
        while first < len(turns) and turns[first].end_s <= start_s and turns[first].start_s <= start_s:
            first += 1
        heard: dict[str, float] = defaultdict(float)
        has_turn: set[str] = set()
        for turn in turns[first:]:
            if turn.start_s >= end_s:
                break
            overlap_s = min(turn.end_s, end_s) - max(turn.start_s, start_s)
            if overlap_s > 0:
                heard[turn.speaker] += overlap_s
                if overlap_s > min(MOST_OFF_S, (turn.end_s - turn.start_s) / 2):
                    has_turn.add(turn.speaker)
        if len(has_turn) > 1:
            said.append(("", "two_speakers"))
        else:
            best = max(heard, key=lambda name: (name in has_turn, heard[name]), default="")
            said.append((best, "") if best else ("", "no_speaker"))
    return said
