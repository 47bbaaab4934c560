"""What DATA of `inspect-shards` names, as one data set: a folder of `preprocess`, its URL, or shards by file, glob and URL.

In: DATA as the user wrote it. Out: record, index, and a reader of samples; `remote_data` and `loose_shards` make the same of
what is no folder of `preprocess` on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.columns import read_columns
from shards.manifest import Dataset, folder_of, open_dataset
from shards.reader import SampleReader

PACKED_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PATTERN = "*?[{"


@dataclass(frozen=True, kw_only=True)
class OpenedData:
    """`folder` holds what a data set's folder holds; the tars of one behind a URL are asked for by its reader alone."""

    name: str  # as it was given
    folder: Path
    record: Dataset
    index: np.ndarray
    url: str = ""  # of a data set that is not on this machine
    faults: list[str] = field(default_factory=list)  # what of shards without an index could not be read
    keys: dict[str, str] = field(default_factory=dict)  # of samples with other keys than ours: their own -> ours
    copied_columns: np.ndarray | None = None  # [n] of COLUMNS_DTYPE, of shards that were read once
    temporary: Any = None  # the folder's owner, where it goes with this object

    def columns(self) -> np.ndarray | None:
        """[n] of COLUMNS_DTYPE; None for a data set without. Raises ShardError for damaged ones."""
        if self.copied_columns is not None:
            return self.copied_columns
        return read_columns(self.folder, self.record.num_samples)

    def reader(self) -> SampleReader:
        if self.url:
            from tools.inspect_shards.remote_data import RangeReader

            return RangeReader(self.folder, self.url)
        return SampleReader(self.folder)


def open_data(spec: str) -> OpenedData:
    """Raises ShardError or ConfigError naming what is wrong with DATA."""
    path = Path(spec)
    tars = shards_named(spec, path)
    if tars is not None:
        from tools.inspect_shards.loose_shards import open_shards

        return open_shards(spec, tars)
    if "://" in spec:
        from tools.inspect_shards.remote_data import open_remote

        return open_remote(spec)
    record, index = open_dataset(path)
    return OpenedData(name=spec, folder=folder_of(path), record=record, index=index)


def shards_named(spec: str, path: Path) -> list[str] | None:
    """Addresses of the tars, where DATA is shards; None for a data set and for what is neither. Raises ConfigError."""
    if path.is_dir():
        if (path / "dataset.json").exists() or (path / "job.json").exists():
            return None
        return sorted(str(tar) for suffix in PACKED_TARS for tar in path.rglob(f"*{suffix}")) or None
    if path.exists():
        return [spec] if spec.endswith(PACKED_TARS) else None
    if "::" in spec or spec.endswith((*PACKED_TARS, "/")) or any(letter in spec for letter in PATTERN):
        from train.data.shard_urls import shard_urls

        return shard_urls(spec)
    return None
