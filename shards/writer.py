"""Writes one shard: samples -> shard-NNNNNN.tar, its index and columns, its rejects, and last its done marker.

Everything is written under a temporary name, synced and renamed; only the marker makes a shard count. Nothing about
time, host or worker enters a file, so the same input gives the same bytes whoever writes it and however often.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shards.index import INDEX_DTYPE, hash64
from shards.sample import Sample, dialect_of, pack_sample, write_npy

TAR_BLOCK = 512


class Reject(msgspec.Struct, frozen=True, kw_only=True):
    """A rejected row, and why. `path` is the audio file concerned, if one is."""

    row: int
    id: str
    stage: str
    reason: str
    detail: str
    path: str | None = None


class ShardDone(msgspec.Struct, frozen=True, kw_only=True):
    """The done marker: what was written, enough to verify it and to add up the data set."""

    shard: int
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str
    rejects: dict[str, int]
    warnings: dict[str, int]
    speakers: dict[str, int]
    reference_s: float
    target_s: float
    columns_sha256: str | msgspec.UnsetType = msgspec.UNSET  # unset: made before there were columns
    dialects: dict[str, int] | msgspec.UnsetType = msgspec.UNSET  # unset: no sample says one


def shard_path(dataset_dir: Path, shard: int, suffix: str) -> Path:
    """shards/000/shard-000123.tar; two levels keep folders small on network file systems."""
    return dataset_dir / "shards" / f"{shard // 1000:03d}" / f"shard-{shard:06d}{suffix}"


def sample_key(shard: int, position: int) -> str:
    """ASCII digits only: WebDataset splits keys at dots, and other letters become PAX headers."""
    return f"{shard:06d}{position:06d}"


def write_shard(
    dataset_dir: Path,
    shard: int,
    samples: Iterable[Sample],
    rejects: list[Reject],
    columns: np.ndarray | None = None,
) -> ShardDone:
    """Write a whole shard and commit it with its marker. columns: of `shards.columns`, a row per sample."""
    tar_path = shard_path(dataset_dir, shard, ".tar")
    tar_path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(tar_path) as partial:
        index, facts = _write_tar(partial, shard, samples)
    index_path = shard_path(dataset_dir, shard, ".idx.npy")
    index_bytes = write_npy(index)
    write_bytes(index_path, index_bytes)
    columns_sha256: str | msgspec.UnsetType = msgspec.UNSET
    if columns is not None:
        columns_bytes = write_npy(columns)
        columns_sha256 = hashlib.sha256(columns_bytes).hexdigest()
        write_bytes(shard_path(dataset_dir, shard, ".columns.npy"), columns_bytes)
    if rejects:
        lines = b"".join(msgspec.json.encode(reject) + b"\n" for reject in rejects)
        write_bytes(shard_path(dataset_dir, shard, ".rejects.jsonl"), lines)
    done = ShardDone(
        shard=shard,
        num_samples=len(index),
        num_bytes=tar_path.stat().st_size,
        index_sha256=hashlib.sha256(index_bytes).hexdigest(),
        rejects=dict(sorted(Counter(reject.reason for reject in rejects).items())),
        columns_sha256=columns_sha256,
        **facts,
    )
    write_json(shard_path(dataset_dir, shard, ".done.json"), done)
    return done


def _write_tar(path: Path, shard: int, samples: Iterable[Sample]) -> tuple[np.ndarray, dict[str, Any]]:
    rows: list[tuple[int, ...]] = []
    speakers: Counter[str] = Counter()
    warnings: Counter[str] = Counter()
    dialects: Counter[str] = Counter()
    reference_s = target_s = 0.0
    with path.open("xb") as file:
        hashed = _HashingWriter(file)
        tar = tarfile.open(fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed below
        for sample in samples:
            offset = hashed.num_bytes
            hashed.crc32 = 0
            for suffix, data in pack_sample(sample):
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")
                member.size, member.mtime, member.mode = len(data), 0, 0o444
                tar.addfile(member, io.BytesIO(data))
            rows.append(_index_row(sample, shard, offset, hashed.num_bytes - offset, hashed.crc32))
            speakers[sample.facts.speaker] += 1
            warnings.update(sample.facts.warnings)
            if dialect := dialect_of({**(sample.facts.misc or {}), **sample.facts.extra}):
                dialects[dialect] += 1
            reference_s += sample.facts.reference.duration_s
            target_s += sample.facts.target.duration_s
        tar.close()
        sync(file)
    facts = {
        "sha256": hashed.sha256.hexdigest(),
        "speakers": dict(sorted(speakers.items())),
        "warnings": dict(sorted(warnings.items())),
        "dialects": dict(sorted(dialects.items())) or msgspec.UNSET,
        "reference_s": round(reference_s, 3),
        "target_s": round(target_s, 3),
    }
    return np.array(rows, dtype=INDEX_DTYPE), facts


def _index_row(sample: Sample, shard: int, offset: int, num_bytes: int, crc32: int) -> tuple[int, ...]:
    facts = sample.facts
    counts = facts.text_token_counts
    return (
        offset,
        hash64(facts.speaker),
        num_bytes,
        crc32,
        shard,
        0 if facts.system_text is None else counts[facts.system_text],
        counts[facts.reference_text],
        counts[facts.target_text],
        facts.num_as_written_tokens,
        sample.reference_codes.shape[1],
        sample.target_codes.shape[1],
        facts.mel.num_samples if facts.mel else 0,
    )


class _HashingWriter(io.RawIOBase):
    """Passes bytes on while counting and hashing them, so nothing is read back."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self.num_bytes = 0
        self.crc32 = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.num_bytes += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.sha256.update(data)
        return len(data)

    def tell(self) -> int:
        return self.num_bytes


# --- committing files -----------------------------------------------------------------------------------------------


class temporary:
    """`with temporary(final) as partial:` write `partial`; it is renamed to `final` on success, removed on failure."""

    def __init__(self, final: Path) -> None:
        self._final = final
        self._partial = final.with_name(f"{final.name}.tmp.{platform.node()}.{os.getpid()}")

    def __enter__(self) -> Path:
        self._partial.unlink(missing_ok=True)
        return self._partial

    def __exit__(self, kind: object, error: object, _: object) -> None:
        if kind is None:
            self._partial.replace(self._final)
            sync_folder(self._final.parent)
            return
        if isinstance(error, OSError):
            name_file(error, self._final)
        self._partial.unlink(missing_ok=True)


def name_file(error: OSError, path: Path) -> None:
    """A write to a full disk fails without saying where."""
    if error.filename is None:
        error.filename = str(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of a write says to which file."""
    try:
        yield
    except OSError as error:
        name_file(error, path)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically and durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path) as partial, partial.open("xb") as file:
        file.write(data)
        sync(file)


def write_json(path: Path, value: Any) -> None:
    """Indented, key order as given: read by people, diffed by tests."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Make the content of every file below `folder` durable, before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, or the content of one file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
