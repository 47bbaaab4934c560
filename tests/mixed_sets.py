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


def with_reference_of(sample: Sample, other: Sample) -> Sample:
    """The sample behind the reference of another one: its file, codes and text."""
    facts, theirs = sample.facts, other.facts
    texts, counts = list(facts.texts), list(facts.text_token_counts)
    items = [sample.text_item_ids(item) for item in range(len(texts))]
    own, shared = facts.reference_text, theirs.reference_text
    texts[own], counts[own] = theirs.texts[shared], theirs.text_token_counts[shared]
    items[own] = other.text_item_ids(shared)
    facts = msgspec.structs.replace(facts, texts=texts, text_token_counts=counts, reference=theirs.reference)
    return dataclasses.replace(
        sample, facts=facts, text_ids=np.concatenate(items), reference_codes=other.reference_codes
    )


def sha(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def write_columns(folder: Path, samples: list[Sample]) -> Path:
    np.save(folder / "columns.npy", columns_of([columns_row(sample.facts) for sample in samples]))
    return folder
