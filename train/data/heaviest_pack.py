"""The heaviest pack that a budget can meet: what `train.memory` measures steps with.

In: the data and a pack budget. Out: one real pack. Packs of one budget differ in memory by their learned columns, whose
logits are made, and where attention pads documents to the longest, by their number. So packs are planned with the run's own
settings over the first samples of the set, weighed roughly, and the heaviest is read. The price: a later pack may be a
little heavier still; that is what the margin `train.memory_share` is for.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from shards.delay_pattern import NUM_MARKER_COLUMNS
from shards.errors import ShardError
from shards.label_shift import IGNORE
from shards.reader import SampleReader
from shards.sequence import Sequence, SequenceBuilder
from train.data.loader import read_pack
from train.data.packing import PlanSettings
from train.data.plan import CHUNK, Planner
from train.model.attention import AttentionKind
from train.model.batch import PackedBatch, pack
from train.model.config import ModelConfig

FIRST_SAMPLES = 1 << 18  # samples are in one seeded shuffle since stage one: the first are like the rest
FIRST_REMOTE_SAMPLES = 1 << 11  # behind a URL: a pack of samples from 256 shards would fetch as many
ENOUGH_PACKS = 256  # small sets are planned for some epochs until so many packs are seen
MOST_EPOCHS = 4
STREAMED_SAMPLES = 512  # read from a stream for the purpose


class PackCosts(NamedTuple):
    """Bytes, roughly: good enough to know which of many packs is the heaviest."""

    token: float
    place: float  # of the padded documents in attention
    target: float  # a learned audio column

    @staticmethod
    def of(config: ModelConfig, attention: AttentionKind) -> PackCosts:
        rows = config.num_layers * (6 * config.hidden_size + 3 * config.intermediate_size)
        places = config.num_layers * 2 * (config.num_heads + config.num_key_value_heads) * config.head_dim
        if attention != "padded":  # documents have as many places as tokens
            rows, places = rows + places, 0
        return PackCosts(2 * rows, 2 * places, 10 * config.num_codebooks * config.codebook_vocab)

    def of_pack(self, lengths: np.ndarray, targets: np.ndarray) -> float:
        """Of samples with these tokens and learned columns, both [s] int64."""
        places = len(lengths) * lengths.max(initial=0)
        return self.token * lengths.sum() + self.place * places + self.target * targets.sum()


class PackSource(Protocol):
    """What the search for a budget asks of the data."""

    def longest(self) -> int:
        """Tokens of the longest sample, among those read."""
        ...

    def most_tokens(self) -> int:
        """The largest budget with which an epoch still has the packs of one step."""
        ...

    def heaviest_pack(self, batch_tokens: int, costs: PackCosts) -> PackedBatch: ...


class PlannedPacks:
    """Of a data set with an index."""

    def __init__(
        self,
        reader: SampleReader,
        index: np.ndarray,
        builder: SequenceBuilder,
        settings: PlanSettings,
        first: np.ndarray | None = None,
    ) -> None:
        """`settings`: their budget is replaced by whichever is asked for. `first`: the index rows that packs are made of."""
        self._reader = reader
        self._index = index
        self._first = index[:FIRST_SAMPLES] if first is None else first
        self._builder = builder
        self._settings = settings
        # In the shorter form more samples, with more targets, fill a pack; a pack of them alone is rare, but may come.
        without = np.zeros(len(self._first), bool)
        self._with_text = builder.lengths(self._first).sum() <= builder.lengths(self._first, without).sum()

    def _lengths(self, rows: np.ndarray) -> np.ndarray:
        return self._builder.lengths(rows, np.full(len(rows), self._with_text))

    def longest(self) -> int:
        return int(max(self._builder.lengths(self._first).max(), self._lengths(self._first).max()))

    def most_tokens(self) -> int:
        chunks = range(0, len(self._index), CHUNK)
        total = sum(int(self._lengths(self._index[start : start + CHUNK]).sum()) for start in chunks)
        return max(self.longest(), int(0.9 * total / self._settings.packs_per_step))  # packs are not quite full

    def heaviest_pack(self, batch_tokens: int, costs: PackCosts) -> PackedBatch:
        settings = dataclasses.replace(self._settings, batch_tokens=batch_tokens)
        planner = Planner(self._first, self._lengths, settings)
        lengths = self._lengths(self._first)
        targets = self._first["target_frames"].astype(np.int64) + NUM_MARKER_COLUMNS
        packs: list[np.ndarray] = []
        for epoch in range(MOST_EPOCHS):
            packs += planner.window(epoch, 0).packs()
            if len(packs) >= ENOUGH_PACKS:
                break
        rows = max(packs, key=lambda rows: costs.of_pack(lengths[rows], targets[rows]))
        return read_pack(self._reader, self._first, rows, self._builder, len(rows), self._with_text)


class StreamedPacks:
    """Of a stream, whose samples are known only when they come: its first ones, the heaviest together."""

    def __init__(self, sequences: Callable[[], Iterator[Sequence]]) -> None:
        self._sequences = list(itertools.islice(sequences(), STREAMED_SAMPLES))

    def longest(self) -> int:
        return max((len(sequence) for sequence in self._sequences), default=1)

    def most_tokens(self) -> int:
        return 1 << 30  # a stream has no end

    def heaviest_pack(self, batch_tokens: int, costs: PackCosts) -> PackedBatch:
        """Samples in order of cost per token, repeated if there are too few, while they fit."""

        def cost(sequence: Sequence) -> float:
            columns = np.array([(sequence.next_codes != IGNORE).any(axis=0).sum()])
            return costs.of_pack(np.array([len(sequence)]), columns) / len(sequence)

        chosen: list[Sequence] = []
        room = batch_tokens
        ordered = sorted((s for s in self._sequences if len(s) <= batch_tokens), key=cost, reverse=True)
        while ordered and room >= min(len(sequence) for sequence in ordered):
            for sequence in ordered:
                if len(sequence) <= room:
                    chosen.append(sequence)
                    room -= len(sequence)
        if not chosen:
            shortest = min((len(sequence) for sequence in self._sequences), default=0)
            raise ShardError(
                f"no usable sample: 0 damaged, {len(self._sequences)} longer than a pack of {batch_tokens} tokens (the "
                f"shortest of the first: {shortest}); raise train.batch_tokens or give other shards"
            )
        return pack(chosen, list(range(len(chosen))), ["probe"] * len(chosen))
