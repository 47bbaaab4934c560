"""Every byte of a data set against its markers, shards side by side.

Threads: hashing a file leaves Python to the others, so it runs at the speed of the disk or of the cores. A damaged shard is
then read sample by sample, so that the samples are named.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shards.columns import read_columns, read_columns_file
from shards.errors import ShardError
from shards.index import read_index
from shards.manifest import Dataset, read_record
from shards.reader import verify
from shards.writer import ShardDone, shard_path
from tools.inspect_shards.opened import OpenedData

MAX_THREADS = 16  # more than a disk answers at once


def dataset_faults(data: OpenedData, on_shard: Callable[[], None]) -> list[str]:
    """All faults, in the order of the shards; `on_shard` is called as each is done."""
    dataset, record, index = data.folder, data.record, data.index
    faults = list(data.faults)
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as threads:
        for found in threads.map(lambda shard: faults_of(data, shard), record.shards):
            faults += found
            on_shard()
    if data.url:
        return faults
    if not faults and not np.array_equal(index, joined_index(dataset, record)):
        faults.append(f"{dataset}/index.npy: differs from the indexes of the shards")
    columns = read_columns(dataset, record.num_samples)
    if not faults and columns is not None:
        parts = [read_columns_file(shard_path(dataset, shard.shard, ".columns.npy")) for shard in record.shards]
        if columns.tobytes() != np.concatenate(parts).tobytes():  # bytes: NaN is not equal to itself
            faults.append(f"{dataset}/columns.npy: differs from the columns of the shards")
    return faults


def faults_of(data: OpenedData, shard: ShardDone) -> list[str]:
    if not data.url:
        return shard_faults(data.folder, shard)
    from tools.inspect_shards.remote_data import RangeReader

    return RangeReader(data.folder, data.url).faults_of(shard, data.index)


def shard_faults(dataset: Path, shard: ShardDone) -> list[str]:
    marker_path = shard_path(dataset, shard.shard, ".done.json")
    try:
        marker = read_record(marker_path, ShardDone)
    except ShardError as error:
        return [f"no done marker: {error}"]
    differs = [f"{marker_path}: differs from dataset.json"] if marker != shard else []
    return differs + list(verify(dataset, shard))


def joined_index(dataset: Path, record: Dataset) -> np.ndarray:
    return np.concatenate([read_index(shard_path(dataset, shard.shard, ".idx.npy")) for shard in record.shards])
