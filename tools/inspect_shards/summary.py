"""What is in a data set, from dataset.json and the index alone: no sample is read, so a million rows take a moment."""

from __future__ import annotations

import numpy as np

from shards.manifest import Dataset


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
        "target_seconds": record.target_seconds_histogram,
        "text_tokens": _percentiles(text),
        "audio_frames": _percentiles(audio),
        "whisper": f"{int((index['mel_samples'] > 0).sum())} samples have Whisper features of the reference ({what})",
        "rejects": record.rejects or "none",
        "warnings": record.warnings or "none",
        "codec": record.fingerprints.codec[:16],
        "tokenizer": record.fingerprints.tokenizer[:16],
        "digest": record.digest[:16],
    }


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
