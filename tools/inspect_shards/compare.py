"""`inspect-shards compare A B`: two data sets side by side, and what of B is in A already.

In: two data sets, A trained on and B held out. Out: facts for a table or JSON. Contamination is the same audio (file and segment,
by hash) or the same text (as it is heard, `shards.columns.comparable`). Data sets with columns are compared whole, whatever
their size; of one without, the samples that are read (`figures.READ_SAMPLES`), and the result says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from shards.columns import common_rows, shared_audio
from shards.errors import ShardError
from shards.manifest import Dataset, short_name
from tools.inspect_shards.figures import Columns, dataset_columns, sound_shares, sound_values, text_shares
from tools.inspect_shards.opened import OpenedData, open_data

NAMED = 3


@dataclass(frozen=True)
class Side:
    data: OpenedData
    columns: Columns

    @property
    def record(self) -> Dataset:
        return self.data.record


def open_side(spec: str) -> Side:
    data = open_data(spec)
    return Side(data, dataset_columns(data))


def compare(a: Side, b: Side) -> dict[str, Any]:
    """Everything that differs, and what is common."""
    return {
        "counts": {"a": counts(a), "b": counts(b)},
        "distributions": distributions(a, b),
        "rejects": {"a": a.record.rejects, "b": b.record.rejects},
        "warnings": {"a": a.record.warnings, "b": b.record.warnings},
        "fingerprints": fingerprints(a.record, b.record),
        "common": contamination(a, b),
    }


def counts(side: Side) -> dict[str, Any]:
    record = side.record
    return {
        "path": side.data.name,
        "digest": record.digest[:16],
        "samples": record.num_samples,
        "rows": record.num_rows,
        "speakers": len(record.speakers),
        "target_hours": record.target_hours,
        "reference_hours": record.reference_hours,
        **text_shares(side.columns.table),
        **sound_shares(side.columns.table),
    }


def distributions(a: Side, b: Side) -> dict[str, dict[str, float]]:
    """Median of both and how far apart they are: the largest difference of their cumulative shares (0 to 1)."""
    found = {}
    for (name, ours), (_, theirs) in zip(values_of(a), values_of(b), strict=True):
        ours, theirs = ours[np.isfinite(ours)], theirs[np.isfinite(theirs)]
        if len(ours) and len(theirs):
            medians = [round(float(np.median(values)), 3) for values in (ours, theirs)]
            found[name] = {"median_a": medians[0], "median_b": medians[1], "distance": distance(ours, theirs)}
    return found


def values_of(side: Side) -> list[tuple[str, np.ndarray]]:
    table = side.columns.table
    named = [("target_seconds", table["target_s"]), ("reference_seconds", table["reference_s"])]
    named += [("chars_per_s", table["num_chars"] / np.maximum(table["target_s"], 1e-3)), ("chars", table["num_chars"])]
    return named + [(name, values) for name, _, _, values in sound_values(table)]


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Kolmogorov-Smirnov statistic of two samples."""
    ours, theirs = np.sort(ours), np.sort(theirs)
    at = np.concatenate([ours, theirs])
    shares = [np.searchsorted(values, at, side="right") / len(values) for values in (ours, theirs)]
    return round(float(np.abs(shares[0] - shares[1]).max()), 4)


def fingerprints(a: Dataset, b: Dataset) -> dict[str, str]:
    ours, theirs = msgspec.to_builtins(a.fingerprints), msgspec.to_builtins(b.fingerprints)
    return {
        name: "same" if value == theirs[name] else f"differs: {short_name(str(value))}, {short_name(str(theirs[name]))}"
        for name, value in ours.items()
    }


def contamination(a: Side, b: Side) -> dict[str, Any]:
    """What of B stands in A: speakers, audio that one of them learns to say, texts that both learn to say."""
    audio = shared_audio(a.columns.table, b.columns.table)
    texts = common_rows(b.columns.table["target_text"], a.columns.table["target_text"])
    speakers = sorted(a.record.speakers.keys() & b.record.speakers.keys())
    return {
        "compared": f"{len(a.columns.table)} of {a.record.num_samples} samples of A, {len(b.columns.table)} of "
        f"{b.record.num_samples} of B",
        "speakers": len(speakers),
        "speaker_names": speakers[:NAMED],
        "audio": len(audio),
        "audio_samples": named(b, audio),
        "texts": len(texts),
        "text_share": round(len(texts) / max(1, len(b.columns.table)), 4),
        "text_samples": named(b, texts),
    }


def named(side: Side, found: np.ndarray) -> list[str]:
    """The first few of these rows of the columns, as a person finds them again."""
    reader = side.data.reader()
    names = []
    for row in side.columns.rows[found[:NAMED]].tolist():
        try:
            sample = reader.read(side.data.index[row])
        except ShardError as error:
            names.append(str(error))
            continue
        facts = sample.facts
        names.append(f"{sample.key} {facts.id} {facts.target.path}: {facts.texts[facts.target_text]}")
    return names
