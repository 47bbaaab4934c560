"""What is in a data set, from dataset.json, index and columns; a few hundred samples are read for their codes.

So a million rows take a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shards.config import ModelSection, read_config
from shards.manifest import Dataset, short_name
from tools.inspect_shards.figures import Columns, code_figures, histograms, sound_shares, text_shares
from tools.inspect_shards.opened import OpenedData
from tools.inspect_shards.readiness import readiness
from train.config import TrainSection

BAR = 50  # characters of the longest bar


def summary_facts(record: Dataset, index: np.ndarray) -> dict[str, object]:
    """The rows of the summary, in order."""
    text = index["num_reference_text_tokens"].astype(int) + index["num_target_text_tokens"]
    audio = index["reference_frames"].astype(int) + index["target_frames"]
    what = "encoder states" if record.fingerprints.whisper else "mel"
    per_speaker = sorted(record.speakers.items(), key=lambda item: (-item[1], item[0]))
    return {
        "samples": f"{record.num_samples} of {record.num_rows} rows, in {len(record.shards)} shards",
        "size_mb": round(sum(shard.num_bytes for shard in record.shards) / 1e6, 1),
        "target_hours": record.target_hours,
        "reference_hours": record.reference_hours,
        "speakers": f"{len(per_speaker)}: "
        + ", ".join(f"{name} {count}" for name, count in per_speaker[:6])
        + (", ..." if len(per_speaker) > 6 else ""),
        "speaker_balance": speaker_balance([count for _, count in per_speaker]),
        **({"dialects": record.dialects} if record.dialects else {}),
        "target_seconds": record.target_seconds_histogram,
        "text_tokens": _percentiles(text),
        "audio_frames": _percentiles(audio),
        "whisper": f"{int((index['mel_samples'] > 0).sum())} samples have Whisper features of the reference ({what})",
        "rejects": record.rejects or "none",
        "warnings": record.warnings or "none",
        "codec": short_name(record.fingerprints.codec),
        "tokenizer": record.fingerprints.tokenizer[:16],
        "digest": record.digest[:16],
    }


def all_facts(data: OpenedData, columns: Columns, section: TrainSection, run: Path | None) -> dict[str, Any]:
    """What summary prints, report draws and compare holds side by side."""
    shares, sound = text_shares(columns.table), sound_shares(columns.table)
    codes = code_figures(data)
    record, index = data.record, data.index
    ready = readiness(record, index, shares, sound, section, run)
    if codes["not_readable"]:
        drawn = codes["samples"] + codes["not_readable"]
        ready["warnings"].append(
            f"{codes['not_readable']} of {drawn} samples that were drawn are not readable: inspect-shards verify"
        )
    return {
        "summary": summary_facts(record, index),
        "histograms": {name: msgspec.to_builtins(part) for name, part in histograms(record, index, columns).items()},
        "text": shares,
        "sound": sound,
        "columns_of": len(columns.table),
        "codes": codes,
        "readiness": ready,
    }


def summary_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Everything for a terminal: names and values, then histograms with the reject limits drawn in, then readiness."""
    yield from rows_of(facts["summary"])
    for part in facts["histograms"].values():
        yield ""
        yield from histogram_lines(part)
    yield ""
    yield from rows_of({**{name: f"{value:.1%}" for name, value in facts["text"].items()}, **facts["sound"]})
    codes = facts["codes"]
    if codes["frames"]:
        yield f"codes of {codes['samples']} samples, {codes['frames']} frames"
        yield from rows_of({name: codes[name] for name in ("entropy_bits", "never_used", "repeats")})
    yield ""
    yield "READINESS"
    yield from rows_of({name: value for name, value in facts["readiness"].items() if name != "warnings"})
    yield from (f"warning: {line}" for line in facts["readiness"]["warnings"])


def rows_of(values: dict[str, Any]) -> list[str]:
    longest = max(map(len, values), default=0)
    return [f"{name.replace('_', ' '):{longest}}  {readable(value)}" for name, value in values.items()]


def histogram_lines(part: dict[str, Any]) -> Iterator[str]:
    """A bar per line, each of two of the page's; a limit stands as a line of its own where it lies."""
    edges, counts = part["edges"], part["counts"]
    if len(counts) % 2 == 0:  # one of no values has a single bar
        edges, counts = edges[::2], [sum(counts[place : place + 2]) for place in range(0, len(counts), 2)]
    limits = sorted(part["limits"].items(), key=lambda limit: limit[1])
    most = max([*counts, 1])
    yield f"{part['title']}, {part['unit']}"
    for left, count in zip(edges[:-1], counts, strict=True):
        while limits and limits[0][1] <= left:
            yield f"{limits[0][1]:>10.4g} ----- {limits[0][0]}"
            limits.pop(0)
        yield f"{left:>10.4g} {'#' * round(BAR * count / most):{BAR}} {count}"
    for name, value in limits:
        yield f"{value:>10.4g} ----- {name}"


def readable(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name}: {count}" for name, count in value.items())
    if isinstance(value, list):
        return ("; " if value and isinstance(value[0], str) else "  ").join(map(str, value))
    return str(value)


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {name: int(np.percentile(values, q)) for name, q in (("min", 0), ("median", 50), ("p99", 99), ("max", 100))}


def speaker_balance(counts: list[int]) -> str:
    """counts: samples per speaker, largest first. One speaker with most of the samples is the voice that all others become.

    Gini coefficient of the counts: 0 = all alike, near 1 = one has nearly all.
    """
    total, n = sum(counts), len(counts)
    if not total:
        return "no samples"
    gini = sum((n + 1 - 2 * (place + 1)) * count for place, count in enumerate(counts)) / (n * total)
    return f"largest {counts[0] / total:.0%} of the samples, Gini {gini:.2f}"


class ReadyConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelSection
    train: TrainSection


def train_section(config_path: Path | None, overrides: tuple[str, ...]) -> TrainSection:
    return read_config(ReadyConfig, config_path, overrides).train
