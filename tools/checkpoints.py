"""`checkpoints`: what a run wrote, and what to do with it.

    list RUN            the complete checkpoints with their metrics
    merge RUN OUT       base + adapter -> one model folder in the native layout

A merged folder loads in transformers' `HiggsAudioV2ForConditionalGeneration` and in `speak`. `higgs_voice.json` in it
says how prompts must be built and which codec its codes belong to, so that speech is made exactly as it was trained.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from shards.config import ModelSection, SequenceSection

if TYPE_CHECKING:
    from torch import Tensor

    from train.model import HiggsAudio

VOICE_FILE = "higgs_voice.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Voice(msgspec.Struct, frozen=True, kw_only=True):
    """higgs_voice.json: what a merged model was trained with, and therefore must be spoken with."""

    base: str
    base_revision: str
    adapter: str
    step: int
    codec: str
    codec_revision: str
    codec_fingerprint: str
    sequence: SequenceSection


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The sections of a checkpoint's config.toml that a merged model must remember."""

    model: ModelSection
    sequence: SequenceSection


@click.group()
def main() -> None:
    """List and merge checkpoints."""


@main.command("list")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")
def list_command(run: Path, as_json: bool) -> None:
    """The complete checkpoints of RUN, oldest first."""
    with explained():
        from shards.errors import CheckpointError
        from train.checkpoint import complete_checkpoints

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
def merge(run: Path, out: Path) -> None:
    """Merge the newest checkpoint of RUN (or a checkpoint folder) into its base model and write OUT."""
    with explained():
        step = merge_checkpoint(run, out)
    click.echo(
        f"merged step {step} into {out}; next: speak {out} --reference WAV --reference-text TEXT --text TEXT", err=True
    )


def merge_checkpoint(run: Path, out: Path) -> int:
    """Write the merged model folder; returns the step it comes from. Raises CheckpointError."""
    import torch
    from huggingface_hub import save_torch_state_dict

    from shards.artifacts import codec_fingerprint, resolve
    from shards.config import read_config
    from shards.errors import CheckpointError
    from train.lora import load_adapter
    from train.weights import load_model, stored_dtype

    # 1. The checkpoint, and the base it was trained on.
    folder = find_checkpoint(run)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out}: exists and is not empty; give another folder")
    config = read_config(CheckpointConfig, only_sections(folder / "config.toml"))
    base_dir = resolve(config.model.base, config.model.revision, "model.base")
    codec_dir = resolve(config.model.codec, config.model.codec_revision, "model.codec")

    # 2. Base + adapter, in the base's own dtype.
    model = load_model(base_dir, stored_dtype(base_dir))
    load_adapter(model, folder / "adapter")
    with torch.no_grad():
        state = dict(merged_tensors(model))

    # 3. A folder of its own, complete or not there.
    partial = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_torch_state_dict(state, partial, max_shard_size="5GB")
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
    (partial / VOICE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(voice), indent=1) + b"\n")
    write_native_config(partial, model, config.model.codec)
    for name in TOKENIZER_FILES:
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, partial / name)
    if out.exists():
        out.rmdir()  # empty, checked above
    partial.rename(out)
    return step


def merged_tensors(model: HiggsAudio) -> Iterator[tuple[str, Tensor]]:
    """(native name, tensor) with every adapter added to its weight in fp32 and rounded once to the base's dtype."""
    from peft.tuners.lora import LoraLayer

    adapted = {
        f"{name}.base_layer.weight": module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    for name, parameter in model.named_parameters():
        if name in adapted:
            delta = adapted[name].get_delta_weight("default")  # pyright: ignore - the linear kinds have it
            merged = (parameter.float() + delta.float()).to(parameter.dtype)
            yield name.replace(".base_layer.weight", ".weight"), merged
        elif ".lora_" not in name:
            yield name, parameter.detach()


def find_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run folder, or the checkpoint folder itself."""
    from shards.errors import CheckpointError
    from train.checkpoint import complete_checkpoints

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


def write_native_config(folder: Path, model: HiggsAudio, codec: str) -> None:
    """config.json of the merged model. vLLM-Omni reads the codec from `audio_tokenizer_id`."""
    from train.model_config import native_config

    config = native_config(model.config)
    config["dtype"] = str(model.audio_lm_head.weight.dtype).removeprefix("torch.")
    config["random_weights"] = False
    config["audio_tokenizer_id"] = codec
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


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
