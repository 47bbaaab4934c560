"""Joins finished shards into a data set: index.npy, columns.npy, rejects.jsonl, and last dataset.json."""

from __future__ import annotations

import itertools
import math
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from preprocess.plan import REJECT_LIMIT, with_reject_limit
from shards.columns import NAME, read_columns_file
from shards.errors import DataError, ShardError
from shards.folder_lock import hold_folder
from shards.index import read_index
from shards.manifest import Dataset, Fingerprints, Job, digest_of, read_record
from shards.reader import verify
from shards.sample import write_npy
from shards.sequence import FRAMES_PER_SECOND
from shards.writer import Reject, ShardDone, shard_path, write_bytes, write_json

HISTOGRAM_EDGES_S = (0, 2, 5, 10, 15, 20, 30)


def pending_shards(out: Path, job: Job) -> list[int]:
    """Shards that are still to be made, among them those of which a file is gone or of a wrong size."""
    return [shard for shard in range(job.num_shards) if missing_part(out, shard)]


def missing_part(out: Path, shard: int) -> str | None:
    """What a shard lacks, by sizes alone (`finalize` reads every byte); None for one that is there."""
    if fault := _marker_fault(out, shard):
        return fault
    tar_path = shard_path(out, shard, ".tar")
    try:
        marker = _marker(out, shard)
        num_bytes = tar_path.stat().st_size
        num_samples = len(read_index(shard_path(out, shard, ".idx.npy")))
    except (OSError, ShardError) as error:
        return f"{tar_path}: {error.strerror}" if isinstance(error, OSError) else str(error)
    if num_bytes != marker.num_bytes:
        return f"{tar_path}: {num_bytes} bytes, its marker says {marker.num_bytes}"
    if num_samples != marker.num_samples:
        return f"{shard_path(out, shard, '.idx.npy')}: {num_samples} samples, its marker says {marker.num_samples}"
    columns_path = shard_path(out, shard, ".columns.npy")
    if marker.columns_sha256 is not msgspec.UNSET:
        try:
            num_rows = len(read_columns_file(columns_path))
        except ShardError as error:
            return str(error)
        if num_rows != marker.num_samples:
            return f"{columns_path}: {num_rows} samples, its marker says {marker.num_samples}"
    if marker.rejects and not shard_path(out, shard, ".rejects.jsonl").is_file():
        return f"{shard_path(out, shard, '.rejects.jsonl')}: missing"
    return None


def _marker_fault(out: Path, shard: int) -> str | None:
    path = shard_path(out, shard, ".done.json")
    if not path.is_file():
        return f"{path}: missing"
    try:
        _marker(out, shard)
    except ShardError as error:
        return str(error)
    return None


def finalize(out: Path, max_reject_fraction: float | None = None) -> Dataset:
    """Join what several machines made into one data set, after checking every byte of it.

    `max_reject_fraction` takes the place of the job's own. Raises ShardError naming the first missing or damaged shard,
    DataError for too many rejects, PipelineError when a task still works in OUT.
    """
    if not (out / "job.json").is_file():
        raise ShardError(f"{out}: no job.json, so no job of `preprocess`; give its OUT folder")
    with hold_folder(out):
        job = read_record(out / "job.json", Job)
        if max_reject_fraction is not None:
            job = with_reject_limit(job, max_reject_fraction)
        _refuse_missing(out, job, _marker_fault)
        faults = [fault for shard in range(job.num_shards) for fault in verify(out, _marker(out, shard))]
        if faults:
            first = "; ".join(faults[:2])  # the shard, and the first sample of it that is not readable
            again = "the same `preprocess` command makes that shard again"
            if not pending_shards(out, job):  # the sizes are right: only without its marker does `preprocess` make it
                again = f"remove its .done.json, then {again}"
            raise ShardError(f"{len(faults)} faults: {first}; {again}")
        dataset = join_dataset(out, job)
        shutil.rmtree(out / "encoded", ignore_errors=True)
    return dataset


def _marker(out: Path, shard: int) -> ShardDone:
    return read_record(shard_path(out, shard, ".done.json"), ShardDone)


def _refuse_missing(out: Path, job: Job, fault_of: Callable[[Path, int], str | None] = missing_part) -> None:
    missing = [shard for shard in range(job.num_shards) if fault_of(out, shard)]
    if missing:
        fault = fault_of(out, missing[0])
        raise ShardError(
            f"{fault}, as {len(missing)} of {job.num_shards} shards; the same `preprocess` command makes what is missing"
        )


def join_dataset(out: Path, job: Job) -> Dataset:
    """Write the data set's own files. Raises ShardError for a missing shard, DataError for too many rejects."""
    _refuse_missing(out, job)
    remove_partial_files(out)
    shards = [_marker(out, shard) for shard in range(job.num_shards)]
    rejects = join_rejects(out, job)
    limit = job.config["preprocess"]["max_reject_fraction"]
    next_step = f"or accept these: preprocess finalize {shlex.quote(str(out))} --max-reject-fraction "
    check_rejects(out, job.input_path, job.num_rows, rejects, limit, next_step)
    if read_record(out / "job.json", Job) != job:
        write_json(out / "job.json", job)  # with the limit that was kept
    indexes = [read_index(shard_path(out, shard, ".idx.npy")) for shard in range(job.num_shards)]
    index = np.concatenate(indexes)
    write_bytes(out / "index.npy", write_npy(index))
    join_columns(out, shards)

    dataset = dataset_record(job.config, job.fingerprints, job.num_rows, index, rejects, shards)
    write_json(out / "dataset.json", dataset)
    return dataset


