"""`preprocess --validate-only`: every check of stage one without its features, codec or model.

Reads the list, decodes every file and holds texts against audio on all cores; writes OUT/report.json and
OUT/rejects.jsonl and prints a table. A later `preprocess` on the same OUT starts its job as if nothing had been there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from preprocess.audio import AudioMeasures, decode, read_bytes
from preprocess.config import PreprocessConfig
from preprocess.join import HISTOGRAM_EDGES_S, check_rejects, histogram, write_rejects
from preprocess.plan import REJECT_LIMIT, JobRows, Request, hold_out, ingest
from preprocess.reasons import AudioFault, RowFault, reject_of
from preprocess.report import Progress, print_validation
from preprocess.row_checks import check_pair, check_row, speaker_of
from preprocess.segment import Segment
from preprocess.sound_edits import edited
from preprocess.text import arabic_share
from preprocess.workers import Skip, run_tasks, usable_cores
from shards.errors import DataError
from shards.printable import redact_values
from shards.sample import dialect_of
from shards.writer import Reject, write_json

MAX_EXAMPLES = 3  # of each warning, with both texts
PERCENTILES = {"min": 0, "p1": 1, "median": 50, "p99": 99, "max": 100}


class ValidateSetup(msgspec.Struct, frozen=True):
    config: PreprocessConfig
    out: str


class SliceReport(msgspec.Struct):
    """What one slice of rows adds to the report."""

    rejects: list[Reject]
    warnings: dict[str, int]
    speakers: dict[str, int]
    dialects: dict[str, int]
    file_hashes: list[str]  # of reference and target of every accepted row
    reference_s: list[float]
    target_s: list[float]
    chars_per_s: list[float]  # of targets
    arabic_share: list[float]  # of target texts
    examples: dict[str, list[str]]  # warning code -> rows with the texts it is about, the first few


class ValidateTask:
    def __init__(self, setup: ValidateSetup) -> None:
        self._config = setup.config
        self._rows = JobRows(Path(setup.out), setup.config.preprocess.samples_per_shard)
        self._limits = setup.config.preprocess.audio_limits()

    def run(self, task: int, skip: Skip, begins: Callable[[int], None]) -> SliceReport:
        report = SliceReport([], {}, {}, {}, [], [], [], [], [], {})
        warnings: Counter[str] = Counter()
        speakers: Counter[str] = Counter()
        dialects: Counter[str] = Counter()
        for position, row in enumerate(self._rows.of_shard(task)):
            try:
                if position in skip:
                    raise RowFault("worker", "worker_died", skip[position])
                begins(position)
                checked = check_row(row, self._config.text)
                pair = checked.pair
                reference, reference_sha = self._measure(pair.reference_path, pair.reference_segment)
                target, target_sha = self._measure(pair.target_path, pair.target_segment)
                same_audio = reference_sha == target_sha and pair.reference_segment.shares_with(pair.target_segment)
                warnings.update(check_pair(checked, self._config.text, reference, target, same_audio))
            except RowFault as fault:
                report.rejects.append(reject_of(fault, row.row, row.id))
                continue
            for code, detail in pair.details.items():
                _add_example(report.examples, code, [f"row {row.row}: {detail}"])
            speakers[speaker_of(row, reference_sha)] += 1
            if dialect := dialect_of({**(row.chat.misc or {}), **row.extra}):
                dialects[dialect] += 1
            report.file_hashes += [reference_sha, target_sha]
            report.reference_s.append(reference.duration_s)
            report.target_s.append(target.duration_s)
            report.chars_per_s.append(len(pair.target_text) / target.duration_s)
            report.arabic_share.append(arabic_share(pair.target_text))
        report.warnings, report.speakers, report.dialects = dict(warnings), dict(speakers), dict(dialects)
        return report

    def _measure(self, path: str, segment: Segment) -> tuple[AudioMeasures, str]:
        try:
            data = read_bytes(path)
            audio = edited(decode(data, self._limits, segment), self._config.audio, self._limits)
            return audio.measures, hashlib.sha256(data).hexdigest()
        except AudioFault as fault:
            raise RowFault("audio", fault.reason, fault.detail, path) from None


def validate(request: Request, config: PreprocessConfig) -> dict[str, Any]:
    """Run all checks and return the report. Raises DataError when more rows are rejected than the limit allows."""
    if (request.out / "job.json").is_file():
        raise DataError(f"{request.out}: holds a job; give --validate-only an OUT of its own")
    with hold_out(request, None):
        return _validate(request, config)


def _validate(request: Request, config: PreprocessConfig) -> dict[str, Any]:
    num_rows, num_usable = ingest(request, config.preprocess.seed)
    size = config.preprocess.samples_per_shard
    tasks = list(range(-(-num_usable // size)))
    workers = config.preprocess.workers or usable_cores()
    progress = Progress(len(tasks), 0, size)
    parts: list[SliceReport] = []
    try:
        for part in run_tasks(tasks, workers, ValidateTask, ValidateSetup(config, str(request.out)), progress.row):
            progress.add_checked(len(part.target_s), len(part.rejects), sum(part.reference_s) + sum(part.target_s))
            parts.append(part)
    finally:
        progress.close()
    rejects = write_rejects(request.out, [reject for part in parts for reject in part.rejects])
    report = make_report(num_rows, parts, rejects)
    write_json(request.out / "report.json", redact_values(report))
    print_validation(report, request.out)
    next_step = f"or accept these: --set {REJECT_LIMIT}="
    check_rejects(request.out, str(request.data), num_rows, rejects, config.preprocess.max_reject_fraction, next_step)
    return report


def _add_example(examples: dict[str, list[str]], code: str, details: list[str]) -> None:
    examples[code] = (examples.get(code, []) + details)[:MAX_EXAMPLES]


def make_report(num_rows: int, parts: list[SliceReport], rejects: dict[str, int]) -> dict[str, Any]:
    target_s = np.array([value for part in parts for value in part.target_s])
    hashes = {name for part in parts for name in part.file_hashes}
    speakers: Counter[str] = Counter()
    dialects: Counter[str] = Counter()
    warnings: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for part in parts:
        speakers.update(part.speakers)
        dialects.update(part.dialects)
        warnings.update(part.warnings)
        for code, details in part.examples.items():
            _add_example(examples, code, details)
    return {
        "rows": num_rows,
        "usable": len(target_s),
        "target_hours": round(float(target_s.sum()) / 3600, 6),
        "reference_hours": round(sum(sum(part.reference_s) for part in parts) / 3600, 6),
        "distinct_files": len(hashes),
        "uses_per_file": round(2 * len(target_s) / len(hashes), 2) if hashes else 0.0,
        "speakers": dict(sorted(speakers.items())),
        "dialects": dict(sorted(dialects.items())),
        "target_seconds_histogram": histogram(target_s, HISTOGRAM_EDGES_S),
        "target_seconds": _percentiles(target_s),
        "target_chars_per_second": _percentiles(np.array([v for part in parts for v in part.chars_per_s])),
        "arabic_share": _percentiles(np.array([v for part in parts for v in part.arabic_share])),
        "rejects": rejects,
        "warnings": dict(sorted(warnings.items())),
        "warning_examples": dict(sorted(examples.items())),
    }


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {name: round(float(np.percentile(values, q)), 3) for name, q in PERCENTILES.items()} if len(values) else {}
