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
from train.data.packing import PlanSettings
from train.data.plan import CHUNK, Planner
from train.data.references import SpeakerReferences
from train.data.stages import read_pack
from train.data.text_dropout import TextDropout
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
        places: np.ndarray | None = None,
        references: SpeakerReferences | None = None,
    ) -> None:
        """`settings`: their budget is replaced by whichever is asked for. `places`: the index rows that packs are made of.
        `references`: drawn anew each epoch; None: those of the list."""
        self._reader = reader
        self._index = index
        self._places = np.arange(min(len(index), FIRST_SAMPLES)) if places is None else places
        self._references = references
        self._first = np.asarray(index[self._places])
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
        total = 0
        for start in range(0, len(self._index), CHUNK):
            rows = np.arange(start, min(len(self._index), start + CHUNK))
            total += int(self._lengths(self._rows(0, rows, np.iinfo(np.int64).max)).sum())
        return max(self.longest(), int(0.9 * total / self._settings.packs_per_step))  # packs are not quite full

    def _drawn(self, batch_tokens: int) -> SpeakerReferences | None:
        """As the plan of this budget draws them."""
        longest = TextDropout(self._builder, self._settings.seed).longest
        return self._references and self._references.fitting(lambda rows: longest(rows) <= batch_tokens)

    def _rows(self, epoch: int, places: np.ndarray, batch_tokens: int) -> np.ndarray:
        """Index rows at `places` as they are in an epoch with this budget."""
        drawn = self._drawn(batch_tokens)
        return drawn.found(epoch, places) if drawn else self._index[places]

    def heaviest_pack(self, batch_tokens: int, costs: PackCosts) -> PackedBatch:
        settings = dataclasses.replace(self._settings, batch_tokens=batch_tokens)
        targets = self._first["target_frames"].astype(np.int64) + NUM_MARKER_COLUMNS
        packs: list[tuple[float, int, np.ndarray]] = []  # cost, epoch, places
        for epoch in range(MOST_EPOCHS):
            rows = self._rows(epoch, self._places, batch_tokens) if self._references else self._first
            lengths = self._lengths(rows)
            for found in Planner(rows, self._lengths, settings).window(epoch, 0).packs():
                packs.append((costs.of_pack(lengths[found], targets[found]), epoch, self._places[found]))
            if len(packs) >= ENOUGH_PACKS:
                break
        _, epoch, places = max(packs, key=lambda found: found[0])
        drawn = self._drawn(batch_tokens)
        clips = drawn.clips(epoch, places) if drawn else None
        return read_pack(self._reader, self._index, places, self._builder, len(places), self._with_text, clips)


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