def dataset_record(
    config: dict[str, Any],
    fingerprints: Fingerprints,
    num_rows: int,
    index: np.ndarray,
    rejects: dict[str, int],
    shards: list[ShardDone],
) -> Dataset:
    """What dataset.json says of finished shards and their joined index [n], its digest included."""
    text_tokens = index["num_reference_text_tokens"].sum(dtype=np.int64) + index["num_target_text_tokens"].sum(
        dtype=np.int64
    )
    dataset = Dataset(
        config=config,
        fingerprints=fingerprints,
        num_rows=num_rows,
        num_samples=len(index),
        num_text_tokens=int(text_tokens),
        reference_hours=round(sum(shard.reference_s for shard in shards) / 3600, 6),
        target_hours=round(sum(shard.target_s for shard in shards) / 3600, 6),
        speakers=sum_counts(shard.speakers for shard in shards),
        rejects=rejects,
        warnings=sum_counts(shard.warnings for shard in shards),
        target_seconds_histogram=histogram(index["target_frames"] / FRAMES_PER_SECOND, HISTOGRAM_EDGES_S),
        shards=shards,
        digest="",
        dialects=sum_counts(shard.dialects for shard in shards if shard.dialects is not msgspec.UNSET) or msgspec.UNSET,
    )
    return msgspec.structs.replace(dataset, digest=digest_of(dataset))


def join_columns(out: Path, shards: list[ShardDone]) -> None:
    """columns.npy, where all shards have columns: a job that an older version began may have shards without."""
    (out / NAME).unlink(missing_ok=True)
    if shards and all(shard.columns_sha256 is not msgspec.UNSET for shard in shards):
        parts = [read_columns_file(shard_path(out, shard.shard, ".columns.npy")) for shard in shards]
        write_bytes(out / NAME, write_npy(np.concatenate(parts)))


def remove_partial_files(out: Path) -> None:
    """Delete what killed workers left half written; every shard has its marker by now, so nobody is writing one."""
    shutil.rmtree(out / "job.planning", ignore_errors=True)
    for partial in (out / "shards").glob("*/*.tmp.*"):
        partial.unlink(missing_ok=True)


def join_rejects(out: Path, job: Job) -> dict[str, int]:
    """All rejects of the shards into OUT/rejects.jsonl; returns counts by reason."""
    paths = [shard_path(out, shard, ".rejects.jsonl") for shard in range(job.num_shards)]
    decoder = msgspec.json.Decoder(Reject)
    return write_rejects(out, [decoder.decode(line) for path in paths if path.is_file() for line in path.open("rb")])


def write_rejects(out: Path, rejects: list[Reject]) -> dict[str, int]:
    """These and ingest's rejects, in row order, into OUT/rejects.jsonl; returns counts by reason."""
    decoder = msgspec.json.Decoder(Reject)
    rejects = rejects + [decoder.decode(line) for line in (out / "job" / "rejects.jsonl").open("rb")]
    rejects.sort(key=lambda reject: reject.row)
    write_bytes(out / "rejects.jsonl", b"".join(msgspec.json.encode(reject) + b"\n" for reject in rejects))
    return dict(sorted(Counter(reject.reason for reject in rejects).items()))


def check_rejects(
    out: Path, input_path: str, num_rows: int, rejects: dict[str, int], max_reject_fraction: float, next_step: str
) -> None:
    """Raises DataError with the counts by reason and the first reject when there are too many.

    `next_step` is what may be done instead of correcting the list, up to the limit that would do.
    """
    total = sum(rejects.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in rejects.items())
    first = (out / "rejects.jsonl").read_bytes().splitlines()[:1]
    message = f"{reasons}; first: {_described(first)}; see {out}/rejects.jsonl" if first else reasons
    again = f"fix {input_path} and run the same command again (what was encoded is reused)"
    if total and total >= num_rows:
        raise DataError(f"no usable row in {input_path}: {message}; {again}")
    if total > max_reject_fraction * num_rows:
        enough = min(1.0, math.ceil(1000 * total / num_rows) / 1000)
        raise DataError(
            f"{total} of {num_rows} rows rejected, more than {REJECT_LIMIT} = {max_reject_fraction:g}: {message}; {again}, "
            f"{next_step}{enough:g}"
        )


def histogram(seconds: np.ndarray, edges_s: tuple[int, ...]) -> dict[str, int]:
    """Counts per range of seconds; the last range is open."""
    counts, _ = np.histogram(seconds, bins=[*edges_s[:-1], np.inf])
    return {f"{low}-{high}": int(n) for (low, high), n in zip(itertools.pairwise(edges_s), counts, strict=True)}


def _described(lines: list[bytes]) -> str:
    reject = msgspec.json.decode(lines[0])
    place = f" {reject['path']}" if reject["path"] else ""
    return f"row {reject['row']}{place}: {reject['detail']}"


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))
