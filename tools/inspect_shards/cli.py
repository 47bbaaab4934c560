"""`inspect-shards`: look into a data set. DATA is its folder or URL, a shard, or several: a folder of tars, a glob, URLs.

summary DATA         what is in it, as a table a person understands
list DATA            one line per sample, of all or of those asked for
show DATA KEY        one sample: texts, turns, audio, codes; KEY is its twelve digits or the id of your list;
                     --sequence prints what the model reads and learns, position by position
report DATA OUT      one page with figures, rejected rows, and samples to listen to
decode DATA KEY OUT  the sound that its codes hold, which is what the model learns to say
compare A B          two data sets: counts, distributions, and what of B is in A already
verify DATA          every byte against the markers; exit status 1 names the shard and the sample
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import click
import msgspec

from shards.printable import printable
from shards.terminal import FileToWrite, explained, print_json, print_line, print_table, progress_bar

PATH = click.Path(path_type=Path)
DATA = click.argument("data")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")
CONFIG = click.option("--config", "config_path", type=PATH, help="Default: ./pipeline.toml if it exists.")
RUN = click.option("--run", type=PATH, help="A RUN of `train` on this machine: its measured rate tells the hours.")
OVERRIDES = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="E.g. sequence.layout=as_written."
)


@click.group()
def main() -> None:
    """Look into the shards that `preprocess` wrote."""


@main.command()
@DATA
@RUN
@AS_JSON
@CONFIG
@OVERRIDES
def summary(data: str, run: Path | None, as_json: bool, config_path: Path | None, overrides: tuple[str, ...]) -> None:
    """What is in DATA, and whether it is enough to train on."""
    from tools.inspect_shards.figures import dataset_columns
    from tools.inspect_shards.opened import open_data
    from tools.inspect_shards.summary import all_facts, summary_lines, train_section

    with explained():
        section = train_section(config_path, overrides)
        opened = open_data(data)
        facts = all_facts(opened, dataset_columns(opened), section, run)
    if as_json:
        print_json({**facts.pop("summary"), **facts}, indent=1)
        return
    for line in summary_lines(facts):
        print_line(printable(line), to_stdout=True)


@main.command("list")
@DATA
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
    data: str, as_json: bool, sort: str | None, descending: bool, limit: int | None, **wanted: Any
) -> None:
    """One line per sample of DATA: key, id, speaker, seconds, characters per second, target text."""
    from tools.inspect_shards.opened import open_data
    from tools.inspect_shards.samples import Wanted, chars_per_s, wanted_samples

    with explained():
        opened, found = open_data(data), 0
        for sample in islice(wanted_samples(opened, Wanted(**wanted), sort, descending), limit):
            found += 1
            facts = sample.facts
            if as_json:
                print_json({"key": sample.key, **msgspec.to_builtins(facts)})
            else:
                text = facts.texts[facts.target_text]
                rate = f"{facts.target.duration_s:.2f} s  {chars_per_s(sample):.1f} chars/s"
                print_line(printable(f"{sample.key}  {facts.id}  {facts.speaker}  {rate}  {text}"), to_stdout=True)
        if not found:
            known = ", ".join(opened.record.warnings) or "none"
            print_line(f"none of {len(opened.index)} samples is like that; warnings that are there: {printable(known)}")


@main.command()
@DATA
@click.argument("key")
@AS_JSON
@click.option("--sequence", is_flag=True, help="What the model reads and must say at every position.")
@CONFIG
@OVERRIDES
def show(
    data: str, key: str, as_json: bool, sequence: bool, config_path: Path | None, overrides: tuple[str, ...]
) -> None:
    """One sample of DATA."""
    from tools.inspect_shards.describe import describe
    from tools.inspect_shards.opened import open_data
    from tools.inspect_shards.samples import find_sample

    with explained():
        sample = find_sample(open_data(data), key)
        if sequence:
            from tools.inspect_shards.show_sequence import describe_sequence

            about = describe_sequence(sample, config_path, overrides)
            if as_json:
                print_json(about.facts())
                return
            for line in about.lines():
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
@DATA
@click.argument("key")
@click.argument("out", type=FileToWrite())
@click.option("--reference", is_flag=True, help="The reference's codes; default: the target's.")
@AS_JSON
@CONFIG
@OVERRIDES
def decode(
    data: str,
    key: str,
    out: Path,
    reference: bool,
    as_json: bool,
    config_path: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Write the sound of the codes of sample KEY as the wav file OUT, with the codec they were made with."""
    from tools.inspect_shards.decode import decode_sample
    from tools.inspect_shards.opened import open_data
    from tools.inspect_shards.samples import find_sample

    with explained():
        opened = open_data(data)
        sample = find_sample(opened, key)
        duration_s = decode_sample(opened.record, sample, reference, out, config_path, overrides)
    if as_json:
        part = "reference" if reference else "target"
        print_json({"key": sample.key, "part": part, "out": str(out), "duration_s": duration_s})
    print_line(f"{out}: {duration_s:.2f} s, the {'reference' if reference else 'target'} of {sample.key}")


