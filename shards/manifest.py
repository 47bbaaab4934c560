"""job.json, dataset.json and the check that a data set fits a model.

job.json is written before the first shard and fixes everything that decides the output; a run with another job on the
same folder is refused. dataset.json is written after the last shard and is the only file a trainer needs to be given.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from shards.errors import ShardError
from shards.index import read_index
from shards.sample import SCHEMA_VERSION
from shards.writer import ShardDone

MAX_SHARDS = 1_000_000  # keys have six digits for the shard
Precision = Literal["fp32", "bf16"]  # of the codec's encoder
BF16_MARK = "-bf16"  # behind the fingerprint of a codec that encoded so: the same decoder, other codes


class Fingerprints(msgspec.Struct, frozen=True):
    """sha256 names of what made the features (`shards.artifacts`); None for what a data set does not hold."""

    codec: str
    tokenizer: str
    mel: str | None
    whisper: str | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """job.json: the fixed plan of one stage-one job."""

    schema_version: int = SCHEMA_VERSION
    config: dict[str, Any]  # the sections that decide the output
    fingerprints: Fingerprints
    input_sha256: str
    input_path: str
    num_rows: int
    num_shards: int
    rows_per_shard: int


class Dataset(msgspec.Struct, frozen=True, kw_only=True):
    """dataset.json: the finished data set."""

    schema_version: int = SCHEMA_VERSION
    config: dict[str, Any]
    fingerprints: Fingerprints
    num_rows: int  # read from the list
    num_samples: int  # written to shards
    num_text_tokens: int  # reference and target text
    reference_hours: float
    target_hours: float
    speakers: dict[str, int]
    rejects: dict[str, int]
    warnings: dict[str, int]
    target_seconds_histogram: dict[str, int]
    shards: list[ShardDone]
    digest: str  # sha256 over everything else
    dialects: dict[str, int] | msgspec.UnsetType = msgspec.UNSET  # samples of each; unset: no sample says one


Record = TypeVar("Record", bound=msgspec.Struct)


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a JSON file of ours. Raises ShardError naming the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise ShardError(f"{path}: unreadable {kind.__name__} record: {error}") from None


def digest_of(dataset: Dataset) -> str:
    """sha256 over everything in the record but the digest itself."""
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(dataset, digest=""))).hexdigest()


def read_dataset(data: bytes, where: str) -> Dataset:
    """dataset.json, whose digest is what it must be: folders are named by it. Raises ShardError."""
    try:
        dataset = msgspec.json.decode(data, type=Dataset)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(f"{where}: unreadable Dataset record: {error}") from None
    if dataset.schema_version != SCHEMA_VERSION:
        raise ShardError(f"{where}: schema {dataset.schema_version}, this version reads {SCHEMA_VERSION}")
    digest = digest_of(dataset)
    if dataset.digest != digest:
        raise ShardError(
            f"{where}: its digest is {dataset.digest[:64]!r}, its content has {digest}: it was changed after it was "
            "written; take it from where it was made"
        )
    numbers = [shard.shard for shard in dataset.shards]
    if len(set(numbers)) < len(numbers) or min(numbers, default=0) < 0 or max(numbers, default=0) >= MAX_SHARDS:
        raise ShardError(f"{where}: shard numbers must be distinct and from 0 to {MAX_SHARDS - 1}, got {numbers[:8]}")
    return dataset


def text_rules(dataset: Dataset) -> list[str] | None:
    """`text.normalize` of the job that made it: what its texts went through. None where the record does not say."""
    section = dataset.config.get("text")
    rules = section.get("normalize") if isinstance(section, dict) else None
    return rules if isinstance(rules, list) and all(isinstance(rule, str) for rule in rules) else None


def audio_edits(dataset: Dataset) -> dict[str, float]:
    """What stage one did to clips before it encoded them: the keys of [audio] that were on, with their values."""
    section = dataset.config.get("audio")
    return {key: value for key, value in section.items() if value} if isinstance(section, dict) else {}


def stated_edits(dataset: Dataset) -> dict[str, float] | None:
    """As `audio_edits`; None where the record does not say."""
    return audio_edits(dataset) if isinstance(dataset.config.get("audio"), dict) else None


def edits_in_words(one: Dataset, other: Dataset) -> list[str]:
    """Each key of [audio] in which two data sets differ, with both values; [] where their clips were treated alike."""
    ours, theirs = audio_edits(one), audio_edits(other)
    return [
        f"audio.{key} {ours.get(key, 'off')} and {theirs.get(key, 'off')}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def folder_of(dataset: Path) -> Path:
    """The folder of a data set that is named by itself or by its dataset.json."""
    return dataset if dataset.is_dir() else dataset.parent


def open_dataset(folder: Path) -> tuple[Dataset, np.ndarray]:
    """dataset.json and the memory-mapped index [n]. Explains what else was given when it is not a data set."""
    path = folder / "dataset.json" if folder.is_dir() else folder
    if not folder.exists():
        raise ShardError(f"{folder}: no such folder; give the OUT folder of `preprocess`")
    if path.name != "dataset.json":
        raise ShardError(
            f"{folder}: this is a file, but a folder of shards is needed; "
            f"if it is a ChatML list, run first: preprocess {shlex.quote(str(folder))} OUT"
        )
    if not path.is_file():
        if (folder / "job.json").is_file():
            raise ShardError(f"{folder}: stage one has not finished here; run the same `preprocess` command again")
        raise ShardError(f"{folder}: no dataset.json, so not a data set; give the OUT folder of `preprocess`")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: unreadable Dataset record: {error}") from None
    dataset = read_dataset(data, str(path))
    index = read_index(path.parent / "index.npy")
    if len(index) != dataset.num_samples:
        raise ShardError(f"{path}: counts {dataset.num_samples} samples, index.npy holds {len(index)}")
    return dataset, index


def decoder_of(codec: str) -> str:
    """The fingerprint of the codec that gives sound to these codes, in whatever precision they were encoded."""
    return codec.removesuffix(BF16_MARK)


def short_name(fingerprint: str) -> str:
    """A fingerprint for a person: 16 digits, and the mark of bfloat16."""
    return fingerprint[:16] + (BF16_MARK if fingerprint.endswith(BF16_MARK) else "")


def require_one_precision(names: str, one: Dataset, other: Dataset) -> None:
    """Refuse two data sets of one codec, encoded in float32 and in bfloat16. Raises ShardError."""
    ours, theirs = one.fingerprints.codec, other.fingerprints.codec
    if ours != theirs and decoder_of(ours) == decoder_of(theirs):
        raise ShardError(
            f"{names} were encoded by one codec in two precisions ({short_name(ours)} and {short_name(theirs)}), whose codes "
            "differ for the same sound; run preprocess for one of them again with the other's preprocess.codec_precision"
        )


def check_fingerprints(dataset: Dataset, expected: Fingerprints) -> None:
    """Refuse features made by another codec, tokenizer or mel recipe than the model's; every difference is named."""
    pairs = [
        ("codec", "model.codec", decoder_of(dataset.fingerprints.codec), decoder_of(expected.codec)),
        ("tokenizer", "model.base", dataset.fingerprints.tokenizer, expected.tokenizer),
    ]
    if dataset.fingerprints.mel is not None and expected.mel is not None:
        pairs.append(("mel", "features.whisper", dataset.fingerprints.mel, expected.mel))
    problems = [
        f"{name}: shards were made with {found[:16]}, {key} is {wanted[:16]}"
        for name, key, found, wanted in pairs
        if found != wanted
    ]
    if problems:
        raise ShardError(
            "the shards do not fit the model: " + "; ".join(problems) + "; run preprocess again with this "
            "pipeline.toml, or name the model the shards were made for"
        )
