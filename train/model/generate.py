"""Speech from a prompt: audio columns one by one with a key-value cache, greedy or sampled.

In: a model and the prompt of `SequenceBuilder.prompt`. Out: raw codes. The first column is all BOS, codebook k starts k
columns later, and from the first EOS on codebook k is forced to EOS k + 1 columns after it: the rules of transformers'
`HiggsAudioV2DelayPatternLogitsProcessor`, so greedy codes equal its `generate`. Repetition-aware sampling (RAS) redraws
a code that filled the recent window, as in both reference implementations.

The ranks of a sharded model speak together: each computes the same column, and all go on with the one that the first has
drawn, so that none can end before the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.sequence import STREAM_BOS, STREAM_EOS, Sequence, undelay
from train.model.batch import pack
from train.model.decoder import HiggsAudio
from train.world import ALONE, World

FRAMES_PER_SECOND = 25


@dataclass(frozen=True)
class Sampling:
    """How the next code is drawn. temperature 0 is greedy and ignores the rest."""

    temperature: float = 1.0
    top_k: int = 50  # 0: off
    top_p: float = 0.95
    ras_window: int = 7  # columns; 0: off
    ras_max_repeats: int = 2
    seed: int = 0


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Speech:
    codes: np.ndarray  # [K, T] uint16
    stopped: bool  # False: cut at max_frames, the model never ended


@torch.no_grad()
def generate(
    model: HiggsAudio,
    prompt: Sequence,
    max_frames: int,
    sampling: Sampling = GREEDY,
    world: World = ALONE,
    interrupted: Callable[[], bool] = lambda: False,
) -> Speech:
    """Continue a prompt until end of speech or `max_frames` frames (25 per second). Every rank must call this.

    `interrupted` is asked after every second of speech, by every rank at the same column, with the same answer.
    """
    device = model.audio_lm_head.weight.device
    num_codebooks = model.config.num_codebooks
    max_columns = max_frames + num_codebooks + 1
    cache = KeyValueCache(model, len(prompt) + max_columns, device)
    generator = torch.Generator(device).manual_seed(sampling.seed)

    batch = pack([prompt], [0], ["prompt"]).to(device)
    cache.order = batch.documents.order
    model.next_logits(batch.text_ids, batch.codes, batch.positions, cache, batch.whisper)
    cache.advance(len(prompt))

    no_text = torch.zeros(0, dtype=torch.long, device=device)
    cache.order = torch.zeros(1, dtype=torch.long, device=device)
    column = torch.full((num_codebooks,), STREAM_BOS, device=device)
    columns = [column]
    first_eos: int | None = None
    book = torch.arange(num_codebooks, device=device)
    stopped = False
    while not stopped and len(columns) < max_columns:
        if len(columns) % FRAMES_PER_SECOND == 0 and interrupted():
            break
        position = torch.tensor([cache.length], device=device)
        logits = model.next_logits(no_text, column[None], position, cache).float()  # [K, V]
        cache.advance(1)
        number = len(columns)
        column = draw(logits, torch.stack(columns[-max(1, sampling.ras_window) :]), sampling, generator)
        column = torch.where(book >= number, STREAM_BOS, column)
        if first_eos is not None:
            column = torch.where(book < number - first_eos, STREAM_EOS, column)
        column = world.first(column)
        columns.append(column)
        is_eos = column == STREAM_EOS
        if first_eos is None and bool(is_eos.any()):
            first_eos = number
        stopped = bool(is_eos.all())
    codes = undelay(torch.stack(columns, dim=1).cpu().numpy())
    return Speech(codes[:, :max_frames], stopped)


def draw(logits: Tensor, recent: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits [K, V] and the recent columns [W, K] -> one code per codebook [K]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.clone()
    logits[:, STREAM_BOS] = float("-inf")  # it starts an audio and is forced there; drawn later it would cut the speech
    codes = _multinomial(_filter(logits / sampling.temperature, sampling), generator)
    if sampling.ras_window > 0:
        # Markers do not count as repetition: the staircases are made of them.
        repeats = ((recent == codes) & (recent < STREAM_BOS)).sum(dim=0)
        codes = torch.where(repeats >= sampling.ras_max_repeats, _multinomial(logits, generator), codes)
    return codes


def _filter(logits: Tensor, sampling: Sampling) -> Tensor:
    """Top-k, then top-p: codes outside get minus infinity."""
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = F.softmax(ordered, dim=-1).cumsum(dim=-1) - F.softmax(ordered, dim=-1)
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


def _multinomial(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)[:, 0]


class KeyValueCache:
    """Attention for generation: new rows see everything before them. Holds k and v of one document in sentence order."""

    def __init__(self, model: HiggsAudio, max_length: int, device: torch.device) -> None:
        config = model.config
        shape = (config.num_layers, 2, config.num_key_value_heads, max_length, config.head_dim)
        self._cache = torch.zeros(shape, dtype=model.audio_lm_head.weight.dtype, device=device)
        self.length = 0
        self.order = torch.zeros(0, dtype=torch.long)  # [R] row of each new position

    def advance(self, num_positions: int) -> None:
        self.length += num_positions

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, H, E], k and v [R, G, E] of the new rows -> [R, H, E]."""
        start, end = self.length, self.length + len(q)
        self._cache[layer, 0, :, start:end] = k[self.order].transpose(0, 1)
        self._cache[layer, 1, :, start:end] = v[self.order].transpose(0, 1)
        keys, values = self._cache[layer, :, None, :, :end]
        queries = q[self.order].transpose(0, 1)[None]
        is_prompt = len(q) > 1  # a prompt starts an empty cache; after it rows come one by one and see all
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=is_prompt, enable_gqa=True)
        rows = torch.empty_like(q)
        rows[self.order] = out[0].transpose(0, 1)
        return rows
