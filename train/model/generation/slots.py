"""Slots side by side: what each has said last and where it stands, and a block of columns for all of them at once.

In: the state after one block, uniform numbers. Out: the columns and the state after them. A block is a function of its inputs
but for the cache, so that a CUDA graph can hold it; the host looks at its result only, once in `COLUMNS_PER_BLOCK` columns. The
price: a request that ends within a block runs on to the end of it.

Letters: B slots, K codebooks, W columns of the widest window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shards.delay_pattern import STREAM_BOS
from train.model.generation.audio_path import Path
from train.model.generation.end_of_speech import NEVER, delay_pattern
from train.model.generation.key_value_cache import KeyValueCache
from train.model.generation.request import Sampling
from train.model.generation.sampling import SMALLEST_WINDOW, Rules, draw

COLUMNS_PER_BLOCK = 8


class State(NamedTuple):
    """Where every slot stands."""

    column: Tensor  # [B, K] int64, said last
    position: Tensor  # [B] int64, of that column in the cache
    number: Tensor  # [B] int64, columns said so far
    first_eos: Tensor  # [B] int64, number of the first column with an EOS; NEVER before
    recent: Tensor  # [W, B, K] int64, oldest first


class Slots:
    """The state, the rules and the occupation of B slots."""

    def __init__(self, num_slots: int, num_codebooks: int, vocab: int, device: torch.device) -> None:
        def full(value: int, *shape: int) -> Tensor:
            return torch.full((*shape, num_slots), value, dtype=torch.long, device=device)

        columns = full(STREAM_BOS, SMALLEST_WINDOW + 1, num_codebooks).transpose(1, 2).contiguous()
        self.state = State(columns[0].clone(), full(0), full(1), full(NEVER), columns[1:].clone())
        self.rules = Rules(num_slots, vocab, device)
        self.live = full(0)  # [B] 1 where a request sits: empty slots stay at position 0
        self._books = torch.arange(num_codebooks, device=device)

    def join(self, slot: int, length: int, sampling: Sampling | None) -> None:
        """A request whose prompt takes the first `length` positions of the slot's cache."""
        self._set(slot, length, sampling, 1)

    def leave(self, slot: int) -> None:
        self._set(slot, 0, None, 0)

    def _set(self, slot: int, position: int, sampling: Sampling | None, live: int) -> None:
        self.rules.set(slot, sampling)
        missing = len(self.rules.in_window) - len(self.state.recent)
        if missing:
            blank = self.state.recent.new_full((missing, *self.state.recent.shape[1:]), STREAM_BOS)
            self.state = self.state._replace(recent=torch.cat((blank, self.state.recent)))
        self.state.column[slot] = STREAM_BOS
        self.state.position[slot] = position
        self.state.number[slot] = 1
        self.state.first_eos[slot] = NEVER
        self.state.recent[:, slot] = STREAM_BOS
        self.live[slot] = live

    def block(
        self,
        path: Path,
        cache: KeyValueCache,
        state: State,
        noise: Tensor,
        ends: list[int],
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """One column of every slot for each of `ends` -> (columns [n, B, K], the state after them).

        noise [n, B, 2, K]; ends: no slot's column lies at or behind this position. `agree` makes ranks go on with one column.
        """
        columns, width = [], self.rules.width
        column, position, number, first_eos, recent = state
        for end, numbers in zip(ends, noise, strict=True):
            logits = path(column, position, cache, end)
            drawn = draw(logits, recent, numbers, self.rules, width)
            if agree is not None:
                drawn = agree(drawn)
            column, first_eos = delay_pattern(drawn, self._books, number, first_eos)
            if width:
                recent = torch.cat((recent[1:], column[None]))
            columns.append(column)
            position, number = position + self.live, number + 1
        return torch.stack(columns), State(column, position, number, first_eos, recent)
