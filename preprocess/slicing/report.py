"""What `preprocess slice` says at its end: a table, and every reason for which a part is in no row."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.slicing.cutting import SKIP_REASONS
from preprocess.slicing.pieces_folder import SKIPPED_FILE, CutRecording
from shards.terminal import print_line, print_table


@dataclass(frozen=True, kw_only=True)
class Outcome:
    num_sources: int
    num_standing: int  # recordings that an earlier run had cut
    cuts: list[CutRecording]
    num_rows: int
    num_speakers: int
    heard: str  # what a recognizer did; "" without one
    skipped: list[dict[str, Any]]  # rows of SKIPPED_FILE
    num_removed: int
    others: str  # files that were not looked at


def print_outcome(made: Outcome, pieces: Path) -> None:
    duration_s = sum(item.duration_s for item in made.cuts)
    speech_s = sum(item.speech_s for item in made.cuts)
    cut_s = sum(piece.end_s - piece.start_s for item in made.cuts for piece in item.pieces)
    table = [
        ("recordings", f"{len(made.cuts)} of {made.num_sources}, {made.num_standing} of them cut before"),
        ("audio", f"{duration_s / 3600:.3f} h, {speech_s / 3600:.3f} h of it speech"),
        ("pieces", f"{sum(len(item.pieces) for item in made.cuts)}, {cut_s / 3600:.3f} h"),
        ("recognized", made.heard),
        ("rows", f"{made.num_rows} of {made.num_speakers} speakers"),
        ("skipped", counts_of(made.skipped) or "none"),
        (
            "removed",
            f"{made.num_removed} pieces of an earlier run with other rules or recordings" if made.num_removed else "",
        ),
        ("not looked at", made.others),
    ]
    print_table([(name, value) for name, value in table if value])
    for reason in sorted({row["reason"] for row in made.skipped}):
        print_line(f"{reason}: {SKIP_REASONS[reason]}")
    if made.skipped:
        print_line(f"{pieces / SKIPPED_FILE}: every skipped part with its times")


def counts_of(skipped: list[dict[str, Any]]) -> str:
    """Reason, how often, how many seconds."""
    counts: Counter[str] = Counter()
    seconds: dict[str, float] = defaultdict(float)
    for row in skipped:
        counts[row["reason"]] += 1
        seconds[row["reason"]] += row["recording_end_s"] - row["recording_start_s"]
    return ", ".join(f"{reason} {count} ({seconds[reason]:.1f} s)" for reason, count in sorted(counts.items()))
