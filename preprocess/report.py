"""What stage one shows: a bar on a terminal, a plain line now and then elsewhere, and a closing table."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from shards.manifest import Dataset

PLAIN_LINE_EVERY_S = 10.0


class Progress:
    """Shards done, audio per hour, rejects, time left."""

    def __init__(self, num_shards: int, already_done: int) -> None:
        self._num_shards = num_shards
        self._done = already_done
        self._new = 0
        self._audio_s = 0.0
        self._samples = self._rejects = self.num_encoded = self.num_reused = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = RichProgress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("starting workers", total=num_shards, completed=already_done)

    def add(self, result: Any) -> None:
        """result: a `shard_task.TaskResult`."""
        self._done += 1
        self._new += 1
        self._samples += result.done.num_samples
        self._rejects += sum(result.done.rejects.values())
        self._audio_s += result.done.reference_s + result.done.target_s
        self.num_encoded += result.num_encoded
        self.num_reused += result.num_reused
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=self._line())
        elif time.monotonic() - self._last_line > PLAIN_LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(f"shards {self._done}/{self._num_shards} | {self._line()} | ETA {self._eta()}", file=sys.stderr)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def audio_hours_per_hour(self) -> float:
        return self._audio_s / max(1e-9, time.monotonic() - self._start)

    def _line(self) -> str:
        rate = self._samples / max(1e-9, time.monotonic() - self._start)
        return f"{rate:.1f} samples/s | {self.audio_hours_per_hour():.0f} audio-hours/h | rejects {self._rejects}"

    def _eta(self) -> str:
        left = (self._num_shards - self._done) * (time.monotonic() - self._start) / max(1, self._new)
        return f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"


def print_summary(dataset: Dataset, out: Path, progress: Progress, elapsed_s: float) -> None:
    """The closing table, on stderr: stdout belongs to --json."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    encoded = f"{progress.num_encoded} distinct files, {progress.num_reused} uses of one already encoded"
    rows = [
        ("samples", f"{dataset.num_samples} of {dataset.num_rows} rows, in {len(dataset.shards)} shards"),
        ("audio", f"{dataset.target_hours:.3f} h of targets, {dataset.reference_hours:.3f} h of references"),
        ("speakers", str(len(dataset.speakers))),
        (
            "encoded",
            encoded if progress.num_encoded + progress.num_reused else "nothing: all shards were there already",
        ),
        ("speed", f"{progress.audio_hours_per_hour():.0f} audio-hours per hour, {elapsed_s:.1f} s in all"),
        ("rejects", _counts(dataset.rejects) or "none"),
        ("warnings", _counts(dataset.warnings) or "none"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    console = Console(stderr=True, soft_wrap=True)
    console.print(table)
    console.print(
        f"{out}/dataset.json is complete; next: inspect-shards summary {out}, then train {out} RUN", highlight=False
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())
