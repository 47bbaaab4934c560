"""The three losses, as sums: the loop divides them by what the whole step counted on all ranks.

    total = text_weight  * sum(text CE)  / text targets of the step
          + audio_weight * mean over codebooks of  sum(CE of codebook k) / targets of codebook k in the step
          + contrastive_weight * ramp * sum(InfoNCE) / pairs of the step

Logits come at learned rows only and are raised to fp32 before the softmax. Targets are already shifted
(`shards.sequence`), so nothing is shifted here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.sequence import IGNORE

CONTRASTIVE_TEMPERATURE = 0.1  # the original guide's InfoNCE temperature
RAMP_START = 0.1  # the original guide's curriculum: half a cosine from 0.1 to 1


class LossSums(NamedTuple):
    """fp32 sums over a pack."""

    text: Tensor  # []
    audio: Tensor  # [K], one per codebook
    contrastive: Tensor  # []


def text_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [n, V], targets [n] int64 -> []; n may be 0."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def audio_loss_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [n, K, V], targets [n, K] int64 with IGNORE in the staircases -> [K]; n may be 0."""
    num_columns, num_codebooks, _ = logits.shape
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=IGNORE)
    return losses.view(num_columns, num_codebooks).sum(dim=0)


def contrastive_loss_sum(audio_hidden: Tensor, segments: Tensor, speakers: Tensor) -> Tensor:
    """InfoNCE between the mean hidden states of each sample's reference and target -> [].

    audio_hidden [Na, d]; segments [Na] int64: 2 s for the reference columns of sample s, 2 s + 1 for its target's;
    speakers [S] int64. A target must find its own reference among those of the other speakers in the pack; pairs of
    one speaker are left out of the negatives. A sample without a negative adds exactly 0 (`num_contrastive_pairs`).
    """
    num_samples = speakers.shape[0]
    sums = audio_hidden.new_zeros((2 * num_samples, audio_hidden.shape[1]), dtype=torch.float32)
    sums = sums.index_add(0, segments, audio_hidden.float())
    # The direction of the mean is the direction of the sum, and only the direction is compared.
    references, targets = F.normalize(sums.view(num_samples, 2, -1), dim=-1).unbind(1)
    similarity = targets @ references.T / CONTRASTIVE_TEMPERATURE  # [S, S]
    same_speaker = speakers[:, None] == speakers[None, :]
    itself = torch.eye(num_samples, dtype=torch.bool, device=speakers.device)
    similarity = similarity.masked_fill(same_speaker & ~itself, float("-inf"))
    return F.cross_entropy(similarity, torch.arange(num_samples, device=speakers.device), reduction="sum")


def num_contrastive_pairs(speakers: Tensor) -> int:
    """How many samples [S] of a pack have at least one other speaker beside them."""
    return int((speakers[:, None] != speakers[None, :]).any(dim=1).sum())


def curriculum_factor(step: int, curriculum_steps: int, enabled: bool) -> float:
    """Factor of the contrastive weight before `step` (from 0): half a cosine from 0.1 to 1 over `curriculum_steps`."""
    if not enabled or step >= curriculum_steps:
        return 1.0
    return RAMP_START + (1 - RAMP_START) * 0.5 * (1 - math.cos(math.pi * step / curriculum_steps))
