"""The plan of a job: which rows go into which shard, fixed before the first shard is made.

    OUT/job/rows.jsonl     the rows with the right form, one per line
    OUT/job/offsets.npy    [n + 1] byte offset of each line
    OUT/job/order.npy      [n] the seeded shuffle; shard k holds the lines order[k * size : (k + 1) * size]
    OUT/job/rejects.jsonl  rows without the right form
    OUT/job.json           last: from here on the job can be continued

Another configuration, list, codec or tokenizer on the same OUT is another job and is refused. Two things may change: the
limit of rejects, and the list of a job that ended with too many of them.
"""

from __future__ import annotations

import gc
import hashlib
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from preprocess.config import PreprocessConfig, deciding_keys
from preprocess.job_folder import is_half_removed, refuse_foreign_folder, remove_job
from preprocess.reasons import reject
from preprocess.sources import SourceRow, has_own_id, read_rows
from shards.errors import DataError
from shards.folder_lock import hold_folder
from shards.index import hash64
from shards.manifest import Fingerprints, Job, read_record
from shards.npy_file import load_npy
from shards.printable import redact
from shards.sample import write_npy
from shards.terminal import print_line
from shards.writer import Reject, sync, temporary, write_bytes, write_json

REJECT_LIMIT = "preprocess.max_reject_fraction"
MAX_PLANNING_S = 24 * 3600.0  # a list of 100 million rows takes an hour or two


class Request(msgspec.Struct, frozen=True):
    """What the command line asks for."""

    data: Path
    out: Path
    limit: int | None = None
    new_job: bool = False
    device: str = "cpu"  # of the codec
    engine: str = "local"
    ray_address: str | None = None
    task_index: int = 0  # this machine's share: shards task_index, task_index + num_tasks, ...
    num_tasks: int = 1


class JobIdentity(msgspec.Struct, frozen=True):
    """What makes two jobs the same one."""

    config: dict[str, Any]
    fingerprints: Fingerprints
    input_sha256: str

    def settings(self) -> dict[str, Any]:
        """What must be the same, by its name; the reject limit decides whether a job succeeds, not what it makes."""
        config = {name: value for name, value in _flat(self.config).items() if name != REJECT_LIMIT}
        return {**config, **_flat(msgspec.to_builtins(self.fingerprints)), "input": self.input_sha256}

    def digest(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self.settings(), order="sorted")).hexdigest()


def identify_job(request: Request, config: PreprocessConfig, fingerprints: Fingerprints) -> JobIdentity:
    return JobIdentity({**deciding_keys(config), "limit": request.limit}, fingerprints, _file_sha256(request.data))


@contextmanager
def hold_out(request: Request, identity: JobIdentity | None) -> Iterator[None]:
    """OUT is ours alone; the tasks of one array (`identity`) share it. Raises PipelineError naming who else holds it."""
    out = request.out
    if not (out / "job.json").is_file() and not is_half_removed(out):
        refuse_foreign_folder(out)  # before a lock file is written there
    task = f"task {request.task_index} of {request.num_tasks}"
    shared = (identity.digest(), task) if identity and request.num_tasks > 1 else (None, None)
    with hold_folder(out, *shared):
        yield


def plan_job(request: Request, config: PreprocessConfig, identity: JobIdentity) -> Job:
    """Begin a job or recognise the one that stands in OUT. Raises DataError when they differ.

    Of an array, the first task plans and the others wait for it: the list is read once.
    """
    if request.num_tasks == 1:
        return _plan_job(request, config, identity)
    with hold_folder(request.out / "job.planning", wait_s=MAX_PLANNING_S):
        return _plan_job(request, config, identity)


def _plan_job(request: Request, config: PreprocessConfig, identity: JobIdentity) -> Job:
    out = request.out
    standing = read_record(out / "job.json", Job) if (out / "job.json").is_file() else None
    if standing and not _starts_over(request, standing, identity):
        _refuse_other_job(out, standing, identity)
        return with_reject_limit(standing, config.preprocess.max_reject_fraction)
    if standing or is_half_removed(out):
        remove_job(out)
    refuse_foreign_folder(out)
    size = config.preprocess.samples_per_shard
    num_rows, num_valid = ingest(request, config.preprocess.seed)
    if _file_sha256(request.data) != identity.input_sha256:
        raise _changed(request.data)
    job = Job(
        config=identity.config,
        fingerprints=identity.fingerprints,
        input_sha256=identity.input_sha256,
        input_path=redact(str(request.data)),
        num_rows=num_rows,
        num_shards=-(-num_valid // size),
        rows_per_shard=size,
    )
    write_json(out / "job.json", job)
    (out / "job.removed.json").unlink(missing_ok=True)
    return job


def _starts_over(request: Request, standing: Job, identity: JobIdentity) -> bool:
    """Whether the job that stands in OUT gives way: for --new-job, or for the corrected list of one that was refused.

    In an array a sister task may have begun this very job: it is continued, because its shards would be the same.
    """
    wanted, found = identity.settings(), _identity_of(standing).settings()
    differing = {name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)}
    if request.new_job:
        if request.num_tasks > 1 and not differing:
            print_line(f"{request.out}: holds this very job already; --new-job continues it")
            return False
        return True
    # rejects.jsonl is written when all shards are made, dataset.json when their rejects were within the limit.
    was_refused = (request.out / "rejects.jsonl").is_file() and not (request.out / "dataset.json").is_file()
    if was_refused and differing == {"input"}:
        print_line(
            f"{request.out}: another list than the one that had too many rejects: a new plan, "
            "and what was encoded is reused",
        )
        return True
    return False


