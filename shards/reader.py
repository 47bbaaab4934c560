"""Reads samples from shards: at random by index (`SampleReader`), and whole shards for verification (`verify`).

A sample is one `pread` of its span followed by a checksum; tars themselves protect only their headers, so a flipped
payload byte would pass unseen. Descriptors are opened per process and kept in a small least-recently-used table:
descriptors inherited over fork share their position, and one per shard would run out of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shards.errors import ShardError
from shards.index import read_index
from shards.sample import MEMBERS, Sample, decompress, read_npy, unpack_sample
from shards.writer import TAR_BLOCK, ShardDone, sample_key, shard_path

MAX_OPEN_SHARDS = 256
KEY = re.compile(r"[0-9]{12}")  # as `sample_key` makes them; a stranger's may be "../../x"


class SampleReader:
    """Random access to the samples of a data set folder."""

    def __init__(self, dataset_dir: Path) -> None:
        self._dataset_dir = dataset_dir
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def read_raw(self, row: Any) -> dict[str, Any]:
        """One index row -> {"__key__": key, suffix: bytes}, the shape WebDataset gives. Raises ShardError."""
        where = f"{shard_path(self._dataset_dir, int(row['shard']), '.tar')} at byte {int(row['offset'])}"
        data = self._bytes(int(row["shard"]), int(row["num_bytes"]), int(row["offset"]), where)
        if len(data) != row["num_bytes"]:
            raise ShardError(
                f"{where}: {len(data)} bytes left, the index says {row['num_bytes']}; the tar is cut short"
            )
        if zlib.crc32(data) != row["crc32"]:
            raise ShardError(f"{where}: checksum differs from the index; the tar is damaged (`inspect-shards verify`)")
        return split_members(data, where)

    def read(self, row: Any) -> Sample:
        members = self.read_raw(row)
        return unpack_sample(members.pop("__key__"), members)

    def key_of(self, row: Any, position: int) -> str:
        """The key of a sample that cannot be read, or was not; `position`: its index row's number among its shard's.

        Keys count the rows of a shard's list, rejected ones too, and index rows only what was kept; so the key is read
        from the sample's own tar header. Where that is damaged too, a shard without rejects still shows it, and any other
        gets a name that no sound sample has.
        """
        shard = int(row["shard"])
        key = header_key(self._header(shard, int(row["offset"])))
        if key:
            return key
        if self._num_rejects(shard) == 0:
            return sample_key(shard, position)
        return f"number {position + 1} of shard {shard:06d} (its key is not readable)"

    def _header(self, shard: int, offset: int) -> bytes:
        """The first tar header of a sample; b"" where it cannot be read."""
        try:
            return self._bytes(shard, TAR_BLOCK, offset, "")
        except ShardError:
            return b""

    def _num_rejects(self, shard: int) -> int | None:
        """Rows of a shard's list that are not in it; None where nobody knows."""
        try:
            marker = json.loads(shard_path(self._dataset_dir, shard, ".done.json").read_bytes())
            return sum(marker["rejects"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def shard_name(self, row: Any) -> str:
        """How messages name the shard of a row: its path inside the data set."""
        return str(shard_path(Path(), int(row["shard"]), ".tar"))

    def read_all(self, index: np.ndarray) -> Iterator[Sample]:
        for row in index:
            yield self.read(row)

    def _bytes(self, shard: int, num_bytes: int, offset: int, where: str) -> bytes:
        """Opened anew once: a network file system forgets descriptors when a server restarts (ESTALE)."""
        if offset >= 1 << 63:  # no file system goes further; pread would raise OverflowError
            raise ShardError(f"{where}: no tar is that large; the index is damaged")
        try:
            return os.pread(self._descriptor(shard), num_bytes, offset)
        except OSError:
            os.close(self._descriptors.pop(shard))
        try:
            return os.pread(self._descriptor(shard), num_bytes, offset)
        except OSError as error:
            raise ShardError(f"{where}: cannot be read: {error.strerror}; check the disk or its mount") from None

    def _descriptor(self, shard: int) -> int:
        if self._pid != os.getpid():  # after a fork: the parent's table is not ours
            self._descriptors, self._pid = OrderedDict(), os.getpid()
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is None:
            path = shard_path(self._dataset_dir, shard, ".tar")
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"{path}: {error.strerror}; the data set is incomplete") from None
            if len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = descriptor
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"_dataset_dir": self._dataset_dir, "_descriptors": OrderedDict(), "_pid": os.getpid()}


