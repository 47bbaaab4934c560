"""`checkpoints card RUN OUT.md`: the command; what stands in a card is decided in `card.py`."""

from __future__ import annotations

from pathlib import Path

import click

from shards.terminal import FileToWrite, explained, print_json, print_line


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=FileToWrite())
@click.option(
    "--which", default="auto", show_default=True, help="Of RUN: best, newest, a step; auto: best if there is one."
)
@click.option(
    "--evaluation", "evaluations", multiple=True, type=click.Path(path_type=Path), metavar="FOLDER",
    help="An OUT of `evaluate`, besides those in RUN/evaluations; may be repeated.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON on stdout.")
def card(run: Path, out: Path, which: str, evaluations: tuple[Path, ...], as_json: bool) -> None:
    """Write the model card of a checkpoint of RUN (or of a checkpoint folder) as Markdown, and its curves as SVG beside it."""
    with explained():
        from shards.errors import CheckpointError
        from shards.writer import write_bytes
        from tools.checkpoints import card as module
        from tools.checkpoints.merge import choose_checkpoint
        from tools.checkpoints.sound import require_sound

        folder, chosen = choose_checkpoint(run, which)
        if out.suffix.lower() == ".svg":
            raise CheckpointError(f"{out}: the curves would overwrite the card; give a name that ends in .md")
        require_sound(folder)
        facts = module.gather(folder, "adapter", evaluations)
        curves = out.with_suffix(".svg")
        out.parent.mkdir(parents=True, exist_ok=True)
        if facts.curves:
            write_bytes(curves, facts.curves.encode())
        write_bytes(out, module.card(facts, curves.name).encode())
    written = [str(out), *([str(curves)] if facts.curves else [])]
    if as_json:
        print_json(
            {
                "checkpoint": str(folder),
                "chosen": chosen,
                "step": facts.step,
                "evaluations": len(facts.rows),
                "written": written,
            }
        )
    print_line(f"card of step {facts.step} ({chosen}), {len(facts.rows)} evaluation rows: {', '.join(written)}")
    if not facts.rows:
        print_line(
            f"no evaluation of this checkpoint: evaluate RUN DATA {run}/evaluations/NAME, or --evaluation FOLDER"
        )
    print_line("read it before you publish: consent and licence are yours to state")
