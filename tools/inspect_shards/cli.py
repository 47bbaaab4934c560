"""`inspect-shards`: look into a data set.

summary DATASET         what is in it, as a table a person understands
list DATASET            one line per sample, of all or of those asked for
show DATASET KEY        one sample: texts, turns, audio, codes; KEY is its twelve digits or the id of your list;
                        --sequence prints what the model reads and learns, position by position
decode DATASET KEY OUT  the sound that its codes hold, which is what the model learns to say
verify DATASET          every byte against the markers; exit status 1 names the shard and the sample
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import click
import msgspec

from shards.manifest import open_dataset
from shards.printable import printable
from shards.terminal import FileToWrite, explained, print_json, print_line, print_table, progress_bar

PATH = click.Path(path_type=Path)
DATASET = click.argument("dataset", type=PATH)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")
CONFIG = click.option("--config", "config_path", type=PATH, help="Default: ./pipeline.toml if it exists.")
OVERRIDES = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="E.g. sequence.layout=as_written."
)


@click.group()
def main() -> None:
    """Look into the shards that `preprocess` wrote."""


@main.command()
@DATASET
@AS_JSON
def summary(dataset: Path, as_json: bool) -> None:
    """What is in DATASET."""
    from tools.inspect_shards.summary import summary_facts

    with explained():
        record, index = open_dataset(dataset)
        facts = summary_facts(record, index)
    if as_json:
        print_json(facts, indent=1)
        return
    print_table([(name.replace("_", " "), _readable(value)) for name, value in facts.items()], to_stdout=True)


@main.command("list")
@DATASET
@AS_JSON
@click.option("--speaker", help="Only this speaker.")
@click.option("--min-seconds", type=float, help="Targets of at least this length.")
@click.option("--max-seconds", type=float, help="Targets of at most this length.")
@click.option("--min-chars-per-s", type=float, help="Target texts of at least this rate.")
@click.option("--max-chars-per-s", type=float, help="Target texts of at most this rate.")
@click.option("--text", help="Reference or target text that holds this.")
@click.option("--warning", help="Samples with this warning, e.g. target_clipped.")
@click.option(
    "--sort", type=click.Choice(["seconds", "chars-per-second", "speaker"]), help="Default: as in the shards."
)
@click.option("--descending", is_flag=True, help="With --sort: largest first.")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many.")
def list_command(
    dataset: Path, as_json: bool, sort: str | None, descending: bool, limit: int | None, **wanted: Any
) -> None:
    """One line per sample of DATASET: key, id, speaker, seconds, characters per second, target text."""
    from tools.inspect_shards.samples import Wanted, chars_per_s, wanted_samples

    with explained():
        _, index = open_dataset(dataset)
        for sample in islice(wanted_samples(dataset, index, Wanted(**wanted), sort, descending), limit):
            facts = sample.facts
            if as_json:
                print_json({"key": sample.key, **msgspec.to_builtins(facts)})
            else:
                text = facts.texts[facts.target_text]
                rate = f"{facts.target.duration_s:.2f} s  {chars_per_s(sample):.1f} chars/s"
                print_line(printable(f"{sample.key}  {facts.id}  {facts.speaker}  {rate}  {text}"), to_stdout=True)


@main.command()
@DATASET
@click.argument("key")
@AS_JSON
@click.option("--sequence", is_flag=True, help="What the model reads and must say at every position.")
@CONFIG
@OVERRIDES
def show(
    dataset: Path, key: str, as_json: bool, sequence: bool, config_path: Path | None, overrides: tuple[str, ...]
) -> None:
    """One sample of DATASET."""
    from tools.inspect_shards.describe import describe, describe_sequence
    from tools.inspect_shards.samples import find_sample

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


@main.command()
@DATASET
@click.argument("key")
@click.argument("out", type=FileToWrite())
@click.option("--reference", is_flag=True, help="The reference's codes; default: the target's.")
@CONFIG
@OVERRIDES
def decode(
    dataset: Path, key: str, out: Path, reference: bool, config_path: Path | None, overrides: tuple[str, ...]
) -> None:
    """Write the sound of the codes of sample KEY as the wav file OUT, with the codec they were made with."""
    from tools.inspect_shards.decode import decode_sample
    from tools.inspect_shards.samples import find_sample

    with explained():
        record, index = open_dataset(dataset)
        sample = find_sample(dataset, index, key)
        duration_s = decode_sample(record, sample, reference, out, config_path, overrides)
    print_line(f"{out}: {duration_s:.2f} s, the {'reference' if reference else 'target'} of {sample.key}")


@main.command("verify")
@DATASET
@AS_JSON
def verify_command(dataset: Path, as_json: bool) -> None:
    """Check every shard of DATASET against its marker, and every sample of a damaged one."""
    from tools.inspect_shards.damage import dataset_faults

    with explained():
        record, index = open_dataset(dataset)
        with progress_bar("shards", len(record.shards)) as on_shard:
            faults = dataset_faults(dataset, record, index, on_shard)
    if as_json:
        print_json({"shards": len(record.shards), "faults": faults})
    for fault in faults:
        print_line(printable(fault))
    found = f"{len(faults)} faults" if faults else "sound"
    print_line(f"{len(record.shards)} shards, {len(index)} samples: {found}")
    sys.exit(1 if faults else 0)


def _readable(value: object) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name}: {count}" for name, count in value.items())
    return str(value)


if __name__ == "__main__":
    main()
