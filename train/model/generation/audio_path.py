"""The part of the model that speaks: after the prompt every row is an audio row.

In: one column of every slot. Out: the logits of the next. Only what audio rows need is run, with the products that share their
input made one; the module's own forward runs the text network too, on no rows, so that sharded ranks stay together. A sharded
model is therefore spoken through its modules (`ModulePath`), one slot only. Norms are computed by one kernel, which in bf16
rounds once where the module rounds twice; in fp32 both are the same to the bit.

Letters: B slots, K codebooks, d hidden size, H query heads, G key-value heads, E head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from train.model.decoder import DecoderLayer, HiggsAudio, RMSNorm
from train.model.generation.key_value_cache import ColumnRow, KeyValueCache
from train.model.generation.products import added, fast_product, has_adapters, joined


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
        self._norm = Norm(model.model.norm)
        self._head = fast_product(model.audio_lm_head)
        self._split = (config.num_codebooks, config.codebook_vocab)
        self._rope = model.model.rope
        self._head_dim = config.head_dim
        heads = torch.arange(config.num_heads + 2 * config.num_key_value_heads, device=device)
        self._is_turned = (heads < config.num_heads + config.num_key_value_heads)[:, None]  # q and k are, v is not
        self._turns = torch.zeros(0, 2, config.head_dim)

    def __call__(self, columns: Tensor, positions: Tensor, cache: KeyValueCache, end: int) -> Tensor:
        x = F.embedding(columns + self._offsets, self._table).sum(dim=-2)
        cos, sin = self._cos_sin(positions, cache.capacity, x.dtype)
        places = cache.places(positions)
        end, mask = cache.visible(positions, end)
        for number, layer in enumerate(self._layers):
            x = layer(number, x, cos, sin, cache, places, end, mask)
        return self._head(self._norm(x)).unflatten(-1, self._split).float()

    def _cos_sin(self, positions: Tensor, capacity: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B, H + 2 G, E] each, for rows of q, k and v heads: v is turned by nothing. sin has its sign in it."""
        if len(self._turns) != capacity:
            cos, sin = self._rope(torch.arange(capacity, device=positions.device), dtype)
            half = self._head_dim // 2
            sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
            self._turns = torch.cat((cos, sin), dim=1)  # [C, 2, E]
        turns = self._turns.index_select(0, positions)
        return torch.where(self._is_turned, turns[:, :1], 1.0), torch.where(self._is_turned, turns[:, 1:], 0.0)


class Norm:
    """RMS norm as one kernel."""

    def __init__(self, norm: RMSNorm) -> None:
        self._weight = norm.weight.detach()
        self._eps = norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)


class AudioLayer:
    """One layer's audio half."""

    def __init__(self, layer: DecoderLayer, may_move: bool) -> None:
        attention, feed_forward = layer.self_attn, layer.audio_mlp
        self._head_dim = attention.head_dim
        self._before_attention = Norm(layer.audio_input_layernorm)
        self._qkv = joined([attention.q_proj, attention.k_proj, attention.v_proj], may_move)
        self._add_attention = added(attention.o_proj)
        self._before_feed_forward = Norm(layer.audio_post_attention_layernorm)
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
        qkv = self._qkv(self._before_attention(x)).unflatten(-1, (-1, self._head_dim))
        qkv = torch.addcmul(qkv * cos, qkv.roll(self._head_dim // 2, -1), sin)
        num_key_values = cache.num_heads
        q, kv = qkv[:, :-num_key_values], qkv[:, -num_key_values:]
        cache.write(number, places, kv)
        x = self._add_attention(x, cache.attend(number, q, end, mask))
        gate, up = self._gate_up(self._before_feed_forward(x)).chunk(2, dim=-1)
        return self._add_feed_forward(x, F.silu(gate) * up)


class ModulePath:
    """The model as it is, layer by layer: for a sharded one, whose weights are gathered by its modules."""

    def __init__(self, model: HiggsAudio) -> None:
        self._model = model
        self._no_text = torch.zeros(0, dtype=torch.long, device=model.audio_lm_head.weight.device)

    def __call__(self, columns: Tensor, positions: Tensor, cache: KeyValueCache, end: int) -> Tensor:
        assert cache.num_slots == 1, "the modules' own forward knows one column only"
        attend = ColumnRow(cache, end - 1, cache.places(positions))
        return self._model.next_logits(self._no_text, columns, positions, attend)[None].float()
