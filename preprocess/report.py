"""What stage one shows: a bar on a terminal, a plain line now and then elsewhere, and a closing table."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from shards.manifest import Dataset
from shards.terminal import PLAIN_LINE_EVERY_S, print_line, print_table


class Progress:
    """Shards done, audio per hour, rejects, time left."""

    def __init__(self, num_shards: int, already_done: int, rows_per_shard: int) -> None:
        self._num_shards = num_shards
        self._done = already_done
        self._rows = 0  # begun in this run
        self._rows_to_do = (num_shards - already_done) * rows_per_shard
        self._audio_s = 0.0
        self._samples = self._rejects = self.num_encoded = self.num_reused = self.num_adopted = 0
        self._told: set[str] = set()
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
        self.num_encoded += result.num_encoded
        self.num_reused += result.num_reused
        self.num_adopted += result.num_adopted
        for note in set(result.notes) - self._told:  # every worker has the same to say
            self._told.add(note)
            print_line(f"warning: {note}")
        done = result.done
        self.add_checked(done.num_samples, sum(done.rejects.values()), done.reference_s + done.target_s)

    def add_checked(self, num_samples: int, num_rejects: int, audio_s: float) -> None:
        """One more shard, or slice of rows, is through."""
        self._done += 1
        self._samples += num_samples
        self._rejects += num_rejects
        self._audio_s += audio_s
        self._show()

    def row(self) -> None:
        """One more row is begun: at full size a shard takes an hour or more, too long to say nothing."""
        self._rows += 1
        self._show()

    def _show(self) -> None:
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=self._line())
        elif time.monotonic() - self._last_line > PLAIN_LINE_EVERY_S:
            self._last_line = time.monotonic()
            print_line(f"shards {self._done}/{self._num_shards} | {self._line()} | ETA {self._eta()}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def audio_hours_per_hour(self) -> float:
        return self._audio_s / max(1e-9, time.monotonic() - self._start)

    def _num_rows(self) -> int:
        return max(self._rows, self._samples + self._rejects)  # Ray reports whole shards only

    def _line(self) -> str:
        rate = self._num_rows() / max(1e-9, time.monotonic() - self._start)
        return f"{rate:.1f} rows/s | {self.audio_hours_per_hour():.0f} audio-hours/h | rejects {self._rejects}"

    def _eta(self) -> str:
        per_row_s = (time.monotonic() - self._start) / max(1, self._num_rows())
        left = max(0, self._rows_to_do - self._num_rows()) * per_row_s  # a last shard that is not full ends sooner
        return f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"


def print_summary(dataset: Dataset, out: Path, progress: Progress | None, elapsed_s: float) -> None:
    """The closing table, on stderr: stdout belongs to --json."""
    rows = [
        ("samples", f"{dataset.num_samples} of {dataset.num_rows} rows, in {len(dataset.shards)} shards"),
        ("audio", f"{dataset.target_hours:.3f} h of targets, {dataset.reference_hours:.3f} h of references"),
        ("speakers", str(len(dataset.speakers))),
    ]
    if dataset.dialects:
        rows.append(("dialects", _counts(dataset.dialects)))
    if progress:
        encoded = f"{progress.num_encoded} distinct files, {progress.num_reused} uses of one already encoded"
        if progress.num_adopted:
            distinct = progress.num_encoded + progress.num_adopted
            encoded += f"; encodings reused {progress.num_adopted} of {distinct}"
        any_new = progress.num_encoded + progress.num_reused
        rows.append(("encoded", encoded if any_new else "nothing: all shards were there already"))
        rows.append(("speed", f"{progress.audio_hours_per_hour():.0f} audio-hours per hour, {elapsed_s:.1f} s in all"))
    rows += [("rejects", _counts(dataset.rejects) or "none"), ("warnings", _counts(dataset.warnings) or "none")]
    print_table(rows)
    folder = shlex.quote(str(out))
    print_line(f"{out}/dataset.json is complete; next: inspect-shards summary {folder}, then train {folder} RUN")


def print_share(request: Any, num_mine: int, num_left: int) -> None:
    """What one task of an array says at its end. request: a `plan.Request`."""
    print_line(
        f"task {request.task_index} of {request.num_tasks}: its {num_mine} shards are done; {num_left} are left in all"
    )
    print_line(f"when no shard is left: preprocess finalize {shlex.quote(str(request.out))}")


def print_validation(report: dict[str, Any], out: Path) -> None:
    """The table of --validate-only."""
    seconds, rate = report["target_seconds"], report["target_chars_per_second"]
    rows = [
        ("usable rows", f"{report['usable']} of {report['rows']}"),
        ("audio", f"{report['target_hours']:.3f} h of targets, {report['reference_hours']:.3f} h of references"),
        ("files", f"{report['distinct_files']} distinct, each used {report['uses_per_file']} times"),
        ("speakers", str(len(report["speakers"]))),
        ("dialects", _counts(report["dialects"]) or "none is named"),
        ("target seconds", _counts(report["target_seconds_histogram"])),
        ("seconds", _counts(seconds)),
        ("characters/s", _counts(rate)),
        ("Arabic letters", _counts(report["arabic_share"])),
        ("rejects", _counts(report["rejects"]) or "none"),
        ("warnings", _counts(report["warnings"]) or "none"),
    ]
    rows += [(code, "; ".join(details[:1])) for code, details in report["warning_examples"].items()]
    print_table(rows)
    print_line(f"{out}/report.json holds this, {out}/rejects.jsonl every rejected row")


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())
