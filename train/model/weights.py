"""Loads a checkpoint folder of either layout into the model, strictly.

In: safetensors, one file or sharded with an index, in the native layout (transformers) or the older one (boson), known
apart by their tensor names. Every missing, unexpected or wrongly shaped tensor is listed; nothing is skipped but what the
caller names. Tensors are read one by one and cast, so the peak is one model, not two.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shards.encoders.tensor_files import tensors_in, weight_files
from shards.encoders.whisper_tower import encoder_tensors
from shards.errors import CheckpointError
from train.model.conditioning import CODES, Conditioning
from train.model.config import read_model_config
from train.model.decoder import HiggsAudio
from train.model.quantized import put_quantized, read_quantization

# boson name -> native name; everything under layers. keeps its own (transformers convert_higgs_audio_v2_to_hf.py, and
# checked on random weights: 47 of 47 tensors at three layers).
BOSON_RENAMES = [
    (re.compile(r"^audio_decoder_proj\.(audio_lm_head|text_lm_head)\."), r"\1."),
    (re.compile(r"^audio_codebook_embeddings\."), "model.embed_audio_tokens.embed_audio_tokens."),
    (re.compile(r"^(layers|norm|embed_tokens)\."), r"model.\1."),
]
NATIVE_RENAMES = [
    (re.compile(r"^(audio_lm_head|text_lm_head)\."), r"audio_decoder_proj.\1."),
    (re.compile(r"^model\.embed_audio_tokens\.embed_audio_tokens\."), "audio_codebook_embeddings."),
    (re.compile(r"^model\."), ""),
]
# embed_tokens.embedding_frozen.weight, audio_decoder_proj.text_lm_head.linear_trainable.weight, ...
PARTLY_FROZEN = re.compile(r"^(.*)\.(?:embedding|linear)_(frozen|trainable)\.weight$")
TOWER = ("audio_tower.", "audio_encoder_proj.")


def native_name(name: str) -> str:
    """The native name of a tensor of either layout."""
    return _renamed(name, BOSON_RENAMES)


def boson_name(name: str) -> str:
    """boson's name of a native tensor; the inverse of `native_name`."""
    return _renamed(name, NATIVE_RENAMES)


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return name


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    text_head: bool = True,
    conditioning: Conditioning = CODES,
) -> HiggsAudio:
    """The model with the folder's weights. `text_head=False` leaves the head out: generation does not need it.

    With Whisper conditioning the tower comes from `conditioning.tower_dir`, and a projection that the folder does not
    hold is zero. Quantized layers keep their bits. Raises CheckpointError naming every tensor that does not fit.
    """
    model = empty_model(folder, conditioning)
    if quantization := read_quantization(folder):
        put_quantized(model, quantization, folder)
    if not text_head:
        del model.text_lm_head
    own = model.state_dict(keep_vars=True)
    tensors = checked_tensors(folder, {name: tensor.shape for name, tensor in own.items()}, conditioning, text_head)
    state = {
        name: tensor.to(device=device, dtype=dtype if isinstance(own[name], nn.Parameter) else None)
        for name, tensor in tensors
    }
    model.load_state_dict(state, assign=True)
    return model


def empty_model(folder: Path, conditioning: Conditioning) -> HiggsAudio:
    """The folder's model on the meta device: shapes without weights."""
    config = dataclasses.replace(read_model_config(folder), whisper=conditioning.sizes)
    with torch.device("meta"):
        return HiggsAudio(config, conditioning.runs_tower)


def load_sharded(model: HiggsAudio, folder: Path, conditioning: Conditioning, rank: int, world_size: int) -> None:
    """Fill this rank's rows of a sharded model's frozen weights; LoRA's names are skipped. Raises CheckpointError.

    The files are mapped, so that only the pages of those rows are read. FSDP2 cuts the first axis as `torch.chunk` does.
    """
    own = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }
    expected = {name: parameter.shape for name, parameter in own.items()}
    for name, tensor in checked_tensors(folder, expected, conditioning):
        data = own[name].data
        rows, local = tensor, data
        if isinstance(data, DTensor):
            size = -(-len(tensor) // world_size)
            rows, local = tensor[rank * size : (rank + 1) * size], data.to_local()
        assert rows.shape == local.shape, f"{name}: rank {rank} holds {list(local.shape)}, cut {list(rows.shape)}"
        local.copy_(rows)


def checked_tensors(
    folder: Path, expected: dict[str, torch.Size], conditioning: Conditioning, text_head: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Every expected tensor once. Raises CheckpointError at the end, listing all that do not fit."""
    left_out = left_out_prefixes(conditioning, read_model_config(folder).whisper is not None, text_head)
    seen: set[str] = set()
    problems: list[str] = []
    for name, tensor in source_tensors(folder, conditioning, expected):
        if name.startswith(left_out):
            continue
        if name not in expected:
            problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, config.json says {list(expected[name])}")
        else:
            yield name, tensor
        seen.add(name)
    problems += [f"missing {name}" for name in expected if name not in seen]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{folder}: weights do not fit the model: {shown}")


def left_out_prefixes(conditioning: Conditioning, has_tower: bool, text_head: bool) -> tuple[str, ...]:
    """What the checkpoint holds and this use does not need."""
    left_out = [] if text_head else ["text_lm_head."]
    if conditioning.tower_dir is None:
        left_out += TOWER if has_tower else ()
    elif not conditioning.runs_tower:
        left_out.append("audio_tower.")
    return tuple(left_out)


def source_tensors(
    folder: Path, conditioning: Conditioning, expected: dict[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """The folder's tensors, and those that Whisper conditioning adds to a base without a tower."""
    yield from read_tensors(folder)
    if conditioning.tower_dir and not conditioning.has_projector:
        for name in ("audio_encoder_proj.linear.weight", "audio_encoder_proj.linear.bias"):
            yield name, torch.zeros(expected[name])
        for name, tensor in encoder_tensors(conditioning.tower_dir):
            yield f"audio_tower.{name}", tensor


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(native name, tensor) of every tensor in the folder's safetensors files.

    Checkpoints of boson's own training split a matrix into `X_frozen.weight` and `X_trainable.weight`; they come out
    joined, frozen rows first.
    """
    halves: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for name, tensor in tensors_in(path):
            match = PARTLY_FROZEN.match(name)
            if match is None:
                yield native_name(name), tensor
                continue
            whole, half = match.groups()
            halves[half + whole] = tensor
            both = [halves[kind + whole] for kind in ("frozen", "trainable") if kind + whole in halves]
            if len(both) == 2:
                del halves["frozen" + whole], halves["trainable" + whole]
                yield native_name(f"{whole}.weight"), torch.cat(both)
    if halves:
        raise CheckpointError(f"{folder}: the other half is missing of {', '.join(sorted(halves))}")


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype the folder's weights are stored in; of a quantized model, of those that are whole."""
    found = next((tensor.dtype for name, tensor in read_tensors(folder) if name.endswith(".weight")), None)
    if found is None or not found.is_floating_point:
        raise CheckpointError(f"{folder}: its first weight is {found}; expected floating point; download it again")
    return found
