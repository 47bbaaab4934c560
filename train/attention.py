"""How rows of a pack see each other: documents side by side, and the rotary positions inside them.

In: q, k, v of all rows, text first. Out: what each row has gathered from the rows before it in its own document. On every
device this is PyTorch's own attention over right-padded documents: behind a causal mask padding needs no other. The price
is the padding, in attention alone: every document is as long there as the longest of its pack.

Letters: R rows of a pack, D documents, M longest document, P = D * M places, H query heads, G key-value heads, E head size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.errors import CheckpointError
from train.model_config import ModelConfig


class Attend(Protocol):
    """How rows see each other: a pack's documents in training, a key-value cache in generation."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Documents(NamedTuple):
    """Where each row stands in the documents of a pack. Documents never see each other; inside one, order is causal."""

    to_padded: Tensor  # [D, M] int64 row of each position; positions behind a document's end name any row
    from_padded: Tensor  # [R] int64 place of each row in the flattened [D * M]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, H, E], k and v [R, G, E] -> [R, H, E].

        Right-padded documents under a causal mask need no other mask: padding stands behind every real position.
        """
        num_documents, longest = self.to_padded.shape
        index = self.to_padded.reshape(-1)

        def pad(x: Tensor) -> Tensor:  # [R, heads, E] -> [D, heads, M, E]
            rows = Gather.apply(x.flatten(1), index, self.from_padded)
            return rows.view(num_documents, longest, *x.shape[1:]).transpose(1, 2)  # pyright: ignore

        out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2).reshape(num_documents * longest, -1)
        return Collect.apply(out, self.from_padded).view_as(q)  # pyright: ignore


class Gather(torch.autograd.Function):
    """x [R, n] -> x[index] [P, n]. Backward reads each row's gradient at its one real place instead of adding atomically;
    exact because padding places receive zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Collect(torch.autograd.Function):
    """padded [P, n] -> padded[place] [R, n]; backward writes each row to its place and leaves zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.num_places = padded.shape[0]
        return padded.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        padded = grad.new_zeros(ctx.num_places, grad.shape[1])
        return padded.index_copy(0, ctx.saved_tensors[0], grad), None


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies [E / 2] float32 of Llama 3's rotary embedding.

    Llama 3 scaling: wavelengths longer than original / low_freq_factor are slowed by `factor`, shorter than
    original / high_freq_factor are kept, and those between are interpolated (meta-llama/llama-models, apply_scaling).
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    if config.rope_type == "default":
        return frequencies
    if config.rope_type != "llama3":
        raise CheckpointError(f"rope_type {config.rope_type!r} is not known; expected llama3 or default")
    wavelengths = 2 * math.pi / frequencies
    span = config.rope_high_freq_factor - config.rope_low_freq_factor
    smooth = (config.rope_original_length / wavelengths - config.rope_low_freq_factor) / span
    between = (1 - smooth) * frequencies / config.rope_factor + smooth * frequencies
    slow = wavelengths > config.rope_original_length / config.rope_low_freq_factor
    fast = wavelengths < config.rope_original_length / config.rope_high_freq_factor
    return torch.where(slow, frequencies / config.rope_factor, torch.where(fast, frequencies, between))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [R, heads, E] turned by its position; cos and sin [R, 1, E]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
