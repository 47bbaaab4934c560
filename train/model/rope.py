"""Rotary positions: each head's query and key turned by the angle of its position in the sentence.

In: positions of rows. Out: cos and sin that `rotate` applies. The frequencies are no buffer of the model, since `to_empty`
would leave it uninitialised; they are computed on first use and kept per device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shards.errors import CheckpointError
from train.model.config import ROPE_TYPES, ModelConfig


class Rope:
    """cos and sin for any positions; the frequencies are made once per device."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._frequencies: Tensor | None = None

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [R] int64 -> cos and sin [R, 1, E]."""
        if self._frequencies is None or self._frequencies.device != positions.device:
            self._frequencies = rope_frequencies(self._config).to(positions.device)
        angles = torch.outer(positions.float(), self._frequencies)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Inverse frequencies [E / 2] float32 of Llama 3's rotary embedding; "default": unscaled, "linear": all slowed alike.

    Llama 3 scaling: wavelengths longer than original / low_freq_factor are slowed by `factor`, shorter than
    original / high_freq_factor are kept, and those between are interpolated (meta-llama/llama-models, apply_scaling).
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    if config.rope_type == "default":
        return frequencies
    if config.rope_type == "linear":
        return frequencies / config.rope_factor
    if config.rope_type != "llama3":
        raise CheckpointError(f"rope_type {config.rope_type!r} is not known; expected one of {', '.join(ROPE_TYPES)}")
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
