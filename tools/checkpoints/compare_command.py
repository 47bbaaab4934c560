"""`checkpoints compare` and `checkpoints average`: the commands of several checkpoints."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shards.terminal import FileToWrite, explained, print_json, print_line, print_table

if TYPE_CHECKING:
    from tools.checkpoints.compare import Comparison


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="CHECKPOINT... | RUN...", type=click.Path(path_type=Path))
@click.option(
    "--evaluation", "evaluations", multiple=True, type=click.Path(path_type=Path), metavar="FOLDER",
    help="An OUT of `evaluate`, besides those in RUN/evaluations; may be repeated.",
)  # fmt: skip
@click.option("--html", type=FileToWrite(), metavar="OUT.html", help="Write tables and plot as one page, too.")
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")
def compare(paths: tuple[Path, ...], evaluations: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Losses, evaluations, norms and distances side by side, and which checkpoint to take by what criterion.

    One RUN: all its checkpoints. Several: the best of each.
    """
    with explained():
        import msgspec

        from shards.writer import write_bytes
        from tools.checkpoints.compare import compare as compared
        from tools.checkpoints.compare_page import compare_page

        found = compared(paths, evaluations)
        if html:
            html.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(html, compare_page(found).encode())
    if as_json:
        print_json(msgspec.to_builtins(found), indent=1)
    else:
        show(found)
    if html:
        print_line(f"page: {html}")


def show(found: Comparison) -> None:
    """Tables on stdout."""
    codebooks = sorted(
        {name for entry in found.entries for name in entry.held_out if name.startswith("eval/codebook_")}
    )
    headings = ("checkpoint", "step", "audio", "text", *(name.split("_")[-1] for name in codebooks), "CER", "update")
    rows = []
    for entry in found.entries:
        losses = [entry.held_out.get(name) for name in ("eval/audio_loss", "eval/text_loss", *codebooks)]
        errors = [row.cer for row in entry.evaluations if row.cer is not None]
        norm = sum(value**2 for value in entry.norms.values()) ** 0.5
        rows.append(
            (
                entry.name,
                str(entry.step),
                *("-" if loss is None else f"{loss:.3f}" for loss in losses),
                ", ".join(f"{value:.1%}" for value in errors) or "-",
                f"{norm:.3g}",
            )
        )
    width = max(100, 9 * len(headings) + max(len(row[0]) for row in rows))
    print_table(rows, headings=headings, to_stdout=True, width=width)
    for entry in found.entries:
        for row in entry.evaluations:
            for part in row.differences:
                interval = "" if part.low is None or part.high is None else f" [{part.low:+.4f}, {part.high:+.4f}]"
                print_line(
                    f"{entry.name}, {row.name}: {part.metric} - base {part.value:+.4f}{interval} {part.verdict}",
                    to_stdout=True,
                )
    groups = sorted({group for entry in found.entries for group in entry.norms})
    print_table(
        [(group, *(f"{entry.norms.get(group, 0.0):.3g}" for entry in found.entries)) for group in groups],
        headings=("norm of the update", *(entry.name for entry in found.entries)),
        to_stdout=True,
        width=max(100, sum(len(entry.name) + 4 for entry in found.entries) + 40),
    )
    for part in found.distances:
        print_line(
            f"{part.first} - {part.second}: distance {part.relative:.3f} of their norm, cosine {part.cosine:.3f}",
            to_stdout=True,
        )
    for note in found.notes:
        print_line(f"note: {note}")
    print_line(
        f"take: {found.winner} ({found.criterion})" if found.winner else f"take: {found.criterion}", to_stdout=True
    )


@click.command()
@click.argument(
    "paths", nargs=-1, required=True, metavar="CHECKPOINT CHECKPOINT... OUT", type=click.Path(path_type=Path)
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
def average(paths: tuple[Path, ...], as_json: bool) -> None:
    """Write the average of the updates of several checkpoints into OUT, as a checkpoint of the same rank.

    Of a RUN its best checkpoint is taken, else its newest. OUT/average.json says what cutting it back to this rank lost.
    """
    if len(paths) < 3:
        raise click.UsageError("expected two checkpoints or more, and OUT")
    *given, out = paths
    with explained():
        import msgspec

        from tools.checkpoints.average import average_checkpoints
        from tools.checkpoints.merge import choose_checkpoint

        report = average_checkpoints([choose_checkpoint(path)[0] for path in given], out)
        if as_json:
            print_json(msgspec.to_builtins(report), indent=1)
    worst = max(report.error_of_groups, key=lambda group: report.error_of_groups[group])
    print_line(
        f"average of {len(report.sources)} updates, rank {report.rank}: the cut lost {report.error:.2%} of its norm (most: "
        f"{worst}, {report.error_of_groups[worst]:.2%}); the average is {report.shrinks_to:.0%} as long as the updates are"
    )
    if report.shrinks_to < 0.7:
        print_line(
            "warning: the updates point to different places, so little is left of each; take the better one instead"
        )
    print_line(f"next: checkpoints merge {shlex.quote(str(out))} MERGED, or evaluate {shlex.quote(str(out))} DATA OUT")
