"""A data set of `preprocess` behind a URL, looked at where it lies: of its tars only the samples asked for are fetched.

In: the address of its folder. Out: `OpenedData` whose folder, a temporary one, holds its small files. A server that cannot send
a part of a file sends all of it, and then it is kept.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import fsspec
import msgspec
import numpy as np

from shards.columns import NAME
from shards.errors import ShardError
from shards.printable import first_line
from shards.reader import SampleReader
from shards.writer import ShardDone, shard_path, write_bytes
from tools.inspect_shards.opened import OpenedData
from train.data.remote import RemoteShards

CHUNK = 1 << 20


def open_remote(url: str) -> OpenedData:
    temporary = tempfile.TemporaryDirectory(prefix="inspect-shards-")
    remote = RemoteShards(url, Path(temporary.name), 1 << 62)
    record, index = remote.open()
    for name in (NAME, "rejects.jsonl"):
        data = optional_file(f"{remote.url}/{name}")
        if data is not None:
            write_bytes(remote.folder / name, data)
    return OpenedData(name=url, folder=remote.folder, record=record, index=index, url=remote.url, temporary=temporary)


def optional_file(url: str) -> bytes | None:
    """None where there is none. Raises ShardError where nobody can tell."""
    try:
        files, path = fsspec.core.url_to_fs(url)
        return files.cat_file(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # every file system has errors of its own
        raise ShardError(f"{url}: not readable: {first_line(error)}") from None


class RangeReader(SampleReader):
    """Samples of a data set behind a URL, each fetched by its bytes; a server that sends whole files has them kept."""

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        self._files, self._root = fsspec.core.url_to_fs(url)

    def _bytes(self, shard: int, num_bytes: int, offset: int, where: str) -> bytes:
        copy = shard_path(self._dataset_dir, shard, ".tar")
        if copy.exists():
            return super()._bytes(shard, num_bytes, offset, where)
        remote = f"{self._root}/{shard_path(Path(), shard, '.tar')}"
        try:
            data = self._files.cat_file(remote, start=offset, end=offset + num_bytes)
        except Exception as error:
            raise ShardError(f"{remote} at byte {offset}: cannot be read: {first_line(error)}") from None
        if len(data) <= num_bytes:
            return data
        write_bytes(copy, data)
        return data[offset : offset + num_bytes]

    def faults_of(self, shard: ShardDone, index: np.ndarray) -> list[str]:
        """As `shards.reader.verify`, of one shard where it lies: every byte is read."""
        faults = []
        digests = {".tar": shard.sha256, ".idx.npy": shard.index_sha256, ".columns.npy": shard.columns_sha256}
        for suffix, expected in digests.items():
            path = f"{self._root}/{shard_path(Path(), shard.shard, suffix)}"
            if expected is msgspec.UNSET:
                continue
            digest = hashlib.sha256()
            try:
                with self._files.open(path, "rb") as file:
                    while data := file.read(CHUNK):
                        digest.update(data)
            except Exception as error:
                faults.append(f"{path}: {first_line(error)}")
                continue
            if digest.hexdigest() != expected:
                faults.append(f"{path}: sha256 {digest.hexdigest()[:16]}, the marker says {str(expected)[:16]}")
        for position, row in enumerate(index[index["shard"] == shard.shard] if faults else []):
            try:
                self.read(row)
            except ShardError as error:
                faults.append(f"sample {position} of {shard.num_samples} (key {self.key_of(row, position)}): {error}")
        return faults
