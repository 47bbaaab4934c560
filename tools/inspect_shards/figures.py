"""The figures of a data set, for the terminal, the page and comparisons alike.

In: dataset.json, the index and the columns. Out: plain values. No Python loop runs over samples: a million rows take a second.
Codes are counted in CODE_SAMPLES samples drawn with a fixed seed. Where a data set has no columns (made before there were
any), up to READ_SAMPLES of its samples are read instead, and the figures say of how many they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from shards.columns import COLUMNS_DTYPE, columns_of, columns_row
from shards.errors import ShardError
from shards.manifest import Dataset
from shards.sample import Sample
from shards.sequence import FRAMES_PER_SECOND, NUM_CODEBOOKS
from tools.inspect_shards.opened import OpenedData

CODE_SAMPLES = 400
READ_SAMPLES = 2000
CODEBOOK_SIZE = 1024
NUM_BARS = 24
DIACRITISED = 0.2  # marks per Arabic letter; fully vocalised text has about 0.8, a few shaddas 0.05


class Histogram(msgspec.Struct, frozen=True):
    """counts [n] between edges [n + 1]; `limits`: what stage one rejects beyond, by the key that says so."""

    title: str
    unit: str
    edges: list[float]
    counts: list[int]
    limits: dict[str, float] = {}


class Columns(msgspec.Struct, frozen=True):
    """`table` [m] of COLUMNS_DTYPE and the index rows [m] it belongs to, of a data set of `num_samples`."""

    table: np.ndarray
    rows: np.ndarray
    num_samples: int

    @property
    def is_whole(self) -> bool:
        return len(self.table) == self.num_samples


def dataset_columns(data: OpenedData) -> Columns:
    """The data set's columns, or those of the samples that were read for want of them."""
    index = data.index
    whole = data.columns()
    if whole is not None:
        return Columns(np.asarray(whole), np.arange(len(index)), len(index))
    rows, found = [], []
    for row, sample in drawn_samples(data, READ_SAMPLES):
        rows.append(row)
        found.append(columns_row(sample.facts))
    return Columns(columns_of(found) if found else np.empty(0, COLUMNS_DTYPE), np.array(rows, int), len(index))


def drawn_samples(data: OpenedData, most: int) -> Iterator[tuple[int, Sample]]:
    """(row, sample) of up to `most` samples, drawn with a fixed seed, in the order of the shards; the damaged are left out."""
    reader, index = data.reader(), data.index
    rows = np.sort(np.random.default_rng(0).permutation(len(index))[:most]) if len(index) else np.empty(0, int)
    for row in rows.tolist():
        try:
            yield row, reader.read(index[row])
        except ShardError:
            continue  # counted by who compares the number that came with the number asked for


def histograms(record: Dataset, index: np.ndarray, columns: Columns) -> dict[str, Histogram]:
    """By name; those of unknown values are left out."""
    table, config = columns.table, record.config
    seconds = index["target_frames"] / FRAMES_PER_SECOND
    found = {
        "target_seconds": histogram("Length of targets", "s", seconds, limits_of(config, "preprocess", "duration_s")),
        "reference_seconds": histogram(
            "Length of references",
            "s",
            index["reference_frames"] / FRAMES_PER_SECOND,
            limits_of(config, "preprocess", "duration_s"),
        ),
    }
    if len(table):
        rate = table["num_chars"] / np.maximum(table["target_s"], 1e-3)
        found["chars_per_s"] = histogram(
            "Speed of targets", "characters/s", rate, limits_of(config, "text", "chars_per_s")
        )
        found["chars"] = histogram(
            "Length of target texts", "characters", table["num_chars"], limits_of(config, "text", "chars")
        )
    for name, title, unit, values in sound_values(table):
        if np.isfinite(values).any():
            known = values[np.isfinite(values)]
            found[name] = histogram(title, unit, known, {}, 0.0 if name == "bandwidth_khz" else None)
    return found


