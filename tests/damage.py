"""Damage to shards, for tests."""

from __future__ import annotations

from pathlib import Path

from shards.index import read_index
from shards.writer import shard_path


def flip_payload(dataset: Path, row: int) -> None:
    """Flip a bit in the last member (the target's codes) of one sample: no header is touched."""
    found = read_index(dataset / "index.npy")[row]
    path = shard_path(dataset, int(found["shard"]), ".tar")
    data = bytearray(path.read_bytes())
    data[int(found["offset"]) + int(found["num_bytes"]) - 512] ^= 1
    path.write_bytes(data)
