"""The DualFFN decoder over packed tokens: Llama with a second feed-forward network per layer for audio tokens.

In: a `PackedBatch`, or a prompt for generation. Out: hidden states, and through `forward` the summed losses.
State-dict names equal transformers' `HiggsAudioV2ForConditionalGeneration`, so its checkpoints load and LoRA adapters
trained here are plain PEFT adapters for it.

The surprising decision: rows are kept text first, audio second, as two tensors, from the embedding to the heads; only
attention visits them in the order of the sentence. Every norm and feed-forward network then runs on one contiguous
tensor, without boolean masks or synchronisation. The price is one gather of q, k, v and one of the result per layer.

Letters: Nt text rows, Na audio rows, R = Nt + Na rows of a pack (text first), E head size, d hidden size, K codebooks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shards.encoders.whisper_tower import WhisperTower
from train.model.attention import Attend, AttentionKind
from train.model.batch import PackedBatch, WhisperRows
from train.model.config import ModelConfig
from train.model.fused_lora import project, swiglu_down
from train.model.loss import (
    LossSums,
    LossTerms,
    audio_losses,
    contrastive_loss_sum,
    num_correct,
    sums_by_set,
    text_losses,
)
from train.model.rope import Rope, rotate

# --- layers ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.fuses_lora = False
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [R, d] -> [R, d]."""
        q, k, v = (
            rows.unflatten(-1, (-1, self.head_dim))
            for rows in project(x, (self.q_proj, self.k_proj, self.v_proj), self.fuses_lora)
        )
        out = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return project(out.flatten(1), (self.o_proj,), self.fuses_lora)[0]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fuses_lora = False
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, (self.gate_proj, self.up_proj), self.fuses_lora)
        return swiglu_down(gate, up, self.down_proj, self.fuses_lora)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.recomputes = False  # keep only this layer's inputs for backward, and compute the rest again
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.audio_mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.audio_input_layernorm = RMSNorm(size, eps)
        self.audio_post_attention_layernorm = RMSNorm(size, eps)

    def forward(self, text: Tensor, audio: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """text [Nt, d], audio [Na, d] -> the same. Both branches always run, on zero rows if need be, so that every
        rank of a sharded model takes part in every collective."""
        if self.recomputes and torch.is_grad_enabled():
            # Inside the layer, so that a sharded layer's gather lies outside: backward runs it again, not once more.
            return checkpoint(self._forward, text, audio, cos, sin, attend, use_reentrant=False)  # pyright: ignore
        return self._forward(text, audio, cos, sin, attend)

    def _forward(self, text: Tensor, audio: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        normed = torch.cat((self.input_layernorm(text), self.audio_input_layernorm(audio)))
        mixed = self.self_attn(normed, cos, sin, attend)
        text = text + mixed[: text.shape[0]]
        audio = audio + mixed[text.shape[0] :]
        text = text + self.mlp(self.post_attention_layernorm(text))
        audio = audio + self.audio_mlp(self.audio_post_attention_layernorm(audio))
        return text, audio


class AudioEmbedding(nn.Module):
    """A column's embedding is the sum of its K code embeddings; the table holds the codebooks one after another."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.codebook_vocab = config.codebook_vocab
        self.embed_audio_tokens = nn.Embedding(config.num_codebooks * config.codebook_vocab, config.hidden_size)

    def forward(self, codes: Tensor) -> Tensor:
        """codes [Na, K] int64, markers included -> [Na, d]."""
        offsets = torch.arange(codes.shape[1], device=codes.device) * self.codebook_vocab
        return self.embed_audio_tokens(codes + offsets).sum(dim=-2)


class WhisperEmbeddings(NamedTuple):
    """Embeddings of Whisper rows, in place of those of their ids."""

    rows: Tensor  # [Nw] int64 text rows
    embeddings: Tensor  # [Nw, d]


class WhisperProjection(nn.Module):
    """Whisper states to embeddings; named as in boson's class."""

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(width, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """states [Nw, width] -> [Nw, d]."""
        return self.linear(states.to(self.linear.weight.dtype))


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_audio_tokens = AudioEmbedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config
        self.rope = Rope(config)

    def forward(
        self,
        text_ids: Tensor,
        codes: Tensor,
        positions: Tensor,
        attend: Attend,
        whisper_rows: WhisperEmbeddings | None = None,
    ) -> Tensor:
        """text_ids [Nt], codes [Na, K], positions [R] (text rows first) -> normed hidden states [R, d]."""
        text, audio = self.embed_tokens(text_ids), self.embed_audio_tokens(codes)
        if whisper_rows is not None:
            text = text.index_copy(0, whisper_rows.rows, whisper_rows.embeddings.to(text.dtype))
        cos, sin = self.rope(positions, text.dtype)
        if self.training and torch.is_grad_enabled():
            # The base is frozen, so the first layer's input would need no gradient and its graph would be another one;
            # with a Whisper projection that learns it would be half of it.
            text, audio = (rows if rows.requires_grad else rows.detach().requires_grad_() for rows in (text, audio))
        for layer in self.layers:
            text, audio = layer(text, audio, cos, sin, attend)
        return self.norm(torch.cat((text, audio)))


class HiggsAudio(nn.Module):
    """Backbone and heads; `forward` returns summed losses so that every use of a parameter lies inside it (FSDP).

    With `config.whisper` there is a projection of Whisper states, and with `runs_tower` the tower that makes them.
    """

    def __init__(self, config: ModelConfig, runs_tower: bool = True) -> None:
        super().__init__()
        self.config = config
        self.attention: AttentionKind = "padded"  # of packs; generation has a cache instead
        self.fuses_lora = False
        self.model = Backbone(config)
        self.audio_lm_head = nn.Linear(config.hidden_size, config.num_codebooks * config.codebook_vocab, bias=False)
        self.text_lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.audio_encoder_proj = WhisperProjection(config.whisper.width, config) if config.whisper else None
        self.audio_tower = WhisperTower(config.whisper) if config.whisper and runs_tower else None

    def forward(self, batch: PackedBatch, per_target: bool = False) -> LossSums | LossTerms:
        """Loss sums of a pack, or its losses one by one; logits are made at learned rows only."""
        hidden = self.hidden(batch)
        audio_hidden = hidden[batch.text_ids.shape[0] :]
        (text_logits,) = project(hidden[batch.text_rows], (self.text_lm_head,), self.fuses_lora)
        text = text_losses(text_logits, batch.text_targets)
        audio_logits = self.audio_logits(audio_hidden[batch.audio_rows])
        audio = audio_losses(audio_logits, batch.audio_targets)
        if per_target:
            return LossTerms(text, audio)
        contrastive = contrastive_loss_sum(audio_hidden, batch.segments, batch.speakers)
        num_sets = len(batch.set_counts)
        by_set = sums_by_set(text, audio, batch.text_sets, batch.audio_sets, num_sets) if num_sets > 1 else None
        correct = num_correct(audio_logits, batch.audio_targets)
        return LossSums(text.sum(), audio.sum(dim=0), contrastive, correct, by_set)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Normed hidden states [R, d] of a pack, text rows first."""
        attend = batch.documents.attend(self.attention)
        return self.model(batch.text_ids, batch.codes, batch.positions, attend, self.whisper_embeddings(batch.whisper))

    def whisper_embeddings(self, whisper: WhisperRows | None) -> WhisperEmbeddings | None:
        """The embeddings of a pack's Whisper rows. The tower is frozen; gradients stop at the projection."""
        if whisper is None and self.audio_encoder_proj is None:
            return None
        assert self.audio_encoder_proj is not None, "a pack with Whisper rows needs a model with a projection"
        if whisper is None:  # a pack that only fills up a step: every rank must still use every weight
            weight = self.audio_encoder_proj.linear.weight
            no_rows = torch.zeros(0, dtype=torch.long, device=weight.device)
            return WhisperEmbeddings(no_rows, self.audio_encoder_proj(weight.new_zeros(0, weight.shape[1])))
        states = whisper.states
        if len(whisper.positions):
            assert self.audio_tower is not None, "a pack with mels needs a model that runs the tower"
            with torch.no_grad():
                states = self.audio_tower(whisper.mels, whisper.positions).flatten(0, 1)[whisper.places]
        return WhisperEmbeddings(whisper.rows, self.audio_encoder_proj(states))

    def next_logits(
        self, text_ids: Tensor, codes: Tensor, positions: Tensor, attend: Attend, whisper: WhisperRows | None = None
    ) -> Tensor:
        """For generation: the rows of a prompt or of one column -> logits [K, codebook_vocab] after the last audio row."""
        whisper_rows = self.whisper_embeddings(whisper) if whisper else None
        hidden = self.model(text_ids, codes, positions, attend, whisper_rows)
        return self.audio_logits(hidden[-1:])[0]

    def fuse_lora(self, fuses: bool) -> None:
        """Whether layers that read the same rows are computed as one (`train.model.fused_lora`), from now on."""
        for module in self.modules():
            if isinstance(module, Attention | FeedForward | HiggsAudio):
                module.fuses_lora = fuses

    def audio_logits(self, hidden: Tensor) -> Tensor:
        """[n, d] -> [n, K, codebook_vocab]."""
        (logits,) = project(hidden, (self.audio_lm_head,), self.fuses_lora)
        return logits.unflatten(-1, (self.config.num_codebooks, self.config.codebook_vocab))
