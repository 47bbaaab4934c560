"""OUT as a folder: whether it may be written to, and what of a job is removed from it for the next one.

In: OUT. Out: nothing, or DataError where something else stands there. The surprising rule: encodings stay, because the next job
of the same audio would only make them again, until one has succeeded.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from shards.errors import DataError
from shards.folder_lock import PREFIX as LOCK_PREFIX
from shards.manifest import Job, read_record


def refuse_foreign_folder(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; OUT must be a folder")
    # Of --validate-only, or of a job whose planning was killed.
    ours = (LOCK_PREFIX, "job", "report.json", "rejects.jsonl")
    if is_half_removed(out):
        ours = (*ours, "encoded")
    foreign = sorted(path.name for path in out.iterdir() if not path.name.startswith(ours))
    if foreign:
        raise DataError(
            f"{out}: not empty ({', '.join(foreign[:3])} ...) and no job of ours; give an empty or new folder"
        )


def remove_job(out: Path) -> None:
    """Remove what a job writes but for its encodings, and only where a job stands: OUT may have a `shards` of its own.

    job.json is first renamed, and that file stays until the next plan stands: a kill in between leaves no half-believable
    job, and OUT is still known as ours.
    """
    removed = out / "job.removed.json"
    if (out / "job.json").is_file():
        read_record(out / "job.json", Job)  # somebody else's job.json is no licence to delete
        (out / "job.json").replace(removed)
    if not removed.is_file():
        return
    for name in ("dataset.json", "index.npy", "columns.npy", "rejects.jsonl", "report.json"):
        (out / name).unlink(missing_ok=True)
    for name in ("shards", "job"):
        if (out / name).exists():
            shutil.rmtree(out / name)  # what cannot be deleted is an error, not left under the next job


def is_half_removed(out: Path) -> bool:
    """A --new-job was killed between taking the old job away and planning the new one."""
    return (out / "job.removed.json").is_file()
