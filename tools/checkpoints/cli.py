"""`checkpoints`: what a run wrote, and what to do with it.

    list RUN            the complete checkpoints with their metrics
    validate PATH       whether a checkpoint is complete, fits its base and does something
    compare RUN|A B     side by side, and which one to take
    average A B OUT     the mean of their updates as one checkpoint
    merge RUN OUT       base + adapter -> one model folder, in the native or the older layout
    convert MODEL OUT   a model or adapter folder of either layout -> the other
    card RUN OUT.md     the model card
    quantize MODEL OUT  a model folder with its decoder in 8 or 4 bits

A merged folder loads in transformers' `HiggsAudioV2ForConditionalGeneration` (or boson's `HiggsAudioModel`) and in
`speak`. `higgs_voice.json` in it says how prompts must be built and which codec its codes belong to, so that speech is
made exactly as it was trained.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from shards.terminal import explained, print_json, print_line
from tools.checkpoints.card_command import card
from tools.checkpoints.compare_command import average, compare
from tools.checkpoints.quantize_command import quantize

if TYPE_CHECKING:
    from tools.checkpoints.model_folder import Layout


LAYOUT = click.option(
    "--layout",
    type=click.Choice(["native", "boson"]),
    default="native",
    show_default=True,
    help="native: transformers >= 5.3 and vLLM-Omni. boson: boson-multimodal 0.1.1.",
)


@click.group()
def main() -> None:
    """List, validate, compare, average, merge, quantize and convert checkpoints; write their card."""


main.add_command(quantize)
main.add_command(compare)
main.add_command(average)
main.add_command(card)


@main.command("list")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")
def list_command(run: Path, as_json: bool) -> None:
    """The checkpoints of RUN, oldest first: step, size, held-out losses, evaluations, whether complete and best.

    Exit status 1 where one is damaged.
    """
    with explained():
        from tools.checkpoints.listing import listed

        found = listed(run)
    if as_json:
        print_json({row.folder: msgspec.to_builtins(row) for row in found}, indent=1)
    else:
        for row in found:
            print_line(row.in_words(), to_stdout=True)
    damaged = [row for row in found if row.faults]
    for row in damaged:
        print_line(f"error: {row.folder}: damaged: {row.faults[0]}; leave it out, or go on from an older one")
    if damaged:
        sys.exit(1)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), help="Samples for the model's vote on labels; default: the RUN's."
)
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")
def validate(path: Path, data: Path | None, as_json: bool) -> None:
    """Check PATH in every way: a checkpoint folder, RUN/best, RUN (its newest), or a merged or quantized model's folder.

    Exit status 1 if a check fails.
    """
    with explained():
        from tools.checkpoints.merge import find_checkpoint

        if (path / "config.json").is_file() and not (path / "COMPLETE").is_file():
            from tools.checkpoints.validate_model import validate_model

            folder, findings = path, validate_model(path)
        else:
            from tools.checkpoints.evaluations import run_of
            from tools.checkpoints.sound import gone, say_if_written
            from tools.checkpoints.validate import validate_checkpoint

            folder = find_checkpoint(path)
            say_if_written(run_of(folder))
            findings = validate_checkpoint(folder, data)
            if not folder.is_dir():  # its checks have failed because of that
                raise gone(folder)
    if as_json:
        print_json(
            {"checkpoint": str(folder), "checks": [msgspec.to_builtins(finding) for finding in findings]}, indent=1
        )
    for finding in findings:
        print_line(
            f"{'ok    ' if finding.passed else 'FAILED'}  {finding.check}: {finding.detail}", to_stdout=not as_json
        )
    failed = sum(not finding.passed for finding in findings)
    if failed:
        print_line(f"error: {folder}: {failed} of {len(findings)} checks failed")
        sys.exit(1)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@LAYOUT
@click.option("--base", help="Where its base lies now, if not where config.toml says: folder or hub id.")
@click.option("--codec", help="The same of its codec.")
@click.option("--whisper", help="The same of its Whisper tower, if the base has none.")
@click.option(
    "--which", default="auto", show_default=True, help="Of RUN: best, newest, a step; auto: best if there is one."
)
@click.option(
    "--dtype",
    type=click.Choice(["base", "float32", "bfloat16"]),
    default="base",
    show_default=True,
    help="Of the merged weights; float32 keeps what rounding would lose, in twice the size.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the proof as JSON on stdout.")
def merge(
    run: Path,
    out: Path,
    layout: Layout,
    base: str | None,
    codec: str | None,
    whisper: str | None,
    which: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Merge a checkpoint of RUN (or a checkpoint folder) into its base model and write OUT; OUT/merge.json has the proof."""
    with explained():
        from tools.checkpoints.merge import MovedTo, merge_checkpoint
        from tools.checkpoints.merge_proof import ENOUGH_KEPT, PROBE_FRAMES

        proof = merge_checkpoint(run, out, layout, MovedTo(base, codec, whisper), which, dtype)
    if as_json:
        print_json(msgspec.to_builtins(proof), indent=1)
    group, kept = proof.least_kept
    ended = "" if proof.greedy_frames == PROBE_FRAMES else " (it ended by itself)"
    print_line(
        f"merged as {proof.dtype}: the adapter changes logits by {proof.adapter_changes_logits:.2%}, merging differs by "
        f"{proof.merged_differs:.2%} of that; {proof.greedy_frames_equal} of {proof.greedy_frames} greedy frames are "
        f"equal{ended}, and the likeliest codes behind {proof.likeliest_frames_equal} of {PROBE_FRAMES} seeded frames; "
        f"rounding kept {kept:.1%} of the update or more (least: {group})"
    )
    if kept < ENOUGH_KEPT:
        print_line(
            f"warning: rounding to {proof.dtype} lost much of the update of {group}; merge with --dtype float32, or use "
            "the adapter itself"
        )
    print_line(f"merged step {proof.step} ({proof.chosen}) into {out}")
    print_line(f"next: speak {shlex.quote(str(out))} --reference WAV --reference-text TEXT --text TEXT")


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@LAYOUT
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON on stdout.")
def convert(model: Path, out: Path, layout: Layout, as_json: bool) -> None:
    """Write the model (or adapter) folder MODEL, of either layout, as another layout into OUT. Every weight is kept."""
    with explained():
        from shards.errors import CheckpointError
        from tools.checkpoints.model_folder import check_empty, convert_adapter, convert_model

        check_empty(out)
        if (model / "adapter_config.json").is_file():
            num_tensors = convert_adapter(model, out, layout)
        elif (model / "config.json").is_file():
            num_tensors = convert_model(model, out, layout)
        else:
            raise CheckpointError(
                f"{model}: neither config.json nor adapter_config.json; give a model or adapter folder"
            )
    if as_json:
        print_json({"out": str(out), "layout": layout, "tensors": num_tensors})
    print_line(f"{out}: {num_tensors} tensors in the {layout} layout")


if __name__ == "__main__":
    main()
