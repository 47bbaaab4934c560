"""Joins finished shards into a data set: index.npy, rejects.jsonl, and last dataset.json."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np

from shards.errors import DataError, ShardError
from shards.folder_lock import hold_folder
from shards.index import read_index
from shards.manifest import Dataset, Job, digest_of, read_record
from shards.reader import verify
from shards.sample import write_npy
from shards.sequence import FRAMES_PER_SECOND
from shards.writer import Reject, ShardDone, shard_path, write_bytes, write_json

HISTOGRAM_EDGES_S = (0, 2, 5, 10, 15, 20, 30)


def pending_shards(out: Path, job: Job) -> list[int]:
    return [shard for shard in range(job.num_shards) if not shard_path(out, shard, ".done.json").is_file()]


def finalize(out: Path) -> Dataset:
    """Join what several machines made into one data set, after checking every byte of it.

    Raises ShardError naming the first missing or damaged shard, PipelineError when a task still works in OUT.
    """
    if not (out / "job.json").is_file():
        raise ShardError(f"{out}: no job.json, so no job of `preprocess`; give its OUT folder")
    with hold_folder(out):
        job = read_record(out / "job.json", Job)
        _refuse_missing(out, job)
        faults = [fault for shard in range(job.num_shards) for fault in verify(out, _marker(out, shard))]
        if faults:
            told = "; ".join(faults[:2])  # the shard, and the first sample of it that is not readable
            raise ShardError(
                f"{len(faults)} faults: {told}; remove that shard's .done.json and run its `preprocess` again"
            )
        dataset = join_dataset(out, job, job.config["preprocess"]["max_reject_fraction"])
        shutil.rmtree(out / "encoded", ignore_errors=True)
    return dataset


def _marker(out: Path, shard: int) -> ShardDone:
    return read_record(shard_path(out, shard, ".done.json"), ShardDone)


def _refuse_missing(out: Path, job: Job) -> None:
    missing = pending_shards(out, job)
    if missing:
        first = shard_path(out, missing[0], ".done.json")
        raise ShardError(f"{first}: missing, as {len(missing)} of {job.num_shards} shards; run preprocess again")


def join_dataset(out: Path, job: Job, max_reject_fraction: float) -> Dataset:
    """Write the data set's own files. Raises ShardError for a missing shard, DataError for too many rejects."""
    _refuse_missing(out, job)
    remove_partial_files(out)
    shards = [_marker(out, shard) for shard in range(job.num_shards)]
    rejects = join_rejects(out, job)
    check_rejects(out, job.input_path, job.num_rows, rejects, max_reject_fraction)
    indexes = [read_index(shard_path(out, shard, ".idx.npy")) for shard in range(job.num_shards)]
    index = np.concatenate(indexes)
    write_bytes(out / "index.npy", write_npy(index))

    text_tokens = index["num_reference_text_tokens"].sum(dtype=np.int64) + index["num_target_text_tokens"].sum(
        dtype=np.int64
    )
    dataset = Dataset(
        config=job.config,
        fingerprints=job.fingerprints,
        num_rows=job.num_rows,
        num_samples=len(index),
        num_text_tokens=int(text_tokens),
        reference_hours=round(sum(shard.reference_s for shard in shards) / 3600, 6),
        target_hours=round(sum(shard.target_s for shard in shards) / 3600, 6),
        speakers=_sum(shard.speakers for shard in shards),
        rejects=rejects,
        warnings=_sum(shard.warnings for shard in shards),
        target_seconds_histogram=histogram(index["target_frames"] / FRAMES_PER_SECOND, HISTOGRAM_EDGES_S),
        shards=shards,
        digest="",
    )
    dataset = msgspec.structs.replace(dataset, digest=digest_of(dataset))
    write_json(out / "dataset.json", dataset)
    return dataset


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
    """These and intake's rejects, in row order, into OUT/rejects.jsonl; returns counts by reason."""
    decoder = msgspec.json.Decoder(Reject)
    rejects = rejects + [decoder.decode(line) for line in (out / "job" / "rejects.jsonl").open("rb")]
    rejects.sort(key=lambda reject: reject.row)
    write_bytes(out / "rejects.jsonl", b"".join(msgspec.json.encode(reject) + b"\n" for reject in rejects))
    return dict(sorted(Counter(reject.reason for reject in rejects).items()))


def check_rejects(
    out: Path, input_path: str, num_rows: int, rejects: dict[str, int], max_reject_fraction: float
) -> None:
    """Raises DataError with the counts by reason and the first reject when there are too many."""
    total = sum(rejects.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in rejects.items())
    first = (out / "rejects.jsonl").read_bytes().splitlines()[:1]
    if total and total >= num_rows:
        raise DataError(f"no usable row in {input_path}: {reasons}; first: {_tell(first)}; see {out}/rejects.jsonl")
    if total > max_reject_fraction * num_rows:
        raise DataError(
            f"{total} of {num_rows} rows rejected, more than preprocess.max_reject_fraction = {max_reject_fraction:g}: "
            f"{reasons}; first: {_tell(first)}; see {out}/rejects.jsonl, mend the list or raise the limit"
        )


def histogram(seconds: np.ndarray, edges_s: tuple[int, ...]) -> dict[str, int]:
    """Counts per range of seconds; the last range is open."""
    counts, _ = np.histogram(seconds, bins=[*edges_s[:-1], np.inf])
    return {f"{low}-{high}": int(n) for (low, high), n in zip(itertools.pairwise(edges_s), counts, strict=True)}


def _tell(lines: list[bytes]) -> str:
    reject = msgspec.json.decode(lines[0])
    place = f" {reject['path']}" if reject["path"] else ""
    return f"row {reject['row']}{place}: {reject['detail']}"


def _sum(counts) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))