def sound_values(table: np.ndarray) -> list[tuple[str, str, str, np.ndarray]]:
    snr = table["target_level_db"] - table["target_noise_db"]
    return [
        ("bandwidth_khz", "Bandwidth of targets", "kHz", table["target_bandwidth_hz"] / 1000),
        ("level_db", "Level of the speech in targets", "dB of full scale", table["target_level_db"]),
        ("snr_db", "From speech down to the quietest moments", "dB", snr),
    ]


def histogram(
    title: str, unit: str, values: np.ndarray, limits: dict[str, float], begin: float | None = None
) -> Histogram:
    """NUM_BARS bars from `begin`, or the least, to the most; a limit that is near belongs to the picture."""
    if not len(values):
        return Histogram(title, unit, [0.0, 1.0], [0], limits)
    low, high = float(values.min()) if begin is None else begin, float(values.max())
    near = [limit for limit in limits.values() if low - (high - low) <= limit <= high + (high - low)]
    low, high = min([low, *near]), max([high, *near])
    if high <= low:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, bins=NUM_BARS, range=(low, high))
    return Histogram(title, unit, [round(float(edge), 4) for edge in edges], counts.tolist(), limits)


def limits_of(config: dict[str, Any], section: str, what: str) -> dict[str, float]:
    """The job's own `min_WHAT` and `max_WHAT`."""
    values = config.get(section)
    keys = [f"{side}_{what}" for side in ("min", "max")]
    return {key: float(values[key]) for key in keys if key in values} if isinstance(values, dict) else {}


def text_shares(table: np.ndarray) -> dict[str, float]:
    """Of letters and of texts; nothing for no text."""
    if not len(table):
        return {}
    letters = max(1, int(table["num_letters"].sum(dtype=np.int64)))
    marks = table["num_marks"] / np.maximum(1, table["num_arabic"])
    return {
        "arabic_letters": float(table["num_arabic"].sum(dtype=np.int64) / letters),
        "latin_letters": float(table["num_latin"].sum(dtype=np.int64) / letters),
        "texts_diacritised": float((marks >= DIACRITISED).mean()),
        "texts_with_digits": float((table["num_digits"] > 0).mean()),
        "texts_with_latin": float((table["num_latin"] > 0).mean()),
    }


def sound_shares(table: np.ndarray) -> dict[str, float]:
    """Medians of what was measured in the targets' files; nothing where nothing was."""
    found = {name: values[np.isfinite(values)] for name, _, _, values in sound_values(table)}
    return {f"median_{name}": round(float(np.median(values)), 2) for name, values in found.items() if len(values)}


def code_figures(data: OpenedData) -> dict[str, Any]:
    """Per codebook, over the targets of the samples drawn: entropy in bits, codes never used, frames that repeat the last."""
    counts = np.zeros((NUM_CODEBOOKS, CODEBOOK_SIZE), np.int64)
    repeats, num_frames, num_pairs, num_samples = np.zeros(NUM_CODEBOOKS), 0, 0, 0
    for _, sample in drawn_samples(data, CODE_SAMPLES):
        codes = sample.target_codes
        for book, row in enumerate(codes):
            counts[book] += np.bincount(row, minlength=CODEBOOK_SIZE)[:CODEBOOK_SIZE]
        repeats += (codes[:, 1:] == codes[:, :-1]).sum(axis=1)
        num_frames += codes.shape[1]
        num_pairs += max(0, codes.shape[1] - 1)
        num_samples += 1
    share = counts / max(1, num_frames)
    bits = -(share * np.log2(np.maximum(share, 1e-30))).sum(axis=1)
    return {
        "samples": num_samples,
        "not_readable": min(CODE_SAMPLES, len(data.index)) - num_samples,
        "frames": num_frames,
        "entropy_bits": [round(float(value), 3) for value in bits],
        "never_used": (counts == 0).sum(axis=1).tolist(),
        "repeats": [round(float(value), 4) for value in repeats / max(1, num_pairs)],
    }
