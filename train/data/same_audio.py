"""Which held-out samples have audio that is trained on, whoever is said to speak it and whatever it is paired with.

In: the rows trained on and the rows held out, of one data set or of two. Out: held-out rows, and how both sides name the clip.
Held-out clips are read and known by their codes; of the training rows those are read that have a clip of equal lengths (frames
and text tokens). The price: chance makes many of these in a large set, so no more than MAX_READ are compared, and how many were
not is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shards.reader import SampleReader
from train.data.plan import CHUNK, Keep

log = logging.getLogger("train")
MAX_READ = 4096  # samples of each side: a second or two on a local disk

Clip = tuple[str, str, bool]  # how it is named, what it is, whether it is a target
ClipsOf = Callable[[SampleReader, np.ndarray], list[Clip]]


@dataclass(frozen=True)
class Rows:
    """One side: the rows [n] of an index that `keep` keeps (None: all)."""

    name: str
    reader: SampleReader
    index: np.ndarray
    keep: Keep | None = None

    def chunks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(place of the first row, rows, which are kept)."""
        for start in range(0, len(self.index), CHUNK):
            rows = self.index[start : start + CHUNK]
            yield start, rows, self.keep(rows) if self.keep else np.ones(len(rows), bool)


class Common(NamedTuple):
    """One clip on both sides, as their samples name it."""

    trained: str
    held_out: str
    is_learned: bool  # a target on one of both sides


def same_audio(trained: Rows, held_out: Rows, clips_of: ClipsOf) -> dict[str, tuple[Common, set[int]]]:
    """What a clip is -> (its names, the held-out rows that have it). `clips_of` reads a sample's clips."""
    places = np.concatenate([start + np.flatnonzero(kept) for start, _, kept in held_out.chunks()] or [[]])
    places = _spread(places.astype(np.int64), "held-out samples", trained.name)
    known: dict[str, list[tuple[str, bool, int]]] = {}
    for place in places.tolist():
        for name, audio, is_target in clips_of(held_out.reader, held_out.index[place]):
            known.setdefault(audio, []).append((name, is_target, place))
    keys = np.unique(clip_keys(held_out.index[places]))
    found: dict[str, tuple[Common, set[int]]] = {}
    for place in _alike(trained, keys).tolist():
        for name, audio, is_target in clips_of(trained.reader, trained.index[place]):
            for other, other_is_target, row in known.get(audio, []):
                pair = Common(name, other, is_target or other_is_target)
                before, rows = found.get(audio, (pair, set()))
                found[audio] = max(before, pair, key=lambda common: common.is_learned), rows | {row}
    return found


def _alike(trained: Rows, keys: np.ndarray) -> np.ndarray:
    """Training rows [m] int64 that have a clip of the lengths of a held-out one."""
    parts = [
        start + np.flatnonzero(kept & np.isin(clip_keys(rows), keys).any(axis=1))
        for start, rows, kept in trained.chunks()
    ]
    places = np.concatenate(parts or [[]]).astype(np.int64)
    return _spread(places, "training samples with a clip as long as a held-out one", trained.name)


def _spread(places: np.ndarray, what: str, name: str) -> np.ndarray:
    if len(places) <= MAX_READ:
        return places
    log.info("%s: %d of %d %s are compared by their audio", name, MAX_READ, len(places), what)
    return places[np.linspace(0, len(places) - 1, MAX_READ).astype(np.int64)]


def clip_keys(rows: np.ndarray) -> np.ndarray:
    """Index rows [n] -> uint64 [n, 2]: frames and text tokens of reference and target."""
    columns = (("reference_frames", "num_reference_text_tokens"), ("target_frames", "num_target_text_tokens"))
    bits = np.uint64(16)
    keys = [rows[frames].astype(np.uint64) << bits | rows[tokens].astype(np.uint64) for frames, tokens in columns]
    return np.stack(keys, axis=1)


def without_places(keep: Keep, places: list[int]) -> Keep:
    """`keep` without the rows at these places (`place_of`)."""
    left_out = np.array(places, np.uint64)
    return lambda rows: keep(rows) & ~np.isin(place_of(rows), left_out)


def place_of(rows: np.ndarray) -> np.ndarray:
    """uint64 [n] that names each row of a data set: its shard and where it begins there."""
    return rows["shard"].astype(np.uint64) << np.uint64(44) | rows["offset"]
