"""The label shift: what each position must predict is what stands at the next one.

In: labels or codes in the order they are read. Out: targets of the same length, already shifted. It is done once, here,
since the most expensive bug of this field is a shift that was forgotten, or done twice; the loss shifts nothing.
"""

from __future__ import annotations

import numpy as np

from shards.delay_pattern import STREAM_EOS

IGNORE = -100  # not learned


def next_tokens(labels: np.ndarray) -> np.ndarray:
    """Targets [L] int32 of the labels [L] int32: position i must predict label i + 1, the last one nothing."""
    return np.append(labels[1:], np.int32(IGNORE))


def next_columns(codes: np.ndarray) -> np.ndarray:
    """Targets [K, A] int16 of the delayed columns of `codes` [K, T]: column j must predict column j + 1.

    Learned are the T codes and exactly one EOS per codebook. The BOS staircase and the EOS fill behind the first EOS
    are forced at generation, so they are IGNORE.
    """
    num_codebooks, num_frames = codes.shape
    targets = np.full((num_codebooks, num_frames + num_codebooks + 1), IGNORE, dtype=np.int16)
    for k in range(num_codebooks):
        targets[k, k : k + num_frames] = codes[k]
        targets[k, k + num_frames] = STREAM_EOS
    return targets
