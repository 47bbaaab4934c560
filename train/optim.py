"""The optimizer over LoRA parameters and the learning rate as a pure function of the step.

No scheduler object: nothing to save, nothing to get out of step after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from train.config import TrainSection

WARMUP_FRACTION = 0.03


def make_optimizer(parameters: Iterable[nn.Parameter], section: TrainSection) -> torch.optim.AdamW:
    """AdamW on fp32 masters. Build it after sharding: an optimizer built before updates tensors nobody reads."""
    return torch.optim.AdamW(
        parameters,
        lr=section.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=section.weight_decay,
        fused=True,
    )


def learning_rate_at(step: int, total_steps: int, section: TrainSection) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then cosine or linear to zero at `total_steps`, or constant."""
    warmup = round(WARMUP_FRACTION * total_steps) if section.warmup_steps == "auto" else section.warmup_steps
    if step < warmup:
        return section.learning_rate * (step + 1) / warmup
    if section.schedule == "constant":
        return section.learning_rate
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if section.schedule == "linear":
        return section.learning_rate * (1 - progress)
    return section.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
