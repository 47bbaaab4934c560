"""`checkpoints`: what a run wrote, and what to do with it.

    list RUN            the complete checkpoints with their metrics
    merge RUN OUT       base + adapter -> one model folder, in the native or the older layout
    convert MODEL OUT   a model or adapter folder of either layout -> the other

A merged folder loads in transformers' `HiggsAudioV2ForConditionalGeneration` (or boson's `HiggsAudioModel`) and in
`speak`. `higgs_voice.json` in it says how prompts must be built and which codec its codes belong to, so that speech is
made exactly as it was trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from shards.config import FeaturesSection, ModelSection, SequenceSection

if TYPE_CHECKING:
    from tools.model_folder import Layout


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The sections of a checkpoint's config.toml that a merged model must remember."""

    model: ModelSection
    features: FeaturesSection
    sequence: SequenceSection


LAYOUT = click.option(
    "--layout",
    type=click.Choice(["native", "boson"]),
    default="native",
    show_default=True,
    help="native: transformers >= 5.3 and vLLM-Omni. boson: boson-multimodal 0.1.1.",
)


@click.group()
def main() -> None:
    """List, merge and convert checkpoints."""


@main.command("list")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")
def list_command(run: Path, as_json: bool) -> None:
    """The complete checkpoints of RUN, oldest first."""
    with explained():
        from shards.errors import CheckpointError
        from train.checkpoint_folders import complete_checkpoints

        folders = complete_checkpoints(run)
        if not folders:
            raise CheckpointError(f"{run}: no complete checkpoint here; give the RUN folder of `train`")
        metrics = {str(folder): json.loads((folder / "metrics.json").read_text()) for folder in folders}
        if as_json:
            click.echo(json.dumps(metrics, indent=1))
            return
        for folder, values in metrics.items():
            losses = "  ".join(f"{name.split('/')[1]} {values[name]:.4f}" for name in sorted(values) if "_loss" in name)
            click.echo(f"{folder}  {losses}")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@LAYOUT
def merge(run: Path, out: Path, layout: Layout) -> None:
    """Merge the newest checkpoint of RUN (or a checkpoint folder) into its base model and write OUT."""
    with explained():
        step = merge_checkpoint(run, out, layout)
    click.echo(
        f"merged step {step} into {out}; next: speak {out} --reference WAV --reference-text TEXT --text TEXT", err=True
    )


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@LAYOUT
def convert(model: Path, out: Path, layout: Layout) -> None:
    """Write the model (or adapter) folder MODEL, of either layout, as another layout into OUT. Every weight is kept."""
    with explained():
        from shards.errors import CheckpointError
        from tools.model_folder import check_empty, convert_adapter, convert_model

        check_empty(out)
        if (model / "adapter_config.json").is_file():
            num_tensors = convert_adapter(model, out, layout)
        elif (model / "config.json").is_file():
            num_tensors = convert_model(model, out, layout)
        else:
            raise CheckpointError(
                f"{model}: neither config.json nor adapter_config.json; give a model or adapter folder"
            )
    click.echo(f"{out}: {num_tensors} tensors in the {layout} layout", err=True)


def merge_checkpoint(run: Path, out: Path, layout: Layout = "native") -> int:
    """Write the merged model folder; returns the step it comes from. Raises CheckpointError."""
    import dataclasses

    from shards.artifacts import codec_fingerprint, resolve
    from shards.config import read_config
    from shards.errors import CheckpointError
    from tools.model_folder import Voice, check_empty, merged_state, write_model_folder
    from train.checkpoint_folders import damage
    from train.conditioning import decide_conditioning
    from train.lora import load_adapter
    from train.weights import load_model, stored_dtype

    # 1. The checkpoint, and the base it was trained on.
    folder = find_checkpoint(run)
    check_empty(out)
    faults = damage(folder)
    if faults:
        raise CheckpointError(f"{folder}: damaged: {faults[0]}; give a sound checkpoint's folder (`checkpoints list`)")
    config = read_config(CheckpointConfig, only_sections(folder / "config.toml"))
    base_dir = resolve(config.model.base, config.model.revision, "model.base")
    codec_dir = resolve(config.model.codec, config.model.codec_revision, "model.codec")
    conditioning = decide_conditioning(config.sequence, config.features, base_dir)

    # 2. Base + adapter, in the base's own dtype.
    model = load_model(base_dir, stored_dtype(base_dir), conditioning=conditioning)
    load_adapter(model, folder / "adapter")
    state = merged_state(model)

    # 3. A folder of its own, complete or not there.
    step = int(folder.name.removeprefix("checkpoint-"))
    voice = Voice(
        base=config.model.base,
        base_revision=config.model.revision,
        adapter=str(folder / "adapter"),
        step=step,
        codec=config.model.codec,
        codec_revision=config.model.codec_revision,
        codec_fingerprint=codec_fingerprint(codec_dir),
        sequence=config.sequence,
    )
    trained = dataclasses.replace(model.config, is_random=False)
    write_model_folder(out, state, trained, layout, tokenizer_dir=base_dir, codec=config.model.codec, voice=voice)
    return step


def find_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run folder, or the checkpoint folder itself."""
    from shards.errors import CheckpointError
    from train.checkpoint_folders import complete_checkpoints

    if (run / "COMPLETE").is_file():
        return run
    folders = complete_checkpoints(run)
    if not folders:
        raise CheckpointError(
            f"{run}: no complete checkpoint here; give the RUN folder of `train` or a checkpoint folder"
        )
    return folders[-1]


def only_sections(path: Path) -> Path:
    from shards.errors import CheckpointError

    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete")
    return path


@contextmanager
def explained() -> Iterator[None]:
    """Faults a person can act on become one line and exit status 1."""
    from shards.errors import PipelineError

    try:
        yield
    except PipelineError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
