"""`checkpoints list`: one row of every checkpoint of a run.

In: RUN. Out: `Listed` rows, lowest step first. Every byte is read, since a damaged checkpoint is what one wants to see here; the
price is a second for each gigabyte.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

from shards.errors import CheckpointError
from shards.terminal import progress_bar
from tools.checkpoints.evaluations import Evaluations, Row, evaluations_of, rows_of
from tools.checkpoints.sound import faults_of, say_if_written
from train.run_folder.checkpoint_folders import best_checkpoint, complete_checkpoints, read_metrics, read_step

log = logging.getLogger("checkpoints")
KINDS = (("held out", "eval/"), ("training", "loss/"))  # of losses, by the prefix of their names


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint."""

    folder: str
    step: int
    num_bytes: int
    is_best: bool
    faults: list[str]  # what differs from what was written; empty for a sound one
    evaluations: list[Row]
    metrics: dict[str, Any]  # the last ones logged before it

    def in_words(self) -> str:
        losses = [part for kind, prefix in KINDS for part in in_one_phrase(kind, prefix, self.metrics)]
        rows = [f"{row.name}: CER {row.cer:.1%}" for row in self.evaluations if row.cer is not None]
        state = "DAMAGED" if self.faults else "complete"
        best = ["best"] if self.is_best else []
        size = f"{self.num_bytes / 1e6:.1f} MB"
        return "  ".join([f"{self.folder}  step {self.step}", size, state, *best, *losses, *rows])


def in_one_phrase(kind: str, prefix: str, metrics: dict[str, Any]) -> list[str]:
    """ "held out: audio 3.2, text 0.1": of the losses under one prefix; none without them."""
    losses = [
        f"{name.removeprefix(prefix).removesuffix('_loss')} {value:.4f}"
        for name, value in sorted(metrics.items())
        if name.startswith(prefix) and name.endswith("_loss") and isinstance(value, int | float)
    ]
    return [f"{kind}: {', '.join(losses)}"] if losses else []


def listed(run: Path) -> list[Listed]:
    """Raises CheckpointError where there is none. One that its run removes meanwhile is left out."""
    say_if_written(run)
    folders = complete_checkpoints(run)
    if not folders:
        raise CheckpointError(f"{run}: no complete checkpoint here; give the RUN folder of `train`")
    best, evaluations = best_checkpoint(run), evaluations_of(run, [])
    found = []
    with progress_bar("reading", len(folders)) as done:
        for folder in folders:
            try:
                found.append(row_of(folder, best, evaluations))
            except (CheckpointError, OSError):
                if folder.is_dir():
                    raise
                log.warning("%s: removed by its run while it was read: left out", folder)
            done()
    return found


def row_of(folder: Path, best: Path | None, evaluations: Evaluations) -> Listed:
    return Listed(
        folder=str(folder),
        step=read_step(folder),
        num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        is_best=best is not None and best.resolve() == folder.resolve(),
        faults=faults_of(folder),
        evaluations=rows_of(folder, evaluations),
        metrics=read_metrics(folder),
    )
