"""Whisper features of a reference: log-mel, stored small and rebuilt exactly, or an encoder's hidden states.

The extractor always sees the wave padded to 30 s; only the frames that differ from its floor are kept. `shards.mel`
rebuilds the extractor's output from them bit for bit before the float16 rounding.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from shards.artifacts import WHISPER_FEATURES
from shards.mel import NUM_FRAMES, num_rows, num_stored_frames, rebuild_mel


def stored_mel(wave: np.ndarray) -> tuple[np.ndarray, float]:
    """wave [n] float32 at 16 kHz, at most 30 s -> (frames [128, ceil(n / 160) + 2] float32, floor)."""
    features = _extractor()(wave, sampling_rate=WHISPER_FEATURES["sampling_rate"], return_tensors="np")[
        "input_features"
    ][0]
    assert features.shape == (WHISPER_FEATURES["feature_size"], NUM_FRAMES), features.shape
    return features[:, : num_stored_frames(len(wave))], float(features[:, -1].min())


class WhisperEncoder:
    """A frozen Whisper tower on one device, for features.whisper = "encoder"."""

    def __init__(self, folder: Path, device: str) -> None:
        import torch

        from shards.encoders.whisper_tower import load_whisper_tower

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._tower = load_whisper_tower(folder, dtype, device)
        self._device = device

    def encode(self, frames: np.ndarray, floor: float, num_samples: int) -> np.ndarray:
        """Stored mel frames [128, Tm] -> hidden states [W, d] float16 at 25 Hz."""
        import torch

        from shards.encoders.whisper_tower import tower_features

        features, _ = rebuild_mel(frames, floor, num_samples)
        features_30s = torch.from_numpy(tower_features(features, num_samples)).to(self._device)
        with torch.inference_mode():
            states = self._tower(features_30s[None])[0, : num_rows(num_samples)]
        return states.half().cpu().numpy()


@functools.cache
def _extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(**WHISPER_FEATURES)  # pyright: ignore[reportArgumentType]
