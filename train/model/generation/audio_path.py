"""The part of the model that speaks: after the prompt every row is an audio row.

In: one column of every slot. Out: the logits of the next. Only what audio rows need is run, with the products that share their
input made one; the module's own forward runs the text network too, on no rows, so that sharded ranks stay together. A sharded
model is therefore spoken through its modules (`ModulePath`), one slot only. Norms are computed by one kernel, which in bf16
rounds once where the module rounds twice; on a CPU in fp32, without an adapter, they are sums in another order, a row's last bit.

Letters: B slots, K codebooks, d hidden size, H query heads, G key-value heads, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from train.model.decoder import DecoderLayer, HiggsAudio, RMSNorm
from train.model.generation.key_value_cache import ColumnRow, KeyValueCache
from train.model.generation.products import added, has_adapters, head_product, joined


class Path(Protocol):
    """From a column of each slot to the logits of the next."""

    def __call__(self, columns: Tensor, positions: Tensor, cache: KeyValueCache, end: int) -> Tensor:
        """columns [B, K], positions [B] in the cache, all before `end` -> [B, K, codebook_vocab] float32."""
        ...


def open_path(model: HiggsAudio) -> Path:
    return ModulePath(model) if isinstance(model, FSDPModule) else AudioPath(model)


class AudioPath:
    """Audio rows of any number of slots."""

    def __init__(self, model: HiggsAudio) -> None:
        config, embedding = model.config, model.model.embed_audio_tokens
        may_move = not has_adapters(model)
        self._table = embedding.embed_audio_tokens.weight.detach()
        device = self._table.device
        self._offsets = torch.arange(config.num_codebooks, device=device) * config.codebook_vocab
        self._layers = [AudioLayer(layer, may_move) for layer in model.model.layers]  # pyright: ignore
        self._norm = norm_of(model.model.norm, may_move)
        self._head = head_product(model.audio_lm_head, may_move)
        self._split = (config.num_codebooks, config.codebook_vocab)
        self._rope = model.model.rope
        self._head_dim = config.head_dim
        heads = torch.arange(config.num_heads + 2 * config.num_key_value_heads, device=device)
        self._kinds = (
            heads >= config.num_heads + config.num_key_value_heads
        ).long()  # 0: q and k, turned; 1: v, as it is
        self._turns = torch.zeros(0)
        self._rope(torch.zeros(1, device=device), torch.float32)  # what it keeps must be no tensor of inference mode

    def __call__(self, columns: Tensor, positions: Tensor, cache: KeyValueCache, end: int) -> Tensor:
        x = F.embedding(columns + self._offsets, self._table).sum(dim=-2)
        cos, sin = self._cos_sin(positions, cache.capacity, x.dtype)
        places = cache.places(positions)
        end, mask = cache.visible(positions, end)
        for number, layer in enumerate(self._layers):
            x = layer(number, x, cos, sin, cache, places, end, mask)
        return self._head(self._norm(x)).view(len(x), *self._split).float()

    def _cos_sin(self, positions: Tensor, capacity: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B, H + 2 G, E] each, for rows of q, k and v heads: v is turned by nothing. sin has its sign in it."""
        if len(self._turns) != capacity:
            cos, sin = self._rope(torch.arange(capacity, device=positions.device), dtype)  # [C, 1, E]
            half = self._head_dim // 2
            sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
            self._turns = torch.stack((torch.cat((cos, torch.ones_like(cos)), dim=1), F.pad(sin, (0, 0, 0, 1))), dim=1)
        turns = self._turns.index_select(0, positions).index_select(2, self._kinds)  # of [C, 2, 2 kinds, E]
        cos, sin = turns.unbind(1)
        return cos, sin


def norm_of(norm: RMSNorm, may_round: bool) -> Callable[[Tensor], Tensor]:
    """RMS norm of rows [B, d] by the fewest kernels: one on a GPU; a CPU has none and takes seven, here four.

    x / sqrt(mean(x^2) + eps) * w is x / hypot(|x|, sqrt(d eps)) * sqrt(d) w. may_round: its last bit may not be the module's.
    A model in training may not: what one rank says of it, by this path, is what two say through its modules.
    """
    weight, eps = norm.weight.detach(), norm.eps
    if not may_round or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x: F.rms_norm(x, weight.shape, weight, eps)
    scaled = weight * math.sqrt(len(weight))
    floor = torch.tensor(math.sqrt(len(weight) * eps))
    return lambda x: x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor) * scaled


class AudioLayer:
    """One layer's audio half."""

    def __init__(self, layer: DecoderLayer, may_move: bool) -> None:
        attention, feed_forward = layer.self_attn, layer.audio_mlp
        self._head_dim = attention.head_dim
        self._before_attention = norm_of(layer.audio_input_layernorm, may_move)
        self._qkv = joined([attention.q_proj, attention.k_proj, attention.v_proj], may_move)
        self._add_attention = added(attention.o_proj)
        self._before_feed_forward = norm_of(layer.audio_post_attention_layernorm, may_move)
        self._gate_up = joined([feed_forward.gate_proj, feed_forward.up_proj], may_move)
        self._add_feed_forward = added(feed_forward.down_proj)

    def __call__(
        self,
        number: int,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache,
        places: Tensor,
        end: int,
        mask: Tensor | None,
    ) -> Tensor:
        """x [B, d] -> [B, d]."""
        qkv = self._qkv(self._before_attention(x)).view(len(x), -1, self._head_dim)
        qkv = torch.addcmul(qkv * cos, qkv.roll(self._head_dim // 2, -1), sin)
        num_key_values = cache.num_heads
        q, kv = qkv.split((qkv.shape[1] - num_key_values, num_key_values), dim=1)
        cache.write(number, places, kv)
        x = self._add_attention(x, cache.attend(number, q, end, mask))
        gate, up = self._gate_up(self._before_feed_forward(x)).chunk(2, dim=-1)
        return self._add_feed_forward(x, F.silu(gate).mul_(up))


class ModulePath:
    """The model as it is, layer by layer: for a sharded one, whose weights are gathered by its modules."""

    def __init__(self, model: HiggsAudio) -> None:
        self._model = model
        self._no_text = torch.zeros(0, dtype=torch.long, device=model.audio_lm_head.weight.device)

    def __call__(self, columns: Tensor, positions: Tensor, cache: KeyValueCache, end: int) -> Tensor:
        assert cache.num_slots == 1, "the modules' own forward knows one column only"
        attend = ColumnRow(cache, end - 1, cache.places(positions))
        return self._model.next_logits(self._no_text, columns, positions, attend)[None].float()
