"""Samples of a data set by key, by id, or by what they are: speaker, seconds, characters per second, text, warning.

In: a data set. Out: its sound samples; those that are not usable are named and counted on stderr.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from shards.errors import ShardError
from shards.index import hash64
from shards.printable import printable
from shards.sample import Sample
from shards.sequence import FRAMES_PER_SECOND
from shards.terminal import print_line
from shards.writer import sample_key
from tools.inspect_shards.opened import OpenedData

SORT_KEYS: dict[str, Callable[[Sample], float | str]] = {
    "seconds": lambda sample: sample.facts.target.duration_s,
    "chars-per-second": lambda sample: chars_per_s(sample),
    "speaker": lambda sample: sample.facts.speaker,
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which samples; None means any. All that are given must hold."""

    speaker: str | None = None
    min_seconds: float | None = None  # of the target
    max_seconds: float | None = None
    min_chars_per_s: float | None = None  # of the target's text
    max_chars_per_s: float | None = None
    text: str | None = None  # a part of the reference's or the target's text
    warning: str | None = None

    def rows(self, index: np.ndarray) -> np.ndarray:
        """The index rows [m] that can hold such samples, without reading one: by speaker and, to the frame, by seconds."""
        keep = np.ones(len(index), bool)
        if self.speaker is not None:
            keep &= index["speaker"] == hash64(self.speaker)
        seconds = index["target_frames"] / FRAMES_PER_SECOND  # rounded up to whole frames
        if self.min_seconds is not None:
            keep &= seconds >= self.min_seconds
        if self.max_seconds is not None:
            keep &= seconds < self.max_seconds + 1 / FRAMES_PER_SECOND
        return index[keep]

    def holds(self, sample: Sample) -> bool:
        facts, rate = sample.facts, chars_per_s(sample)
        texts = (facts.texts[facts.reference_text], facts.texts[facts.target_text])
        return (
            (self.speaker is None or facts.speaker == self.speaker)
            and (self.min_seconds is None or facts.target.duration_s >= self.min_seconds)
            and (self.max_seconds is None or facts.target.duration_s <= self.max_seconds)
            and (self.min_chars_per_s is None or rate >= self.min_chars_per_s)
            and (self.max_chars_per_s is None or rate <= self.max_chars_per_s)
            and (self.text is None or any(self.text in text for text in texts))
            and (self.warning is None or self.warning in facts.warnings)
        )


def chars_per_s(sample: Sample) -> float:
    """Characters of the target's text per second of its audio."""
    facts = sample.facts
    return len(facts.texts[facts.target_text]) / max(facts.target.duration_s, 1e-9)


def wanted_samples(
    data: OpenedData, wanted: Wanted, sort: str | None = None, descending: bool = False
) -> Iterator[Sample]:
    """In the order of the shards, or sorted, equals by key. The price of sorting: all that match are held in memory."""
    found = (sample for sample in sound_samples(data, wanted.rows(data.index)) if wanted.holds(sample))
    if sort is None:
        return found
    return iter(sorted(sorted(found, key=lambda sample: sample.key), key=SORT_KEYS[sort], reverse=descending))


def sound_samples(data: OpenedData, index: np.ndarray) -> Iterator[Sample]:
    """Every usable sample; the others are counted on stderr, and each reason is told once: of a lost shard all have the same."""
    reader = data.reader()
    reasons: Counter[str] = Counter()
    for row in index:
        try:
            yield reader.read(row)
        except ShardError as error:
            reasons[str(error)] += 1
            if reasons[str(error)] == 1:
                print_line(f"skipped: {printable(str(error))}")
    if reasons:
        print_line(
            f"skipped: {reasons.total()} of {len(index)} samples are not usable; `inspect-shards verify` names the damaged ones"
        )


def find_sample(data: OpenedData, key: str) -> Sample:
    """By key without a search, by the user's id with one. Raises ShardError."""
    reader, index = data.reader(), data.index
    wanted, key = key, data.keys.get(key, key)
    if key.isdigit() and len(key) == 12:
        shard = int(key[:6])
        for position, row in enumerate(index[index["shard"] == shard]):
            if reader.key_of(row, position) == key:
                return reader.read(row)
    for sample in sound_samples(data, index):
        if sample.facts.id == key:
            return sample
    first = sample_key(0, 0)
    raise ShardError(
        f"{data.name}: no sample {wanted!r}; a key has twelve digits like {first}, `inspect-shards list` shows all"
    )
