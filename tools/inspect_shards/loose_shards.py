"""Shards by file, glob or URL as one data set: those of `preprocess` by the index beside them, others are read once.

In: addresses of tars. Out: `OpenedData` whose folder, a temporary one, links to shards with an index, or holds a copy of the
samples of all others (a single tar, a stranger's, one behind a URL) in our own form. The price of a copy: a pass over all of it,
and its size on disk while the command runs.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from preprocess.join import dataset_record, sum_counts
from shards.columns import NAME, columns_of, columns_row, read_columns_file
from shards.errors import ShardError
from shards.index import read_index
from shards.manifest import Dataset, Fingerprints, Job, read_record
from shards.printable import first_line
from shards.reader import KEY
from shards.sample import Sample, unpack_sample, write_npy
from shards.terminal import progress_bar
from shards.writer import ShardDone, sample_key, shard_path, write_bytes, write_shard
from tools.inspect_shards.opened import OpenedData
from train.data.shard_urls import read_shards

NOT_KNOWN = Fingerprints(codec="", tokenizer="", mel=None)


def open_shards(spec: str, tars: list[str]) -> OpenedData:
    temporary = tempfile.TemporaryDirectory(prefix="inspect-shards-")
    folder = Path(temporary.name)
    markers = [marker_beside(tar) for tar in tars]
    ours = [marker for marker in markers if marker]
    if len(ours) == len(tars) and len({marker.shard for marker in ours}) == len(ours):
        of_tar = sorted(zip(ours, tars, strict=True), key=lambda pair: pair[0].shard)
        ours = [marker for marker, _ in of_tar]
        for marker, tar in of_tar:
            link_shard(folder, Path(tar), marker)
        faults, keys = [], {}
        if all(marker.columns_sha256 is not msgspec.UNSET for marker in ours):
            parts = [read_columns_file(shard_path(folder, marker.shard, ".columns.npy")) for marker in ours]
            write_bytes(folder / NAME, write_npy(np.concatenate(parts)))
        columns = None
    else:
        ours, faults, keys, columns = copy_shards(spec, tars, folder)
    index = np.concatenate([read_index(shard_path(folder, marker.shard, ".idx.npy")) for marker in ours])
    write_bytes(folder / "index.npy", write_npy(index))
    record = record_of(tars, ours, index, len(faults))
    return OpenedData(
        name=spec, folder=folder, record=record, index=index, faults=faults, keys=keys, copied_columns=columns,
        temporary=temporary,
    )  # fmt: skip


def marker_beside(tar: str) -> ShardDone | None:
    """The done marker of a shard of `preprocess` on this machine that has all of its own beside it."""
    path = Path(tar)
    stem = path.with_suffix("")
    if "://" in tar or not all(Path(f"{stem}{suffix}").is_file() for suffix in (".tar", ".idx.npy", ".done.json")):
        return None
    try:
        marker = read_record(Path(f"{stem}.done.json"), ShardDone)
        fits = len(read_index(Path(f"{stem}.idx.npy"))) == marker.num_samples
        has_columns = marker.columns_sha256 is msgspec.UNSET or Path(f"{stem}.columns.npy").is_file()
    except ShardError:
        return None  # its samples tell all of it too
    return marker if fits and has_columns and shard_path(Path(), marker.shard, ".tar").name == path.name else None


def link_shard(folder: Path, tar: Path, marker: ShardDone) -> None:
    stem = tar.absolute().with_suffix("")
    for suffix in (".tar", ".idx.npy", ".done.json", ".columns.npy", ".rejects.jsonl"):
        source = Path(f"{stem}{suffix}")
        if source.is_file():
            link = shard_path(folder, marker.shard, suffix)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)
    rejects = Path(f"{stem}.rejects.jsonl")
    if rejects.is_file():
        with (folder / "rejects.jsonl").open("ab") as file:
            file.write(rejects.read_bytes())


def copy_shards(
    spec: str, tars: list[str], folder: Path
) -> tuple[list[ShardDone], list[str], dict[str, str], np.ndarray]:
    """Every sample that can be read, packed anew: a shard for each tar. Raises ShardError where none can."""
    require_room(spec, tars, folder)
    faults: list[str] = []
    keys: dict[str, str] = {}
    rows: list[tuple] = []
    shards = []
    with progress_bar("shards without an index", len(tars)) as on_shard:
        for number, tar in sorted(zip(shard_numbers(tars), tars, strict=True)):
            samples = readable_samples(tar, number, faults, keys, rows.append)
            shards.append(write_shard(folder, number, samples, []))
            on_shard()
    if not rows:
        raise ShardError(f"{spec}: no sample in {len(tars)} shards{f': {faults[0]}' if faults else ''}")
    return shards, faults, keys, columns_of(rows)


def shard_numbers(tars: list[str]) -> list[int]:
    """As their names say where those are ours and no two are alike, else counted: keys name the number."""
    named = [Path(tar.rpartition("/")[2]).name.partition(".")[0].removeprefix("shard-") for tar in tars]
    ours = all(len(name) == 6 and name.isdigit() for name in named) and len(set(named)) == len(named)
    return [int(name) for name in named] if ours else list(range(len(tars)))


def readable_samples(
    tar: str, number: int, faults: list[str], keys: dict[str, str], on_row: Callable[[tuple], None]
) -> Iterator[Sample]:
    taken: set[str] = set()
    for raw in read_shards([tar]):
        try:
            if raw.reason:
                raise ShardError(raw.reason)
            sample = unpack_sample(raw.key, raw.members)
            row = columns_row(sample.facts)
        except (ShardError, ValueError, IndexError) as error:  # a stranger's facts may contradict themselves
            faults.append(f"{raw.shard}: {'' if raw.key == '?' else f'sample {raw.key}: '}{first_line(error)}")
            continue
        key = raw.key
        if not KEY.fullmatch(key) or int(key[:6]) != number or key in taken:
            free = (sample_key(number, place) for place in range(len(taken), 1_000_000))
            key = next(one for one in free if one not in taken)
            keys.setdefault(raw.key, key)
        taken.add(key)
        on_row(row)
        yield dataclasses.replace(sample, key=key)


def require_room(spec: str, tars: list[str], folder: Path) -> None:
    needed = sum(Path(tar).stat().st_size for tar in tars if "://" not in tar)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ShardError(
            f"{spec}: shards without an index beside them are copied to {folder.parent}: {needed / 1e9:.3g} GB, "
            f"{free / 1e9:.3g} GB are free; name fewer shards, or a folder with room in TMPDIR"
        )


def record_of(tars: list[str], shards: list[ShardDone], index: np.ndarray, num_faults: int) -> Dataset:
    config, fingerprints = made_of(tars)
    rejects = sum_counts(shard.rejects for shard in shards)
    if num_faults:
        rejects["not_readable"] = num_faults
    return dataset_record(config, fingerprints, len(index) + sum(rejects.values()), index, rejects, shards)


def made_of(tars: list[str]) -> tuple[dict[str, Any], Fingerprints]:
    """Settings and fingerprints of the one data set (or job) that all these shards lie in; else nothing is known."""
    roots = {Path(tar).absolute().parent.parent.parent for tar in tars if "://" not in tar}
    if len(roots) == 1 and all("://" not in tar for tar in tars):
        for name, kind in (("dataset.json", Dataset), ("job.json", Job)):
            try:
                record = read_record(next(iter(roots)) / name, kind)
            except ShardError:
                continue
            return record.config, record.fingerprints
    return {}, NOT_KNOWN
