"""The three losses, as sums: the loop divides them by what the whole step counted on all ranks.

    total = text_weight  * sum(text CE)  / text targets of the step
          + audio_weight * mean over codebooks, weighted, of  sum(CE of codebook k) / targets of codebook k in the step
          + contrastive_weight * ramp * sum(InfoNCE) / pairs of the step

Logits come at learned rows only and are raised to fp32 before the softmax. Targets are already shifted
(`shards.label_shift`), so nothing is shifted here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.label_shift import IGNORE
from train.config import LossSection
from train.model.batch import PackedBatch
from train.world import ALONE, World

CONTRASTIVE_TEMPERATURE = 0.1  # the original guide's InfoNCE temperature
RAMP_START = 0.1  # the original guide's curriculum: half a cosine from 0.1 to 1


class LossSums(NamedTuple):
    """fp32 sums over a pack."""

    text: Tensor  # []
    audio: Tensor  # [K], one per codebook
    contrastive: Tensor  # []
    correct: Tensor  # [K] int64, targets that had the highest logit
    by_set: Tensor | None = (
        None  # [D, 1 + K], text and audio of each data set, without gradient; None where there is one
    )


class LossTerms(NamedTuple):
    """fp32 losses of a pack, one by one: for looking, not for training."""

    text: Tensor  # [n]
    audio: Tensor  # [m, K], 0 where nothing is learned


class StepLosses(NamedTuple):
    """Losses divided by what the step counted."""

    total: Tensor  # []
    text: Tensor  # []
    codebooks: Tensor  # [K]
    contrastive: Tensor  # []


@dataclass(frozen=True)
class LossCounts:
    """How many targets a whole step has; never 0, so that a step without one kind divides 0 by 1."""

    text: int
    audio: Tensor  # [K] int64 on the CPU
    contrastive: int

    @staticmethod
    def of(batches: list[PackedBatch], world: World = ALONE) -> LossCounts:
        """Counted from numbers the loader left on the CPU, summed over ranks."""
        local = [
            sum(len(batch.text_targets) for batch in batches),
            sum(batch.num_pairs for batch in batches),
            *torch.stack([batch.targets_per_codebook for batch in batches]).sum(dim=0).tolist(),
        ]
        text, contrastive, *audio = world.sum(torch.tensor(local)).clamp(min=1).tolist()
        return LossCounts(text, torch.tensor(audio), contrastive)


def step_losses(sums: LossSums, counts: LossCounts, section: LossSection, ramp: float) -> StepLosses:
    """The formula above, for one pack of a step; `ramp` is the contrastive weight's curriculum factor."""
    text = sums.text / counts.text
    codebooks = sums.audio / counts.audio.to(sums.audio.device, non_blocking=True)
    contrastive = sums.contrastive / counts.contrastive
    total = (
        section.text_loss_weight * text
        + section.audio_loss_weight * weighted_mean(codebooks, section.codebook_weights)
        + section.contrastive_loss_weight * ramp * contrastive
    )
    return StepLosses(total, text, codebooks, contrastive)


def weighted_mean(codebooks: Tensor, weights: list[float]) -> Tensor:
    """codebooks [K] -> []; the plain mean, to the bit, where all weights are equal."""
    if len(set(weights)) == 1:
        return codebooks.mean()
    # Weights stay numbers of the host: a tensor of them would make each step wait for its copy.
    return torch.stack([weight * codebooks[k] for k, weight in enumerate(weights)]).sum() / sum(weights)


def text_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [n, V], targets [n] int64 -> [n]; n may be 0."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def audio_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [m, K, V], targets [m, K] int64 with IGNORE in the staircases -> [m, K]; m may be 0."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=IGNORE)
    return losses.view(logits.shape[:2])


def num_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [m, K, V], targets [m, K] int64 with IGNORE in the staircases -> [K] int64: targets with the highest logit.

    Reads the logits once where they are, before they are raised to fp32: nothing of their size is made.
    """
    return (logits.detach().argmax(dim=-1) == targets).sum(dim=0)


def sums_by_set(text: Tensor, audio: Tensor, text_sets: Tensor, audio_sets: Tensor, num_sets: int) -> Tensor:
    """Losses text [n] and audio [m, K] of rows that are of these data sets [n], [m] -> [num_sets, 1 + K], without gradient."""
    found = audio.new_zeros(num_sets, 1 + audio.shape[1])
    found[:, 0].index_add_(0, text_sets, text.detach())
    found[:, 1:].index_add_(0, audio_sets, audio.detach())
    return found


def losses_of_sets(prefix: str, names: tuple[str, ...], sums: Tensor, counts: Tensor) -> dict[str, float]:
    """Metrics of data sets `names` [D] from loss sums and counts of targets, both [D, 1 + K] with text first.

    The plain mean over codebooks, as in the loss of all sets. A set without a target of a kind has no such metric.
    """
    found: dict[str, float] = {}
    for name, sums_of_one, counts_of_one in zip(names, sums.tolist(), counts.tolist(), strict=True):
        text, *audio = (loss / max(1, count) for loss, count in zip(sums_of_one, counts_of_one, strict=True))
        if counts_of_one[0]:
            found[f"{prefix}/text_loss/{name}"] = text
        if all(counts_of_one[1:]):
            found[f"{prefix}/audio_loss/{name}"] = sum(audio) / len(audio)
    return found


def contrastive_loss_sum(audio_hidden: Tensor, segments: Tensor, speakers: Tensor) -> Tensor:
    """InfoNCE between the mean hidden states of each sample's reference and target -> [].

    audio_hidden [Na, d]; segments [Na] int64: 2 s for the reference columns of sample s, 2 s + 1 for its target's;
    speakers [S] int64. A target must find its own reference among those of the other speakers in the pack; pairs of
    one speaker are no negatives. A sample without a negative adds exactly 0.
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


def curriculum_factor(step: int, curriculum_steps: int, enabled: bool) -> float:
    """Factor of the contrastive weight before `step` (from 0): half a cosine from 0.1 to 1 over `curriculum_steps`."""
    if not enabled or step >= curriculum_steps:
        return 1.0
    return RAMP_START + (1 - RAMP_START) * 0.5 * (1 - math.cos(math.pi * step / curriculum_steps))
