"""The index beside each shard: one fixed-size row per sample, memory-mapped.

A row says where the sample lies (offset, size, checksum) and everything its sequence length depends on, so that epochs
are planned and samples fetched with one `pread` without touching the tars. `index.npy` of a data set is the
concatenation of its shards' rows in shard order.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from shards.errors import ShardError
from shards.npy_file import load_npy
from shards.printable import first_line

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first tar header, bytes
        ("speaker", "<u8"),  # hash64 of the speaker's name
        ("num_bytes", "<u4"),  # headers and padding included
        ("crc32", "<u4"),  # of those bytes
        ("shard", "<u4"),
        ("num_system_tokens", "<u2"),  # the row's own system text
        ("num_reference_text_tokens", "<u2"),
        ("num_target_text_tokens", "<u2"),
        ("num_as_written_tokens", "<u2"),  # all text-path positions of the as_written layout
        ("reference_frames", "<u2"),  # codec frames, 25 per second
        ("target_frames", "<u2"),
        ("mel_samples", "<u4"),  # samples at 16 kHz behind the stored mel or Whisper states, 0 without
    ]
)


def hash64(name: str) -> int:
    """64-bit number of a name (speaker, id), equal in every shard and on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def read_index(path: Path) -> np.ndarray:
    """Memory-map an index [n] of INDEX_DTYPE. Raises ShardError when it is missing or of another kind."""
    try:
        index = load_npy(path, is_mapped=True)
    except Exception as error:  # numpy has many kinds for a header that is not its own, TokenError and BadZipFile too
        raise ShardError(f"{path}: unreadable index: {first_line(error)}; run `preprocess` again to make it") from None
    if index.dtype != INDEX_DTYPE or index.ndim != 1:
        raise ShardError(f"{path}: index has other columns than this version writes; run `preprocess` again")
    return index
