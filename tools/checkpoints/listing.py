"""`checkpoints list`: one row of every checkpoint of a run.

In: RUN. Out: `Listed` rows, lowest step first. Every byte is read, since a damaged checkpoint is what one wants to see here; the
price is a second for each gigabyte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from shards.errors import CheckpointError
from shards.terminal import progress_bar
from tools.checkpoints.evaluations import Row, evaluations_of, rows_of
from train.run_folder.checkpoint_folders import best_checkpoint, complete_checkpoints, damage, read_metrics, read_step


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
        numbers = {name: value for name, value in sorted(self.metrics.items()) if isinstance(value, int | float)}
        losses = [f"{name.split('/')[-1]} {value:.4f}" for name, value in numbers.items() if "_loss" in name]
        rows = [f"{row.name}: CER {row.cer:.1%}" for row in self.evaluations if row.cer is not None]
        state = "DAMAGED" if self.faults else "complete"
        best = ["best"] if self.is_best else []
        size = f"{self.num_bytes / 1e6:.1f} MB"
        return "  ".join([f"{self.folder}  step {self.step}", size, state, *best, *losses, *rows])


def listed(run: Path) -> list[Listed]:
    """Raises CheckpointError where there is none."""
    folders = complete_checkpoints(run)
    if not folders:
        raise CheckpointError(f"{run}: no complete checkpoint here; give the RUN folder of `train`")
    best, evaluations = best_checkpoint(run), evaluations_of(run, [])
    found = []
    with progress_bar("reading", len(folders)) as done:
        for folder in folders:
            found.append(
                Listed(
                    folder=str(folder),
                    step=read_step(folder),
                    num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
                    is_best=best is not None and best.resolve() == folder.resolve(),
                    faults=damage(folder),
                    evaluations=rows_of(folder, evaluations),
                    metrics=read_metrics(folder),
                )
            )
            done()
    return found
