"""Keys and values of every slot, in memory that stays where it is between columns.

In: the k and v rows of a prompt or of one column. Out: what attention looks at. All slots have the same length, one of the
buckets 256, 512, 1024, ...; when a request needs more, the whole cache moves into the next bucket, and it never shrinks. The
price is unused memory, at most half; the gain is that a CUDA graph finds its tensors, and that no column allocates. The rows
of a head lie side by side, because attention of a single query reads them all: four times as fast as rows of all heads.

Letters: L layers, S slots, C positions of a slot, H query heads, G key-value heads, E head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.model.attention import attend_separately
from train.model.config import ModelConfig

SMALLEST_BUCKET = 256
SLICE = 64  # positions; attention over a few slots on a CPU looks at whole slices of the cache


def bucket_of(num_positions: int) -> int:
    """The smallest bucket that holds so many positions."""
    bucket = SMALLEST_BUCKET
    while bucket < num_positions:
        bucket *= 2
    return bucket


class LayerRows(NamedTuple):
    """One layer's rows, as they are written and as they are read."""

    written: Tensor  # [S * 2 G * C, E]
    keys: Tensor  # [S, G, C, E]
    values: Tensor  # [S, G, C, E]


class KeyValueCache:
    """Rows of S slots. Keys are stored turned by their position."""

    def __init__(self, config: ModelConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self._heads = config.num_key_value_heads
        shape = (config.num_layers, num_slots, 2 * config.num_key_value_heads, 0, config.head_dim)
        self._rows = torch.zeros(shape, dtype=dtype, device=device)  # [L, S, k heads then v heads, C, E]
        self._starts = torch.zeros(num_slots, 1, dtype=torch.long, device=device)
        self._numbers = torch.zeros(0, dtype=torch.long, device=device)
        self._layers: list[LayerRows] = []  # views: each made once, not in every column

    @property
    def num_slots(self) -> int:
        return self._rows.shape[1]

    @property
    def num_heads(self) -> int:
        """2 G, of a position's row."""
        return self._rows.shape[2]

    @property
    def capacity(self) -> int:
        """C."""
        return self._rows.shape[3]

    def reserve(self, num_positions: int) -> bool:
        """Room for so many positions in every slot; whether the tensors have moved."""
        if num_positions <= self.capacity:
            return False
        num_layers, num_slots, heads, old, size = self._rows.shape
        rows = self._rows.new_zeros(num_layers, num_slots, heads, bucket_of(num_positions), size)
        rows[:, :, :, :old] = self._rows
        self._rows = rows
        keys, values = rows.split(self._heads, dim=2)
        self._layers = [LayerRows(*views) for views in zip(rows.flatten(1, 3), keys, values, strict=True)]
        self._starts = torch.arange(num_slots * heads, device=rows.device).view(num_slots, heads) * self.capacity
        self._numbers = torch.arange(self.capacity, device=rows.device)
        return True

    def prompt(self, slot: int, order: Tensor) -> PromptRows:
        """How the rows of a prompt see each other; they fill the slot from its first position on."""
        self._rows[:, slot] = 0  # a value that is not finite would reach others even through a mask
        return PromptRows(self._rows[:, slot], order)

    def places(self, positions: Tensor) -> Tensor:
        """positions [S], one of each slot -> where `write` puts each head of them [S * 2 G]."""
        return (self._starts + positions[:, None]).flatten()

    def write(self, layer: int, places: Tensor, rows: Tensor) -> None:
        """rows [S, 2 G, E] (k heads, then v heads) of one new position of every slot."""
        written = self._layers[layer].written
        written.index_copy_(0, places, rows.reshape(-1, rows.shape[-1]).to(written.dtype))

    def visible(self, positions: Tensor, end: int) -> tuple[int, Tensor | None]:
        """(end, mask [S, 1, 1, end] to add) for queries at `positions` [S]; no position lies behind `end`.

        One slot sees all before `end`. On a CPU a few of them look at whole slices up to the longest, which is bit for bit
        the same as looking at the whole bucket.
        """
        if self.num_slots == 1 and positions.device.type == "cpu":
            return end, None
        if positions.device.type == "cpu":
            end = min(self.capacity, -(-end // SLICE) * SLICE)
        else:
            end = self.capacity
        hidden = self._numbers[:end] > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._rows.dtype, device=positions.device)
        return end, mask.masked_fill_(hidden, float("-inf"))[:, None, None]

    def attend(self, layer: int, q: Tensor, end: int, mask: Tensor | None) -> Tensor:
        """q [S, H, E] -> [S, H * E]. The query heads of a key-value head count as queries of their own."""
        _, keys, values = self._layers[layer]
        queries = q.view(len(q), self._heads, -1, q.shape[-1])
        out = F.scaled_dot_product_attention(queries, keys.narrow(2, 0, end), values.narrow(2, 0, end), mask)
        return out.flatten(1)


class PromptRows:
    """Attention of a prompt's rows: each sees those before it; k and v are kept in one slot, in sentence order."""

    def __init__(self, rows: Tensor, order: Tensor) -> None:
        self._rows = rows  # [L, 2 G, C, E]
        self._order = order  # [R] row of each position

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, H, E], k and v [R, G, E] of all rows -> [R, H, E]."""
        q, k, v = (x[self._order] for x in (q, k, v))
        self._rows[layer, :, : len(k)] = torch.cat((k, v), dim=1).transpose(0, 1)
        if q.device.type == "cpu":
            seen = attend_separately(q, k, v, [len(q)])
        else:
            queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
            seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)[0].transpose(
                0, 1
            )
        out = torch.empty_like(q)
        out[self._order] = seen
        return out


class ColumnRow:
    """Attention of one column's row in a cache of one slot, for a model that is run layer by layer as it is."""

    def __init__(self, cache: KeyValueCache, position: int, places: Tensor) -> None:
        self._cache = cache
        self._end = position + 1
        self._places = places

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, H, E], k and v [1, G, E] -> [1, H, E]."""
        self._cache.write(layer, self._places, torch.cat((k, v), dim=1))
        return self._cache.attend(layer, q, self._end, None).view_as(q)
