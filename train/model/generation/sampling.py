"""Drawing the next column of every slot, on the device, without waiting for the host.

In: logits and uniform numbers. Out: codes. Each slot has its own rules and its own numbers, which come from its request's seed
alone: whoever sits beside it changes nothing. A code is where its number falls among the sorted probabilities; one number per
codebook and one more for the redraw (RAS) take the place of a random generator on the device, so the same seed says the same
on a CPU and, as far as the logits agree, on a GPU.

Letters: B slots, K codebooks, V codebook vocabulary, W columns of the widest window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.delay_pattern import STREAM_BOS
from train.model.generation.request import Sampling

NARROW = 64  # candidates that are sorted if every slot's top_k allows it; else all are
HIGHEST = 1 - 2**-20  # of the uniform numbers: a product with a sum must stay below the sum after rounding
SMALLEST_WINDOW = 8
SMALLEST_SHARE = 2.0**-126  # a top_p that is more than 0 in float32


class Rules:
    """The `Sampling` of each slot as tensors, changed in place."""

    def __init__(self, num_slots: int, vocab: int, device: torch.device) -> None:
        def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((num_slots, 1, 1), value, dtype=dtype, device=device)

        self._vocab = vocab
        self._given: list[Sampling | None] = [None] * num_slots
        self.temperature, self.top_p = column(1.0), column(2.0)
        self.top_k, self.max_repeats = column(1, torch.long), column(1, torch.long)[:, 0]
        self.is_greedy = torch.ones(num_slots, 1, dtype=torch.bool, device=device)
        self.in_window = torch.zeros(SMALLEST_WINDOW, num_slots, 1, dtype=torch.bool, device=device)
        self.ranks = torch.arange(vocab, device=device)

    def set(self, slot: int, sampling: Sampling | None) -> None:
        """The rules of a slot from now on; None: it is empty."""
        self._given[slot] = sampling
        greedy = sampling is None or sampling.temperature == 0
        self.is_greedy[slot] = greedy
        if sampling is None or greedy:
            return
        self.temperature[slot] = sampling.temperature
        self.top_k[slot] = sampling.top_k or self._vocab
        # Sums may round to more than 1, and a share below float32's smallest to 0, which would leave no candidate at all.
        self.top_p[slot] = max(sampling.top_p, SMALLEST_SHARE) if sampling.top_p < 1 else 2.0
        self.max_repeats[slot] = sampling.ras_max_repeats
        if sampling.ras_window > len(self.in_window):
            wider = self.in_window.new_zeros(sampling.ras_window, *self.in_window.shape[1:])
            wider[-len(self.in_window) :] = self.in_window
            self.in_window = wider
        self.in_window[:, slot] = False
        if sampling.ras_window > 0:
            self.in_window[-sampling.ras_window :, slot] = True

    @property
    def width(self) -> int:
        """Candidates that are sorted: 0 where every slot is greedy, a few, or all."""
        sampled = [one for one in self._given if one is not None and one.temperature != 0]
        if not sampled:
            return 0
        return NARROW if all(0 < one.top_k <= NARROW < self._vocab for one in sampled) else self._vocab


def draw(logits: Tensor, recent: Tensor, noise: Tensor, rules: Rules, width: int) -> Tensor:
    """logits [B, K, V], the recent columns [W, B, K], noise [B, 2, K] uniform in [0, 1) -> codes [B, K]."""
    greedy = logits.argmax(dim=-1)
    if not width:
        return greedy
    # BOS starts an audio and is forced there; drawn later it would cut the speech.
    logits = logits.index_fill(-1, rules.ranks[STREAM_BOS], float("-inf"))
    candidates, codes = logits.topk(width, dim=-1)
    ranks = rules.ranks[:width]
    chances = F.softmax((candidates / rules.temperature).masked_fill(ranks >= rules.top_k, float("-inf")), dim=-1)
    before = chances.cumsum(dim=-1) - chances
    chances = chances.masked_fill(before >= rules.top_p, 0.0)
    drawn = codes.gather(-1, pick(chances, noise[:, 0]))[..., 0]
    # Markers do not count as repetition: the staircases are made of them.
    repeats = ((recent == drawn) & rules.in_window & (recent < STREAM_BOS)).sum(dim=0)
    again = pick(F.softmax(logits, dim=-1), noise[:, 1])[..., 0]
    has_window = rules.in_window[-1]
    drawn = torch.where(has_window & (repeats >= rules.max_repeats), again, drawn)
    return torch.where(rules.is_greedy, greedy, drawn)


def pick(chances: Tensor, noise: Tensor) -> Tensor:
    """chances [B, K, n], not summed to 1, noise [B, K] -> [B, K, 1]: the first whose sum of chances exceeds its number."""
    sums = chances.cumsum(dim=-1)
    return (sums <= noise[..., None].clamp(max=HIGHEST) * sums[..., -1:]).sum(dim=-1, keepdim=True)
