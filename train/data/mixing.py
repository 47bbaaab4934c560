"""How often each sample comes in an epoch, so that data sets and speakers have the shares that were asked for.

In: which sample is of which data set and speaker, its frames, and weights or temperatures. Out: counts for any epoch, a pure
function of (index, seed, epoch). Shares are of target audio (frames, 25 a second), and an epoch has as much of it as all data
sets together: who is asked for more than it has is repeated, who is asked for less is subsampled. The samples of a group stand
on a circle of its frames in a seeded order, and each epoch takes the next arc: within an epoch a sample comes as often as its
neighbours or once more, and over epochs all come equally often. The price: 25 bytes a sample in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shards.errors import ConfigError
from shards.sequence import FRAMES_PER_SECOND
from train.data.scramble import scramble


@dataclass(frozen=True)
class Mixing:
    """What an epoch is asked to be made of."""

    names: tuple[str, ...]  # of the data sets, for messages
    first_rows: tuple[int, ...]  # where each data set begins in the joined index, and its end
    weights: tuple[float, ...] = ()  # (): hours ** data_temperature
    data_temperature: float = 1.0
    speaker_temperature: float = 1.0

    @property
    def is_natural(self) -> bool:
        """Whether every sample comes once an epoch."""
        are_sets_natural = len(self.names) == 1 or (not self.weights and self.data_temperature == 1)
        return are_sets_natural and self.speaker_temperature == 1


class SetShare(NamedTuple):
    """One data set in one epoch."""

    name: str
    asked: float  # share of the epoch's target audio
    planned: float
    seconds: float
    num_samples: int  # copies included
    num_repeated: int  # copies beyond the first of each
    num_left_out: int  # samples that do not come
    most_copies: int  # of one sample

    def __str__(self) -> str:
        repeats = (
            f"{self.num_repeated} of them again, one at most {self.most_copies} times" if self.num_repeated else ""
        )
        left_out = f"{self.num_left_out} wait for another epoch" if self.num_left_out else ""
        how = "; ".join(part for part in (repeats, left_out) if part) or "each once"
        return (
            f"{self.name}: {100 * self.planned:.1f} % of the audio (asked {100 * self.asked:.1f}), "
            f"{self.seconds / 3600:.2f} h, {self.num_samples} samples ({how})"
        )


class EpochMix:
    """Counts of samples for any epoch. Holds arrays of all samples, shared with loader processes by fork."""

    def __init__(self, mixing: Mixing, seed: int, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """`chunks`: index rows [c] and which of them take part [c] bool, in order. Raises ConfigError."""
        self._mixing, self._seed = mixing, seed
        speakers: list[np.ndarray] = []
        frames: list[np.ndarray] = []
        taking_part: list[np.ndarray] = []
        for rows, fits in chunks:
            frames.append(np.maximum(rows["target_frames"], 1))
            taking_part.append(fits)
            if mixing.speaker_temperature != 1:
                speakers.append(rows["speaker"])
        self._frames = np.concatenate(frames)  # [n] uint16
        self._taking_part = np.concatenate(taking_part)  # [n] bool
        self._groups = self._group(np.concatenate(speakers) if speakers else None)
        self._sizes = self._sums(self._groups, self._frames, len(self._set_of_group))  # [g] frames
        self.shares, wanted = self._wanted()
        self._copies, self._arcs = np.divmod(
            wanted, np.maximum(self._sizes, 1)
        )  # [g] whole rounds, and the frames left
        self._places = self._places_on_circles()
        self._last: tuple[int, np.ndarray] | None = None

    def counts(self, epoch: int) -> np.ndarray:
        """How often each row [n] of the index comes in this epoch, int64. Kept until another epoch is asked for."""
        if self._last is None or self._last[0] != epoch:
            sizes = np.maximum(self._sizes, 1)
            phases = (
                scramble(np.arange(len(sizes), dtype=np.uint64), self._seed + 1) % sizes.astype(np.uint64)
            ).astype(np.int64)
            starts = (phases + epoch * self._arcs) % sizes
            groups = self._groups
            is_extra = (self._places - starts[groups]) % sizes[groups] < self._arcs[groups]
            is_extra &= self._taking_part
            for number in range(len(self._mixing.names)):
                self._level(number, epoch, is_extra)
            self._last = epoch, np.where(self._taking_part, self._copies[groups], 0) + is_extra
        return self._last[1]

    def describe(self, epoch: int) -> list[SetShare]:
        """What each data set gives in an epoch."""
        counts = self.counts(epoch)
        total = int((counts * self._frames).sum())
        found: list[SetShare] = []
        for number, rows in enumerate(self._rows_of_sets()):
            own, here = counts[rows], self._taking_part[rows]
            seconds = int((own * self._frames[rows]).sum()) / FRAMES_PER_SECOND
            found.append(
                SetShare(
                    self._mixing.names[number],
                    float(self.shares[number]),
                    seconds * FRAMES_PER_SECOND / max(1, total),
                    seconds,
                    int(own.sum()),
                    int(np.maximum(own - 1, 0).sum()),
                    int((here & (own == 0)).sum()),
                    int(own.max(initial=0)),
                )
            )
        return found

    def _rows_of_sets(self) -> list[slice]:
        first_rows = self._mixing.first_rows
        return [slice(start, end) for start, end in itertools.pairwise(first_rows)]

    def _group(self, speakers: np.ndarray | None) -> np.ndarray:
        """Group [n] int32 of each row: its data set, or its speaker within the data set."""
        groups = np.zeros(len(self._frames), np.int32)
        sets: list[np.ndarray] = []
        num_groups = 0
        for number, rows in enumerate(self._rows_of_sets()):
            inverse = np.unique(speakers[rows], return_inverse=True)[1] if speakers is not None else 0
            groups[rows] = num_groups + inverse
            size = int(np.max(inverse, initial=-1)) + 1
            sets.append(np.full(size, number))
            num_groups += size
        self._set_of_group = np.concatenate(sets)  # [g]
        return groups

    def _sums(self, places: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
        """Sums [size] int64 of the values of rows that take part. float64 holds frames of 200 million hours exactly."""
        return np.bincount(places, np.where(self._taking_part, values, 0), minlength=size).astype(np.int64)

    def _wanted(self) -> tuple[np.ndarray, np.ndarray]:
        """(share of each data set, frames [g] int64 an epoch is asked to have of each group)."""
        mixing = self._mixing
        sizes = np.bincount(self._set_of_group, self._sizes, minlength=len(mixing.names))
        for name, size in zip(mixing.names, sizes, strict=True):
            if not size:
                raise ConfigError(
                    f"data set {name}: none of its samples takes part (too long for train.batch_tokens, or held out), so "
                    "it cannot have a share; leave it out, or raise train.batch_tokens"
                )
        weights = np.array(mixing.weights) if mixing.weights else sizes**mixing.data_temperature
        shares = weights / weights.sum()
        powers = np.where(self._sizes > 0, np.maximum(self._sizes, 1) ** mixing.speaker_temperature, 0)
        of_set = np.bincount(self._set_of_group, powers, minlength=len(mixing.names))
        self._wanted_of_sets = np.rint(shares * sizes.sum()).astype(np.int64)
        wanted = np.rint(shares[self._set_of_group] * sizes.sum() * powers / of_set[self._set_of_group])
        return shares, wanted.astype(np.int64)

    def _places_on_circles(self) -> np.ndarray:
        """Where each row [n] int64 begins among the frames of its group, in an order given by the seed."""
        keys = scramble(np.arange(len(self._frames), dtype=np.uint64), self._seed)
        order = np.lexsort((keys, self._groups))
        frames = np.where(self._taking_part, self._frames, 0)[order].astype(np.int64)
        before = np.cumsum(frames) - frames
        starts = np.cumsum(self._sizes) - self._sizes
        places = np.empty(len(order), np.int64)
        places[order] = before - starts[self._groups[order]]
        return places

    def _level(self, number: int, epoch: int, is_extra: np.ndarray) -> None:
        """Arcs end within samples: with many speakers that adds up. Give or take some at random until the data set fits."""
        rows = self._rows_of_sets()[number]
        groups, frames = self._groups[rows], self._frames[rows].astype(np.int64)
        copies = np.where(self._taking_part[rows], self._copies[groups], 0) + is_extra[rows]
        excess = int((copies * frames).sum()) - int(self._wanted_of_sets[number])
        movable = self._taking_part[rows] & (self._arcs[groups] > 0) & (is_extra[rows] == (excess > 0))
        candidates = np.flatnonzero(movable)
        if not excess or not len(candidates):
            return
        keys = scramble(candidates.astype(np.uint64) + np.uint64(rows.start), self._seed + 7919 * (epoch + 1))
        candidates = candidates[np.argsort(keys, kind="stable")]
        moved = np.concatenate([[0], np.cumsum(frames[candidates])])
        few = int(np.argmin(np.abs(moved - abs(excess))))
        is_extra[rows.start + candidates[:few]] = excess < 0
