"""The delay pattern of the audio codes: raw codes to the columns that the model reads and says, and back.

In: codes [K, T]. Out: columns [K, A], A = T + K + 1, in which codebook k runs k frames behind the first, so that a frame's
codebooks are said one after the other. The markers at both ends are values above the codes; the price is that a column
must never be decoded as it is.
"""

from __future__ import annotations

import numpy as np

NUM_CODEBOOKS = 8
CODEBOOK_SIZE = 1024  # codes; the model's vocabulary per codebook adds the two markers below
STREAM_BOS = 1024
STREAM_EOS = 1025
NUM_MARKER_COLUMNS = NUM_CODEBOOKS + 1  # one BOS, one EOS and K - 1 of delay: A = T + 9


def delay(codes: np.ndarray) -> np.ndarray:
    """Raw codes [K, T] -> delayed columns [K, T + K + 1] int16.

    Codebook k is shifted right by k: k + 1 BOS, then the codes, then EOS to the end, so that one column holds frame
    t - k of codebook k. For K = 2, T = 3: `B 1 2 3 E E` / `B B 11 12 13 E`.
    """
    num_codebooks, num_frames = codes.shape
    columns = np.full((num_codebooks, num_frames + num_codebooks + 1), STREAM_EOS, dtype=np.int16)
    for k in range(num_codebooks):
        columns[k, : k + 1] = STREAM_BOS
        columns[k, k + 1 : k + 1 + num_frames] = codes[k]
    return columns


def undelay(columns: np.ndarray) -> np.ndarray:
    """Delayed columns [K, A] -> raw codes [K, T] uint16 of the frames that are complete in every codebook.

    Markers are cut away, never clipped to 1023: a clipped EOS is audible as a click or a breath at the end.
    """
    num_codebooks, num_columns = columns.shape
    rows = [columns[k, k + 1 : num_columns - (num_codebooks - 1 - k)] for k in range(num_codebooks)]
    frames = np.stack(rows)  # [K, A - K]; a frame with a marker in any codebook is not audio
    is_marker = (frames >= CODEBOOK_SIZE).any(axis=0)
    end = int(np.argmax(is_marker)) if is_marker.any() else frames.shape[1]
    return frames[:, :end].astype(np.uint16)
