"""Which samples make which step: the index goes in, the same packs come out on every rank, in every worker, after every
restart.

An epoch is a pure function of (index, seed, epoch, budgets, and how data sets are mixed: `mixing`). Shards are permuted and
cut into windows of at most about `window_samples` rows; a window's rows are permuted and packed by online best fit; windows
follow each other. Nothing but one window is in memory at a time, so an index of 100 million rows stays a memory-mapped file. A
global step is `packs_per_step` packs, rank r of W takes packs r, r + W, ... of it. The surprising decision: the last step of an
epoch is filled up with empty packs, which cost a forward pass over nothing, so that every rank has the same number of
micro-steps in every step and no sample is dropped or seen twice. The price of windows: packs still open at a window's end are
closed (at most 8 of about 30,000).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from shards.delay_pattern import NUM_MARKER_COLUMNS
from shards.errors import ConfigError
from shards.writer import write_json
from train.data.mixing import EpochMix, Mixing, SetShare
from train.data.packing import PlanSettings, best_fit
from train.data.references import SpeakerReferences
from train.data.text_dropout import TextDropout

PLAN_VERSION = 1  # raise it when the same settings give other packs: a cached or resumed plan is then refused
CHUNK = 1 << 16  # rows read together, where all rows are read
MAX_NAMED_KEYS = 5  # of samples that are too long

Lengths = Callable[[np.ndarray], np.ndarray]  # index rows [n] -> tokens [n] int64
Keep = Callable[[np.ndarray], np.ndarray]  # index rows [n] -> bool [n]


class Window(NamedTuple):
    """The packs of one window: pack p holds rows[ends[p - 1] : ends[p]]."""

    rows: np.ndarray  # [m] int64 index rows in pack order
    ends: np.ndarray  # [p] int64

    def packs(self, first: int = 0) -> list[np.ndarray]:
        return np.split(self.rows, self.ends[:-1])[first:] if len(self.ends) else []


class Planner:
    """Epochs of a data set, planned window by window. Cheap to copy to loader processes: it holds no rows."""

    def __init__(
        self,
        index: np.ndarray,
        lengths: Lengths,
        settings: PlanSettings,
        keep: Keep | None = None,
        mixing: Mixing | None = None,
        dropout: TextDropout | None = None,
        references: SpeakerReferences | None = None,
    ) -> None:
        """index [n] of INDEX_DTYPE, memory-mapped or not. `keep` picks the rows that take part (held-out data). `mixing`:
        how often each comes in an epoch; None: once. `dropout`: where samples are shorter in some epochs; `lengths` are then
        the longest. `references`: drawn anew each epoch; None: those of the list.

        Raises ConfigError when no sample fits a pack.
        """
        self._index = index
        self._lengths = lengths
        self._keep = keep
        self._dropout = dropout if dropout and dropout.is_on else None
        self.references = references
        self.settings = settings
        self.num_samples = self.num_tokens = self.num_too_long = 0  # of one epoch; too long ones are skipped
        self.too_long_rows: list[int] = []  # the first of them
        self._shard_starts = np.zeros(1, np.int64)  # [shards + 1]
        self._length_counts = np.zeros(settings.batch_tokens + 1, np.int64)  # [batch_tokens + 1] samples of each length
        self._scan()
        self._mixing = mixing if mixing and not mixing.is_natural else None
        self._mix = EpochMix(self._mixing, settings.seed, self._taking_part()) if self._mixing else None
        self.counts: dict[int, list[int]] = {}  # epoch -> packs of each window, as far as they were counted
        self._last: tuple[tuple[int, int], Window] | None = None

    # --- numbers of an epoch ----------------------------------------------------------------------------------------

    def num_packs(self, epoch: int) -> int:
        return sum(self._epoch_counts(epoch))

    def num_steps(self, epoch: int) -> int:
        return -(-self.num_packs(epoch) // self.settings.packs_per_step)

    def total_steps(self, num_epochs: int) -> int:
        return sum(self.num_steps(epoch) for epoch in range(num_epochs))

    def epoch_samples(self, epoch: int) -> int:
        """Samples of an epoch, copies included."""
        return int(self._mix.counts(epoch).sum()) if self._mix else self.num_samples

    def epoch_tokens(self, epoch: int) -> int:
        """Their tokens."""
        if self._mix is None and self._dropout is None and self.references is None:
            return self.num_tokens
        total = 0
        for start in range(0, len(self._index), CHUNK):
            found = self._index[start : start + CHUNK]
            fits, lengths, _ = self._measure(found, epoch)
            if self.references:
                drawn = self.references.found(epoch, start + np.flatnonzero(fits))
                lengths[fits] = self._measure(drawn, epoch)[1]
            total += int((lengths * (self._mix.counts(epoch)[start : start + CHUNK] if self._mix else fits)).sum())
        return total

    def shares(self, epoch: int) -> list[SetShare]:
        """What each data set gives in an epoch; [] where every sample comes once."""
        return self._mix.describe(epoch) if self._mix else []

    def takes_any(self, start: int, end: int) -> bool:
        """Whether a row of these takes part and fits a pack."""
        firsts = range(start, end, CHUNK)
        return any(self._measure(self._index[first : min(end, first + CHUNK)])[0].any() for first in firsts)

    def require_full_step(self) -> None:
        """Raises ConfigError when the data set is too small for one step."""
        num_packs, wanted = self.num_packs(0), self.settings.packs_per_step
        if num_packs < wanted:
            raise ConfigError(
                f"train.packs_per_step = {wanted}, but an epoch has only {num_packs} packs of up to "
                f"{self.settings.batch_tokens} tokens ({self.epoch_samples(0)} samples, {self.epoch_tokens(0)} tokens); lower "
                "train.packs_per_step or train.batch_tokens, or give more data"
            )

    def fingerprint(self) -> str:
        """Equal where plans are equal, as far as numbers of the whole index and the settings can show."""
        facts = (PLAN_VERSION, self.settings, self.num_samples, self.num_tokens, self.num_too_long)
        digest = hashlib.sha256(repr(facts).encode())
        digest.update(self._length_counts.tobytes())
        digest.update(self._shard_starts.tobytes())
        if self._mixing:
            digest.update(repr(self._mixing).encode())
        if self._dropout:
            digest.update(repr(self._dropout).encode())
        if self.references:
            digest.update(b"references drawn")
        return digest.hexdigest()

    def epoch_hash(self, epoch: int) -> str:
        """Hash of an epoch's plan: the fingerprint and the packs of its first window as this machine makes them."""
        window = self.window(epoch, 0)
        digest = hashlib.sha256(f"{self.fingerprint()} {epoch}".encode())
        digest.update(window.rows.tobytes())
        digest.update(window.ends.tobytes())
        if self.references:
            digest.update(self.references.clips(epoch, window.rows).tobytes())
        return digest.hexdigest()

    def load_counts(self, path: Path) -> None:
        """Take over pack counts that an earlier process of the run wrote, if they are of this very plan."""
        if not path.is_file():
            return
        try:
            saved = msgspec.json.decode(path.read_bytes(), type=SavedCounts)
        except msgspec.DecodeError:  # a file of another version: counted again, at the price of planning
            return
        if saved.plan == self.fingerprint():
            self.counts = {**saved.epochs, **self.counts}

    def save_counts(self, path: Path) -> None:
        write_json(path, SavedCounts(plan=self.fingerprint(), epochs=self.counts))

    # --- steps ------------------------------------------------------------------------------------------------------

    def steps_from(
        self, step: int, on_window: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(epoch, its `packs_per_step` packs) of every global step from `step` on, epoch after epoch without end.

        A pack is an array [s] int64 of index rows; those that fill up an epoch's last step are empty. `on_window`
        is called with (epoch, window) before a window's packs come.
        """
        epoch = 0
        while step and step >= self.num_steps(epoch):
            step -= self.num_steps(epoch)
            epoch += 1
        size = self.settings.packs_per_step
        for number in itertools.count(epoch):
            packs = self._packs(number, step * size, on_window)
            while group := list(itertools.islice(packs, size)):
                yield number, group + [np.zeros(0, np.int64)] * (size - len(group))
            step = 0

    def rank_packs(
        self, step: int, rank: int, world_size: int, on_window: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, pack) of every micro-step of one rank from global step `step` on. Raises ConfigError."""
        if self.settings.packs_per_step % world_size:
            raise ConfigError(
                f"train.packs_per_step = {self.settings.packs_per_step} cannot be shared by {world_size} ranks; take a "
                f"multiple of {world_size}"
            )
        for epoch, packs in self.steps_from(step, on_window):
            for pack in packs[rank::world_size]:
                yield epoch, pack

    def _packs(
        self, epoch: int, first: int, on_window: Callable[[int, int], None] | None = None
    ) -> Iterator[np.ndarray]:
        for window in range(self.num_windows(epoch)):
            if first:
                count = self._epoch_counts(epoch)[window]
                if first >= count:
                    first -= count
                    continue
            if on_window:
                on_window(epoch, window)
            yield from self.window(epoch, window).packs(first)
            first = 0

    # --- windows ----------------------------------------------------------------------------------------------------

    def num_windows(self, epoch: int) -> int:
        return len(self._windows(epoch)) if not self._by_length(epoch) else self._most_windows

    def window_shards(self, epoch: int, window: int) -> np.ndarray:
        """Numbers [v] int64 of the shards that a window reads; all of them for an epoch in order of length."""
        return self._shard_numbers if self._by_length(epoch) else self._shard_numbers[self._windows(epoch)[window]]

    def following(self, epoch: int, window: int) -> tuple[int, int]:
        """(epoch, window) after this one."""
        return (epoch, window + 1) if window + 1 < self.num_windows(epoch) else (epoch + 1, 0)

    def position_of(self, row: int) -> int:
        """The number of an index row among those of its shard; not of its key, which counts rejected rows too."""
        return row - int(self._shard_starts[np.searchsorted(self._shard_starts, row, side="right") - 1])

    def window(self, epoch: int, window: int) -> Window:
        """Plan one window; the last one is kept."""
        if self._last is None or self._last[0] != (epoch, window):
            by_length = self._by_length(epoch)
            rows = self._rows_by_length(window) if by_length else self._rows_of(self._windows(epoch)[window])
            found = self._index[rows]
            fits, lengths, supervised = self._measure(found, epoch)
            rows, lengths, supervised = rows[fits], lengths[fits], supervised[fits]
            if self.references:
                lengths = self._measure(self.references.found(epoch, rows), epoch)[1]
            if self._mix:
                copies = self._mix.counts(epoch)[rows]
                rows, lengths, supervised = (np.repeat(values, copies) for values in (rows, lengths, supervised))
            order = self._generator(epoch, window + 1).permutation(len(rows))
            if by_length:
                order = order[np.argsort(lengths[order], kind="stable")]
            places, ends = best_fit(lengths[order], supervised[order], self.settings)
            self._last = (epoch, window), Window(rows[order[places]], ends)
        return self._last[1]

    def _epoch_counts(self, epoch: int) -> list[int]:
        if epoch not in self.counts:
            self.counts[epoch] = [len(self.window(epoch, window).ends) for window in range(self.num_windows(epoch))]
        return self.counts[epoch]

    def _windows(self, epoch: int) -> list[np.ndarray]:
        """The shards of each window, windows of nearly equal size."""
        sizes = np.diff(self._shard_starts)
        order = self._generator(epoch, 0).permutation(len(sizes))
        starts = np.cumsum(sizes[order]) - sizes[order]
        number = starts * self._most_windows // max(1, int(sizes.sum()))
        return np.split(order, np.flatnonzero(np.diff(number)) + 1)

    @property
    def _most_windows(self) -> int:
        return max(1, -(-int(self._shard_starts[-1]) // self.settings.window_samples))

    def _by_length(self, epoch: int) -> bool:
        return epoch == 0 and self.settings.order == "short_to_long"

    def _rows_of(self, shards: np.ndarray) -> np.ndarray:
        """Rows [m] int64 of these shards, ascending, so that the mapped index is read forwards."""
        shards = np.sort(shards)
        starts, ends = self._shard_starts[shards], self._shard_starts[shards + 1]
        return np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])

    def _rows_by_length(self, window: int) -> np.ndarray:
        """Rows [m] int64 of the window's share of all samples in order of (length, row): one pass over the index."""
        first, last = (self.num_samples * w // self._most_windows for w in (window, window + 1))
        before = np.cumsum(self._length_counts) - self._length_counts  # samples shorter than each length
        passed = np.zeros_like(before)  # samples of each length met so far
        found: list[np.ndarray] = []
        for start in range(0, len(self._index), CHUNK):
            fits, lengths, _ = self._measure(self._index[start : start + CHUNK])
            rows, lengths = np.flatnonzero(fits), lengths[fits]
            order = np.argsort(lengths, kind="stable")
            counts = np.bincount(lengths, minlength=len(before))
            within = np.empty(len(rows), np.int64)  # the row's number among those of its length in this chunk
            within[order] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
            place = before[lengths] + passed[lengths] + within
            passed += counts
            found.append(start + rows[(place >= first) & (place < last)])
        return np.concatenate(found)

    def _measure(self, found: np.ndarray, epoch: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index rows [n] -> which take part and fit a pack (bool), tokens, supervised columns (int64), each [n].

        Tokens are those of an epoch, or without one the most of all epochs, which decide whether a sample fits.
        """
        lengths = np.asarray(self._lengths(found), np.int64)
        supervised = found["target_frames"].astype(np.int64) + NUM_MARKER_COLUMNS
        fits = lengths <= self.settings.batch_tokens
        if self.settings.max_supervised_tokens:
            fits &= supervised <= self.settings.max_supervised_tokens
        if self._keep is not None:
            fits &= self._keep(found)
        if epoch is not None and self._dropout:
            lengths = self._dropout.lengths(found, epoch)
        return fits, lengths, supervised

    def _taking_part(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(index rows, which of them take part and fit a pack) of the whole index, in order."""
        for start in range(0, len(self._index), CHUNK):
            found = self._index[start : start + CHUNK]
            yield found, self._measure(found)[0]

    def _scan(self) -> None:
        """One pass over the index: shards, totals, and samples that fit no pack."""
        starts: list[np.ndarray] = []
        previous = -1
        shortest = np.iinfo(np.int64).max
        for start in range(0, len(self._index), CHUNK):
            found = self._index[start : start + CHUNK]
            shards = found["shard"].astype(np.int64)
            starts.append(start + np.flatnonzero(np.diff(shards, prepend=previous)))
            previous = int(shards[-1])
            fits, lengths, _ = self._measure(found)
            taking_part = self._keep(found) if self._keep is not None else np.ones(len(found), bool)
            too_long = np.flatnonzero(taking_part & ~fits)
            self.num_too_long += len(too_long)
            self.too_long_rows += (start + too_long[: MAX_NAMED_KEYS - len(self.too_long_rows)]).tolist()
            self.num_samples += int(fits.sum())
            self.num_tokens += int(lengths[fits].sum())
            self._length_counts += np.bincount(lengths[fits], minlength=len(self._length_counts))
            shortest = min(shortest, int(lengths[taking_part].min(initial=shortest)))
        self._shard_starts = np.concatenate([*starts, np.array([len(self._index)])]).astype(np.int64)
        self._shard_numbers = self._index[self._shard_starts[:-1]]["shard"].astype(np.int64)
        if not self.num_samples:
            detail = (
                f"the shortest of {self.num_too_long} has {shortest} tokens" if self.num_too_long else "there is none"
            )
            supervised = self.settings.max_supervised_tokens
            limit = f", train.max_supervised_tokens = {supervised}" if supervised else ""
            raise ConfigError(f"train.batch_tokens = {self.settings.batch_tokens}{limit}: no sample fits; {detail}")

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        """Random numbers of one window (or of the shard order, stream 0) that need no others drawn before them."""
        return np.random.Generator(np.random.Philox(key=[self.settings.seed, epoch], counter=[0, 0, 0, stream]))


class SavedCounts(msgspec.Struct, frozen=True):
    """RUN/plan.json: packs of each window of each epoch counted so far, so that a resumed run plans none of them again."""

    plan: str  # `Planner.fingerprint`
    epochs: dict[int, list[int]]
