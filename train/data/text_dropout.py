"""Which samples of an epoch come without their reference's text, and how long they are then.

In: `sequence.reference_text_dropout` and the seed. Out: an answer for any (epoch, sample), a function of both and the seed, so
that ranks, loader processes and a run that goes on agree without asking. Every sample has its own draw in every epoch: the
share is that of many samples, not exactly that of each epoch. Where an index names a sample by its shard and its place in it, a
stream names it by its shard's address and its key, so the two loaders draw differently.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.index import hash64
from shards.sequence import SequenceBuilder
from train.data.scramble import scramble


@dataclass(frozen=True)
class TextDropout:
    """Off where the builder's share is 0: then every sample has its text and nothing is drawn."""

    builder: SequenceBuilder
    seed: int

    def __repr__(self) -> str:
        """For fingerprints of plans."""
        return f"TextDropout({self.builder.reference_text_dropout!r}, {self.seed})"

    @property
    def is_on(self) -> bool:
        return self.builder.reference_text_dropout > 0

    def with_text(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Index rows [n] -> bool [n]: those that keep their reference's text."""
        return self._keeps(rows["shard"].astype(np.uint64) << np.uint64(40) ^ rows["offset"], epoch)

    def with_text_of(self, shard: str, key: str, epoch: int) -> bool:
        """The same of a sample of a stream."""
        return bool(self._keeps(np.array([hash64(f"{shard}\n{key}")], np.uint64), epoch)[0])

    def lengths(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Index rows [n] -> tokens [n] int64 in this epoch."""
        return self.builder.lengths(rows, self.with_text(rows, epoch) if self.is_on else None)

    def longest(self, rows: np.ndarray) -> np.ndarray:
        """Index rows [n] -> tokens [n] int64 of the longer form: whether a sample fits a pack is the same in all epochs."""
        with_text = self.builder.lengths(rows)
        return np.maximum(with_text, self.builder.lengths(rows, np.zeros(len(rows), bool))) if self.is_on else with_text

    def _keeps(self, names: np.ndarray, epoch: int) -> np.ndarray:
        drawn = scramble(scramble(names, self.seed), epoch)  # 64 uniform bits
        return (drawn >> np.uint64(11)) * 2.0**-53 >= self.builder.reference_text_dropout
