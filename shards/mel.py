"""Rebuilds Whisper's 30-s features [128, 3000] from the few frames a shard stores, and counts what they become.

Every frame behind the stored ones equals one value, the floor: the maximum of the clip's log-mel minus 8, rescaled. It
is stored, not derived, because padding with 0 instead is wrong by up to 1.0 in normalised units.
"""

from __future__ import annotations

import numpy as np

NUM_FRAMES = 3000  # 30 s at 100 frames per second
SAMPLES_PER_FRAME = 160  # at 16 kHz


def num_stored_frames(num_samples: int) -> int:
    """Two frames more than the clip has: the last analysis windows still touch it."""
    return min(NUM_FRAMES, -(-num_samples // SAMPLES_PER_FRAME) + 2)


def num_positions(num_samples):
    """Positions at 50 Hz, after the tower's convolutions, that depend on a clip of `num_samples` at 16 kHz (int or array)."""
    mel_frames = -(-num_samples // SAMPLES_PER_FRAME)
    return (mel_frames - 1) // 2 + 1


def num_rows(num_samples):
    """W, rows at 25 Hz that a clip becomes in a sequence: 1.0 s gives 25, 30 s gives 750 (int or array).

    The released formula, rounding included (boson-ai/higgs-audio, HiggsAudioEncoder._get_feat_extract_output_lengths).
    """
    return (num_positions(num_samples) - 2) // 2 + 1


def rebuild_mel(frames: np.ndarray, floor: float, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored frames [128, Tm] -> (features [128, 3000] float32, mask [3000] bool of the frames that depend on the clip)."""
    features = np.full((frames.shape[0], NUM_FRAMES), floor, np.float32)
    features[:, : frames.shape[1]] = frames
    mask = np.arange(NUM_FRAMES) < -(-num_samples // SAMPLES_PER_FRAME)
    return features, mask
