"""A data set behind a URL (s3, gs, hf, http, ... through fsspec), read from verified copies of whole shards.

dataset.json and index.npy come first. Then, when a window of the plan begins, its shards are fetched, and those of the next
window behind the loader's back. A copy is hashed and renamed into place only when size and sha256 are those of
dataset.json, and one of an earlier run is hashed again when it is first used. A file lock lets one process of a node
download at a time, with several connections, and the others find the files there. Beyond `max_bytes` the shards not touched
for longest go first. The surprising decision: whole shards instead of ranges, because a window needs every sample of its
shards anyway; the price is the wait for the first window.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np

from shards.errors import ConfigError, ShardError
from shards.index import INDEX_DTYPE
from shards.manifest import Dataset, open_dataset, read_dataset
from shards.npy_file import load_npy
from shards.printable import first_line
from shards.reader import SampleReader
from shards.sample import write_npy
from shards.writer import ShardDone, shard_path, write_bytes

log = logging.getLogger("train")

CONNECTIONS = 8
ATTEMPTS = 3
FIRST_PAUSE_S = 1.0  # before the second attempt; four times longer before each further one


def is_remote(location: str) -> bool:
    return "://" in location


class RemoteShards:
    """The local copies of a remote data set. One folder per digest, so two data sets never share a file."""

    def __init__(self, url: str, cache_dir: Path, max_bytes: int) -> None:
        """Fetch dataset.json and index.npy. Raises ShardError or ConfigError."""
        self.url = url.rstrip("/")
        self._max_bytes = max_bytes
        manifest = self._read("dataset.json")
        dataset = read_dataset(manifest, f"{self.url}/dataset.json")  # its digest, 64 hex digits, is recomputed there
        self.folder = cache_dir.expanduser() / dataset.digest[:32]
        self._verified: set[int] = set()  # copies that this process, or the one it came from, has hashed
        self._shards = {shard.shard: shard for shard in dataset.shards}
        self._ahead: threading.Thread | None = None
        with self._lock():
            write_bytes(self.folder / "dataset.json", manifest)
            if not self._has_index(dataset):
                index = self._read("index.npy")
                check_index(self.url, index, dataset)
                write_bytes(self.folder / "index.npy", index)

    def _has_index(self, dataset: Dataset) -> bool:
        """Whether the copy of the index is what dataset.json says; another one is fetched again."""
        path = self.folder / "index.npy"
        try:
            check_index(str(self.folder), path.read_bytes(), dataset)
        except FileNotFoundError:
            return False
        except (OSError, ShardError) as error:
            log.warning("%s; fetched again", error)
            return False
        return True

    def open(self) -> tuple[Dataset, np.ndarray]:
        return open_dataset(self.folder)

    def num_bytes(self, shards: Iterable[int]) -> int:
        return sum(self._shards[int(shard)].num_bytes for shard in shards)

    def num_rejects(self, shard: int) -> int:
        """Rows of a shard's list that are not in it."""
        return sum(self._shards[shard].rejects.values())

    def require_room(self, shards: Iterable[int], what: str) -> None:
        """Raises ConfigError when these shards cannot be held at the same time."""
        needed = self.num_bytes(shards)
        if needed > self._max_bytes:
            raise ConfigError(
                f"{what} of {self.url}: {needed / 1e9:.3g} GB must be held, train.cache_gb allows "
                f"{self._max_bytes / 1e9:.3g}; raise it or lower train.shuffle_window"
            )

    def enter(self, present: np.ndarray, following: np.ndarray) -> None:
        """Wait until the shards of a window are here; begin to fetch those of the next. Raises ShardError."""
        wanted = {int(shard) for shard in (*present, *following)}
        self.fetch(present, wanted)
        if self._ahead is None or not self._ahead.is_alive():
            self._ahead = threading.Thread(target=self._fetch_ahead, args=(following, wanted), daemon=True)
            self._ahead.start()

    def fetch(self, shards: Iterable[int], wanted: set[int] | None = None) -> None:
        """Have verified copies of these shards, keeping those in `wanted`. Raises ShardError."""
        missing = iter([int(shard) for shard in shards if not self.is_here(int(shard))])
        while group := list(itertools.islice(missing, CONNECTIONS)):
            with self._lock():  # given up between groups, so that nobody waits for a whole window
                group = [shard for shard in group if not self.is_here(shard)]  # another process was faster
                self._make_room(self.num_bytes(group), (wanted or set()) | set(group))
                with ThreadPoolExecutor(CONNECTIONS) as pool:
                    list(pool.map(self._download, group))

    def _fetch_ahead(self, shards: np.ndarray, wanted: set[int]) -> None:
        try:
            self.fetch(shards, wanted)
        except ShardError:
            return  # fetched again, and logged, when the window begins

    def is_here(self, shard: int) -> bool:
        path = shard_path(self.folder, shard, ".tar")
        try:
            if path.stat().st_size != self._shards[shard].num_bytes:
                return False
            if shard not in self._verified and (fault := difference(path, self._shards[shard])):
                log.warning("%s: %s; fetched again", path, fault)
                return False
            os.utime(path)  # the time of last use
        except FileNotFoundError:  # never fetched, or removed a moment ago
            return False
        self._verified.add(shard)
        return True

    def _download(self, shard: int) -> None:
        done = self._shards[shard]
        path = shard_path(self.folder, shard, ".tar")
        url = f"{self.url}/{shard_path(Path(), shard, '.tar')}"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.part.{os.getpid()}")
        fault = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_PAUSE_S * 4 ** (attempt - 1))
            try:
                files, remote_path = fsspec.core.url_to_fs(url)
                files.get_file(remote_path, str(partial))
                fault = difference(partial, done)
            except Exception as error:  # every file system has its own: a cut connection is no OSError in aiohttp
                fault = f"{type(error).__name__}: {error}"
            if not fault:
                partial.replace(path)
                self._verified.add(shard)
                return
            partial.unlink(missing_ok=True)
        raise ShardError(f"{url}: {fault} ({ATTEMPTS} attempts); check the network, or upload the shard again")

    def _make_room(self, num_bytes: int, wanted: set[int]) -> None:
        """Remove copies, those not used for longest first, until `num_bytes` more fit."""
        here: list[tuple[float, int, Path]] = []
        total = num_bytes
        for path in (self.folder / "shards").glob("*/shard-*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:  # removed a moment ago, by a person
                continue
            total += status.st_size
            if int(path.stem.removeprefix("shard-")) not in wanted:
                here.append((status.st_mtime, status.st_size, path))
        for _, size, path in sorted(here):
            if total <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield  # closing the file gives the lock back, and so does the death of the process

    def _read(self, name: str) -> bytes:
        url = f"{self.url}/{name}"
        try:
            files, path = fsspec.core.url_to_fs(url)
            return files.cat_file(path)
        except ImportError as error:
            raise ConfigError(f"{url}: {error}; install the extra: pip install -e '.[remote]'") from None
        except Exception as error:  # as in `_download`
            raise ShardError(
                f"{url}: not readable ({type(error).__name__}: {error}); give the address of an OUT folder of `preprocess`"
            ) from None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_ahead": None}


class CachedReader(SampleReader):
    """Reads samples from the local copies; fetches a shard again that was removed in the meantime."""

    def __init__(self, remote: RemoteShards) -> None:
        super().__init__(remote.folder)
        self._remote = remote

    def _descriptor(self, shard: int) -> int:
        if self._pid != os.getpid() or shard not in self._descriptors:
            self._remote.fetch([shard])
        return super()._descriptor(shard)

    def _header(self, shard: int, offset: int) -> bytes:
        """Only from a copy that is here: a name in a log line is not worth a shard's way through the network."""
        return super()._header(shard, offset) if self._remote.is_here(shard) else b""

    def _num_rejects(self, shard: int) -> int | None:
        return self._remote.num_rejects(shard)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_remote": self._remote}


def difference(path: Path, done: ShardDone) -> str:
    """What is wrong with a copy; "" for nothing."""
    size = path.stat().st_size
    if size != done.num_bytes:
        return f"{size} bytes, dataset.json says {done.num_bytes}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == done.sha256 else f"sha256 {digest[:16]}, dataset.json says {done.sha256[:16]}"


def check_index(url: str, data: bytes, dataset: Dataset) -> None:
    """index.npy holds the rows of the shards' own indexes, whose sha256 dataset.json knows. Raises ShardError."""
    try:
        index = load_npy(io.BytesIO(data))
    except Exception as error:  # numpy has many kinds, MemoryError for a shape of 10^12 too
        raise ShardError(f"{url}/index.npy: unreadable index: {first_line(error)}") from None
    if index.dtype != INDEX_DTYPE or index.shape != (dataset.num_samples,):
        raise ShardError(f"{url}/index.npy: {index.dtype.kind}{list(index.shape)} is not the index of dataset.json")
    start = 0
    for shard in dataset.shards:
        own = write_npy(index[start : start + shard.num_samples])
        start += shard.num_samples
        if hashlib.sha256(own).hexdigest() != shard.index_sha256:
            raise ShardError(
                f"{url}/index.npy: rows of shard {shard.shard} are not those of dataset.json; upload it again"
            )
    if start != len(index):
        raise ShardError(f"{url}/index.npy: {len(index)} rows, the shards of dataset.json have {start}")
