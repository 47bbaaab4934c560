"""`inspect-shards`: look into a data set.

summary DATASET     what is in it, as a table a person understands
list DATASET        one line per sample
show DATASET KEY    one sample: texts, turns, audio, codes; KEY is its twelve digits or the id of your list;
                    --sequence prints what the model reads and learns, position by position
verify DATASET      every byte against the markers; exit status 1 names the shard and the sample
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import numpy as np

from shards.errors import ShardError
from shards.index import read_index
from shards.manifest import Dataset, open_dataset, read_record
from shards.printable import printable
from shards.reader import SampleReader, verify
from shards.sample import Sample
from shards.terminal import explained, print_json, print_line, print_table
from shards.writer import ShardDone, sample_key, shard_path

DATASET = click.argument("dataset", type=click.Path(path_type=Path))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")


@click.group()
def main() -> None:
    """Look into the shards that `preprocess` wrote."""


@main.command()
@DATASET
@AS_JSON
def summary(dataset: Path, as_json: bool) -> None:
    """What is in DATASET."""
    with explained():
        record, index = open_dataset(dataset)
    facts = summary_facts(record, index)
    if as_json:
        print_json(facts, indent=1)
        return
    print_table([(name.replace("_", " "), _readable(value)) for name, value in facts.items()], to_stdout=True)


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


@main.command("list")
@DATASET
@AS_JSON
def list_command(dataset: Path, as_json: bool) -> None:
    """One line per sample of DATASET: key, id, speaker, seconds, target text."""
    with explained():
        _, index = open_dataset(dataset)
        for sample in sound_samples(dataset, index):
            facts = sample.facts
            if as_json:
                print_json({"key": sample.key, **msgspec.to_builtins(facts)})
            else:
                text = facts.texts[facts.target_text]
                seconds = f"{facts.target.duration_s:.2f} s"
                print_line(printable(f"{sample.key}  {facts.id}  {facts.speaker}  {seconds}  {text}"), to_stdout=True)


@main.command()
@DATASET
@click.argument("key")
@AS_JSON
@click.option("--sequence", is_flag=True, help="What the model reads and must say at every position.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Default: ./pipeline.toml if it exists.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="E.g. sequence.layout=as_written.")
def show(
    dataset: Path, key: str, as_json: bool, sequence: bool, config_path: Path | None, overrides: tuple[str, ...]
) -> None:
    """One sample of DATASET."""
    with explained():
        _, index = open_dataset(dataset)
        sample = find_sample(dataset, index, key)
        if sequence:
            for line in describe_sequence(sample, config_path, overrides):
                print_line(printable(line), to_stdout=True)
            return
    if as_json:
        facts = msgspec.to_builtins(sample.facts)
        codes = {"reference_codes": sample.reference_codes.tolist(), "target_codes": sample.target_codes.tolist()}
        print_json({"key": sample.key, **facts, **codes})
        return
    for line in describe(sample):
        print_line(printable(line), to_stdout=True)


def describe(sample: Sample) -> Iterator[str]:
    facts = sample.facts
    yield f"key {sample.key}   id {facts.id}   row {facts.row}   speaker {facts.speaker}"
    for turn in facts.turns:
        yield f"{turn.role}:"
        for item in turn.items:
            if isinstance(item, int):
                yield f"  text  {facts.text_token_counts[item]:4d} tokens  {facts.texts[item]}"
            else:
                audio = facts.reference if item == "reference" else facts.target
                length = f"{audio.duration_s:.3f} s at {audio.sample_rate} Hz, {audio.num_frames} frames"
                yield f"  audio {item}: {length}, {audio.path}"
    yield f"clone layout says: reference {facts.texts[facts.reference_text]!r}, target {facts.texts[facts.target_text]!r}"
    for name, codes in (("reference", sample.reference_codes), ("target", sample.target_codes)):
        distinct = [len(np.unique(book)) for book in codes]
        yield f"{name} codes {codes.dtype}{list(codes.shape)}, distinct per codebook {distinct}, first frames:"
        for book, row in enumerate(codes[:, :12]):
            yield f"  codebook {book}: " + " ".join(f"{code:4d}" for code in row)
    mel = sample.reference_mel()
    yield (
        f"mel: {mel.dtype}{list(mel.shape)}, floor {facts.mel.floor:.4f}"
        if mel is not None and facts.mel
        else "mel: none"
    )
    states = sample.reference_whisper()
    if states is not None:
        yield f"Whisper states: {states.dtype}{list(states.shape)}"
    yield f"warnings: {', '.join(facts.warnings) or 'none'}   extra keys: {', '.join(facts.extra) or 'none'}"


def describe_sequence(sample: Sample, config_path: Path | None, overrides: tuple[str, ...]) -> Iterator[str]:
    """The sample as training with this configuration builds it."""
    from shards.artifacts import load_tokenizer, resolve
    from shards.config import read_config
    from shards.sequence import SequenceBuilder
    from tools.inspect_shards.show_sequence import sequence_lines
    from train.config import TrainConfig
    from train.model.conditioning import decide_conditioning

    config = read_config(TrainConfig, config_path, overrides)
    base_dir = resolve(config.model.base, config.model.revision, "model.base")
    conditioning = decide_conditioning(config.sequence, config.features, base_dir)
    section = msgspec.structs.replace(config.sequence, conditioning=conditioning.name)
    yield f"layout {section.layout}, {conditioning}"
    tokenizer = load_tokenizer(base_dir)
    sequence = SequenceBuilder(tokenizer, section).training(sample)
    yield from sequence_lines(sequence, tokenizer, config.loss.text_loss_weight, config.loss.audio_loss_weight)


@main.command("verify")
@DATASET
@AS_JSON
def verify_command(dataset: Path, as_json: bool) -> None:
    """Check every shard of DATASET against its marker, and every sample of a damaged one."""
    with explained():
        record, index = open_dataset(dataset)
    faults = [fault for shard in record.shards for fault in shard_faults(dataset, shard)]
    if not faults and not np.array_equal(index, joined_index(dataset, record)):
        faults.append(f"{dataset}/index.npy: differs from the indexes of the shards")
    if as_json:
        print_json({"shards": len(record.shards), "faults": faults})
    for fault in faults:
        print_line(printable(fault))
    found = f"{len(faults)} faults" if faults else "sound"
    print_line(f"{len(record.shards)} shards, {len(index)} samples: {found}")
    sys.exit(1 if faults else 0)


def shard_faults(dataset: Path, shard: ShardDone) -> list[str]:
    marker_path = shard_path(dataset, shard.shard, ".done.json")
    try:
        marker = read_record(marker_path, ShardDone)
    except ShardError as error:
        return [f"no done marker: {error}"]
    differs = [f"{marker_path}: differs from dataset.json"] if marker != shard else []
    return differs + list(verify(dataset, shard))


def joined_index(dataset: Path, record: Dataset) -> np.ndarray:
    return np.concatenate([read_index(shard_path(dataset, shard.shard, ".idx.npy")) for shard in record.shards])


def sound_samples(dataset: Path, index: np.ndarray) -> Iterator[Sample]:
    """Every usable sample; the others are named and counted on stderr."""
    reader = SampleReader(dataset)
    num_skipped = 0
    for row in index:
        try:
            yield reader.read(row)
        except ShardError as error:
            num_skipped += 1
            print_line(f"skipped: {printable(str(error))}")
    if num_skipped:
        print_line(
            f"skipped: {num_skipped} of {len(index)} samples are not usable; `inspect-shards verify` looks at all"
        )


def find_sample(dataset: Path, index: np.ndarray, key: str) -> Sample:
    """By key without a search, by the user's id with one. Raises ShardError."""
    reader = SampleReader(dataset)
    if key.isdigit() and len(key) == 12:
        shard = int(key[:6])
        for position, row in enumerate(index[index["shard"] == shard]):
            if reader.key_of(row, position) == key:
                return reader.read(row)
    for sample in sound_samples(dataset, index):
        if sample.facts.id == key:
            return sample
    first = sample_key(0, 0)
    raise ShardError(
        f"{dataset}: no sample {key!r}; a key has twelve digits like {first}, `inspect-shards list` shows all"
    )


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {name: int(np.percentile(values, q)) for name, q in (("min", 0), ("median", 50), ("p99", 99), ("max", 100))}


def _readable(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name}: {count}" for name, count in value.items())
    return str(value)


if __name__ == "__main__":
    main()