@main.command()
@DATA
@click.argument("out", type=FileToWrite())
@click.option("--players", default=20, show_default=True, type=click.IntRange(min=0), help="Samples with sound.")
@RUN
@AS_JSON
@CONFIG
@OVERRIDES
def report(
    data: str,
    out: Path,
    players: int,
    run: Path | None,
    as_json: bool,
    config_path: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Write OUT, one HTML page: figures, rejected rows, and samples with sound decoded from their codes."""
    from tools.inspect_shards.figures import dataset_columns
    from tools.inspect_shards.opened import open_data
    from tools.inspect_shards.players import Players
    from tools.inspect_shards.rejects import rejects_by_reason
    from tools.inspect_shards.report import write_report
    from tools.inspect_shards.summary import all_facts, train_section

    with explained():
        opened = open_data(data)
        columns = dataset_columns(opened)
        facts = all_facts(opened, columns, train_section(config_path, overrides), run)
        facts["rejected"] = rejects_by_reason(opened.folder)
        sound = Players(opened.record, config_path, overrides, players)
        if sound.fault:
            print_line(f"nothing is decoded from the codes: {sound.fault}")
        with progress_bar("samples with sound", min(players, len(opened.index))) as on_sample:
            write_report(opened, columns, facts, sound, players, out, on_sample)
    if as_json:
        print_json({"report": str(out), **facts}, indent=1)
    print_line(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in any browser")


@main.command("compare")
@click.argument("a")
@click.argument("b")
@AS_JSON
def compare_command(a: str, b: str, as_json: bool) -> None:
    """Hold data set B (held out) against A (trained on). Exit status 1: an audio of one is learned in the other."""
    from tools.inspect_shards.compare import compare, open_side
    from tools.inspect_shards.summary import readable

    with explained():
        found = compare(open_side(a), open_side(b))
    if as_json:
        print_json(found, indent=1)
        sys.exit(1 if found["common"]["audio"] else 0)
    ours, theirs = found["counts"]["a"], found["counts"]["b"]
    names = list(dict.fromkeys([*ours, *theirs]))
    rows = [(name.replace("_", " "), readable(ours.get(name, "-")), readable(theirs.get(name, "-"))) for name in names]
    rows += [
        (f"{name}, median (apart by {part['distance']:.2f})", str(part["median_a"]), str(part["median_b"]))
        for name, part in found["distributions"].items()
    ]
    rows += [(name, *(readable(found[name][side]) or "none" for side in "ab")) for name in ("rejects", "warnings")]
    print_table(rows, headings=("", "A", "B"), to_stdout=True)
    for name, value in {**found["fingerprints"], **{f"common {k}": v for k, v in found["common"].items()}}.items():
        print_line(f"{name.replace('_', ' ')}: {printable(readable(value))}", to_stdout=True)
    sys.exit(1 if found["common"]["audio"] else 0)


@main.command("verify")
@DATA
@AS_JSON
def verify_command(data: str, as_json: bool) -> None:
    """Check every shard of DATA against its marker, and every sample of a damaged one."""
    from tools.inspect_shards.damage import dataset_faults
    from tools.inspect_shards.opened import open_data

    with explained():
        opened = open_data(data)
        record, index = opened.record, opened.index
        with progress_bar("shards", len(record.shards)) as on_shard:
            faults = dataset_faults(opened, on_shard)
    if as_json:
        print_json({"shards": len(record.shards), "faults": faults})
    for fault in faults:
        print_line(printable(fault))
    found = f"{len(faults)} faults" if faults else "sound"
    print_line(f"{len(record.shards)} shards, {len(index)} samples: {found}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