def split_members(data: bytes, where: str) -> dict[str, Any]:
    """The tar span of one sample -> its members. Our tars hold plain one-block USTAR headers only."""
    members: dict[str, Any] = {}
    position = 0
    while position < len(data):
        header = data[position : position + TAR_BLOCK]
        name = header[:100].rstrip(b"\0").decode("ascii", "replace")
        key, _, suffix = name.partition(".")
        try:
            size = int(header[124:135], 8)
            if size < 0:  # "-7" is a number too, and would lead back to where it stands
                raise ValueError
        except ValueError:
            raise ShardError(f"{where}: no tar header where one must be; the tar is damaged") from None
        if (
            not KEY.fullmatch(key)
            or members.setdefault("__key__", key) != key
            or suffix not in MEMBERS
            or suffix in members
        ):
            raise ShardError(f"{where}: unexpected member {name!r}")
        members[suffix] = data[position + TAR_BLOCK : position + TAR_BLOCK + size]
        position += TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK
    if not members:
        raise ShardError(f"{where}: no member of a sample there; the index is damaged")
    return members


def header_key(header: bytes) -> str:
    """The key in the first tar header of a sample; "" where the header is cut or not what was written."""
    try:
        key, _, suffix = tarfile.TarInfo.frombuf(header, "ascii", "strict").name.partition(".")
    except (tarfile.HeaderError, UnicodeDecodeError):  # the header has a checksum of its own
        return ""
    return key if suffix in MEMBERS else ""


def decode_zst(key: str, data: bytes) -> Any:
    """Handler for stock WebDataset: `WebDataset(...).decode(decode_zst)` turns `.npy.zst` members into arrays."""
    return read_npy(decompress(data)) if key.endswith(".npy.zst") else None


def verify(dataset_dir: Path, done: ShardDone) -> Iterator[str]:
    """Every fault of one shard, worst first; nothing for a sound shard."""
    tar_path = shard_path(dataset_dir, done.shard, ".tar")
    index_path = shard_path(dataset_dir, done.shard, ".idx.npy")
    columns_path = shard_path(dataset_dir, done.shard, ".columns.npy")
    if done.columns_sha256 is not msgspec.UNSET:
        try:
            found = _sha256(columns_path)
            if found != done.columns_sha256:
                yield f"{columns_path}: sha256 {found[:16]}, the marker says {done.columns_sha256[:16]}"
        except OSError as error:
            yield f"{columns_path}: {error.strerror}"
    try:
        size, digest = tar_path.stat().st_size, _sha256(tar_path)
        index = read_index(index_path)
        index_digest = _sha256(index_path)
    except OSError as error:
        yield f"{error.filename}: {error.strerror}"
        return
    except ShardError as error:
        yield str(error)
        return
    if digest == done.sha256 and index_digest == done.index_sha256 and len(index) == done.num_samples:
        return
    if size != done.num_bytes:
        yield f"{tar_path}: {size} bytes, the marker says {done.num_bytes}"
    elif digest != done.sha256:
        yield f"{tar_path}: sha256 {digest[:16]}, the marker says {done.sha256[:16]}"
    if index_digest != done.index_sha256:
        yield f"{index_path}: sha256 {index_digest[:16]}, the marker says {done.index_sha256[:16]}"
    reader = SampleReader(dataset_dir)
    for position, row in enumerate(index):
        try:
            reader.read(row)
        except ShardError as error:
            yield f"sample {position} of {done.num_samples} (key {reader.key_of(row, position)}): {error}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
