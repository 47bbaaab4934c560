"""Whisper log-mel of a reference, stored small and rebuilt exactly.

The extractor always sees the wave padded to 30 s; only the frames that differ from its floor are kept. `shards.mel`
rebuilds the extractor's output from them bit for bit before the float16 rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from shards.artifacts import WHISPER_FEATURES
from shards.mel import NUM_FRAMES, num_stored_frames


def stored_mel(wave: np.ndarray) -> tuple[np.ndarray, float]:
    """wave [n] float32 at 16 kHz, at most 30 s -> (frames [128, ceil(n / 160) + 2] float32, floor)."""
    features = _extractor()(wave, sampling_rate=16000, return_tensors="np")["input_features"][0]
    assert features.shape == (WHISPER_FEATURES["feature_size"], NUM_FRAMES), features.shape
    return features[:, : num_stored_frames(len(wave))], float(features[:, -1].min())


@functools.cache
def _extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(**WHISPER_FEATURES)  # pyright: ignore[reportArgumentType]
