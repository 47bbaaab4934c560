"""Data sets for tests of mixing: samples whose clips have names that stand for their bytes, and columns that know them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import msgspec
import numpy as np

from shards.columns import columns_of, columns_row
from shards.sample import Sample


def with_clips(sample: Sample, reference: str, target: str) -> Sample:
    """The sample with files of these contents; equal names are equal bytes."""
    facts = sample.facts
    clips = {
        "reference": msgspec.structs.replace(facts.reference, sha256=sha(reference), path=reference),
        "target": msgspec.structs.replace(facts.target, sha256=sha(target), path=target),
    }
    return dataclasses.replace(sample, facts=msgspec.structs.replace(facts, **clips))


def sha(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def write_columns(folder: Path, samples: list[Sample]) -> Path:
    np.save(folder / "columns.npy", columns_of([columns_row(sample.facts) for sample in samples]))
    return folder
