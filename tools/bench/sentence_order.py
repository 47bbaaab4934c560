"""The other layout of rows, for comparison: in the order of the sentence, permuted to text and audio in every layer.

In: our backbone. Out: one with the same weights and the same hidden states, whose rows stay in sentence order. Attention then
needs no gather, and each layer gathers its rows once before the two feed-forward networks and once behind them. Ours keeps text
rows first and gathers q, k, v and the result of attention. Only the benchmark uses this.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from train.model.attention import (
    CAUSAL,
    GROUPED,
    Attend,
    AttentionKind,
    Documents,
    Gather,
    PaddedDocuments,
    attend_separately,
)
from train.model.batch import PackedBatch
from train.model.decoder import Backbone, DecoderLayer


class SentenceOrder(nn.Module):
    """Layers over rows in sentence order, around those of a `Backbone`."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.layers = nn.ModuleList(SentenceLayer(cast("DecoderLayer", layer)) for layer in backbone.layers)

    def compile_layers(self, backend: str) -> None:
        for layer in self.layers:
            layer.compile(fullgraph=True, backend=backend, dynamic=True)

    def hidden(self, batch: PackedBatch, kind: AttentionKind) -> Tensor:
        """As `HiggsAudio.hidden`, without Whisper rows: normed hidden states [R, d], text rows first."""
        order, place = batch.documents.order, batch.documents.place
        text = self.backbone.embed_tokens(batch.text_ids)
        rows = torch.cat((text, self.backbone.embed_audio_tokens(batch.codes)))
        rows = rows[order]
        if self.training and torch.is_grad_enabled():
            rows = rows.detach().requires_grad_()  # as `Backbone.forward` does it
        cos, sin = self.backbone.rope(batch.positions[order], text.dtype)
        is_audio = (order >= len(batch.text_ids))[:, None]
        attend = in_sentence_order(batch.documents, kind)
        for layer in self.layers:
            rows = layer(rows, cos, sin, is_audio, order, place, text, attend)
        return self.backbone.norm(Gather.apply(rows, place, order))


class SentenceLayer(nn.Module):
    """A `DecoderLayer` over rows in sentence order; `text` is read for its number of rows only."""

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        is_audio: Tensor,
        order: Tensor,
        place: Tensor,
        text: Tensor,
        attend: Attend,
    ) -> Tensor:
        """rows [R, d] -> the same."""
        layer = self.layer
        rows = rows + layer.self_attn(self.normed(rows, is_audio), cos, sin, attend)
        first = Gather.apply(rows, place, order)  # text rows first
        spoken, heard = cast("Tensor", first)[: text.shape[0]], cast("Tensor", first)[text.shape[0] :]
        spoken = layer.mlp(layer.post_attention_layernorm(spoken))
        heard = layer.audio_mlp(layer.audio_post_attention_layernorm(heard))
        return rows + Gather.apply(torch.cat((spoken, heard)), order, place)

    def normed(self, rows: Tensor, is_audio: Tensor) -> Tensor:
        """Both input norms differ by their weight only."""
        audio, text = self.layer.audio_input_layernorm, self.layer.input_layernorm
        wide = rows.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + text.eps)
        return torch.where(is_audio, audio.weight, text.weight) * wide.to(rows.dtype)


class VariableInOrder(NamedTuple):
    bounds: Tensor
    longest: int

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = (self.bounds, self.bounds, self.longest, self.longest)
        return varlen_attn(q, k, v, *ends, window_size=CAUSAL, **GROUPED)  # pyright: ignore


class SeparateInOrder(NamedTuple):
    lengths: list[int]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_separately(q, k, v, self.lengths)


def in_sentence_order(documents: Documents, kind: AttentionKind) -> Attend:
    """The same attention for rows in sentence order: no gathers but those into a grid."""
    if kind == "varlen":
        return VariableInOrder(documents.bounds, documents.longest)
    if kind == "separate":
        return SeparateInOrder(documents.bounds.diff().tolist())
    to_padded, from_padded = documents.padded()
    return PaddedDocuments(documents.place[to_padded], from_padded[documents.order])