def with_reject_limit(job: Job, max_reject_fraction: float) -> Job:
    """The job as it would be with this limit from the start; `join_dataset` writes it when the limit is kept."""
    preprocess = {**job.config["preprocess"], "max_reject_fraction": max_reject_fraction}
    return msgspec.structs.replace(job, config={**job.config, "preprocess": preprocess})


def _identity_of(job: Job) -> JobIdentity:
    return JobIdentity(job.config, job.fingerprints, job.input_sha256)


class JobRows:
    """Random access to the rows of a planned job."""

    def __init__(self, out: Path, rows_per_shard: int) -> None:
        self._rows_per_shard = rows_per_shard
        self._offsets = load_npy(out / "job" / "offsets.npy", is_mapped=True)
        self._order = load_npy(out / "job" / "order.npy", is_mapped=True)
        self._file = (out / "job" / "rows.jsonl").open("rb")
        self._decoder = msgspec.json.Decoder(SourceRow)

    def of_shard(self, shard: int) -> Iterator[SourceRow]:
        start = shard * self._rows_per_shard
        for line in self._order[start : start + self._rows_per_shard]:
            begin, end = int(self._offsets[line]), int(self._offsets[line + 1])
            yield self._decoder.decode(os.pread(self._file.fileno(), end - begin, begin))


def ingest(request: Request, seed: int) -> tuple[int, int]:
    """Read the list once, in constant memory, and write job/. Returns rows read and rows that go into shards."""
    state = _state_of(request.data)
    folder = request.out / "job"
    folder.mkdir(parents=True, exist_ok=True)
    offsets, ids, row_numbers = array("Q", [0]), array("Q"), array("Q")
    num_rows = 0
    encoder = msgspec.json.Encoder()
    with (
        _without_garbage_collector(),
        temporary(folder / "rows.jsonl") as partial_rows,
        temporary(folder / "rejects.jsonl") as partial_rejects,
        partial_rows.open("xb") as rows,
        partial_rejects.open("xb") as rejects,
    ):
        for item in read_rows(request.data):
            if request.limit is not None and num_rows == request.limit:
                break
            num_rows += 1
            if isinstance(item, Reject):
                rejects.write(encoder.encode(item) + b"\n")
                continue
            offsets.append(offsets[-1] + rows.write(encoder.encode(item) + b"\n"))
            # A row without an id of its own is named by its number, which no other row has.
            ids.append(hash64(item.id) if has_own_id(item.extra) else item.row)
            row_numbers.append(item.row)
        sync(rows)
        duplicates = _duplicates(np.frombuffer(ids, np.uint64))
        with partial_rows.open("rb") as written:
            for line, first in duplicates:
                written.seek(offsets[line])
                row = msgspec.json.decode(written.readline(), type=SourceRow)
                detail = f"same id as row {row_numbers[first]}"
                duplicate = reject(row.row, row.id, "ingest", "duplicate_id", detail)
                rejects.write(encoder.encode(duplicate) + b"\n")
        sync(rejects)
    if _state_of(request.data) != state:
        raise _changed(request.data)
    write_array(folder / "offsets.npy", np.frombuffer(offsets, np.uint64))
    lines = np.delete(np.arange(len(ids)), [line for line, _ in duplicates])
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(lines)
    write_array(folder / "order.npy", order)
    return num_rows, len(order)


@contextmanager
def _without_garbage_collector() -> Iterator[None]:
    """Rows are trees without cycles; looking for cycles among them costs 10 % of the ingest's time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _duplicates(ids: np.ndarray) -> list[tuple[int, int]]:
    """(line, first line with the same id) of every repeated id [n] uint64."""
    _, first, inverse, counts = np.unique(ids, return_index=True, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero((counts[inverse] > 1) & (first[inverse] != np.arange(len(ids))))
    return [(int(line), int(first[inverse[line]])) for line in repeated]


def _refuse_other_job(out: Path, job: Job, identity: JobIdentity) -> None:
    before, after = _identity_of(job).settings(), identity.settings()
    names = sorted(before.keys() | after.keys())
    differing = [
        f"{name} was {_short(before.get(name))}, is {_short(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]
    if differing:
        raise DataError(
            f"{out}: holds another job: {'; '.join(differing)}; give another OUT, or --new-job to delete it and start over "
            "(what it encoded of the same audio is reused until a job has succeeded)"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)


def write_array(path: Path, array: np.ndarray) -> None:
    write_bytes(path, write_npy(array))


def _state_of(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _changed(path: Path) -> DataError:
    return DataError(f"{path}: changed while it was read; run the same command again when nothing writes it any more")


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
