"""Loads a checkpoint folder of either layout into the model, strictly.

In: safetensors, one file or sharded with an index, in the native layout (transformers) or the older one (boson), told
apart by their tensor names. Every missing, unexpected or wrongly shaped tensor is listed; nothing is skipped. Tensors
are read one by one and cast, so the peak is one model, not two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from shards.errors import CheckpointError
from train.model import HiggsAudio
from train.model_config import read_model_config

# boson name -> native name; everything under layers. keeps its own (transformers convert_higgs_audio_v2_to_hf.py, and
# checked on random weights: 47 of 47 tensors at three layers).
BOSON_RENAMES = [
    (re.compile(r"^audio_decoder_proj\.(audio_lm_head|text_lm_head)\."), r"\1."),
    (re.compile(r"^audio_codebook_embeddings\."), "model.embed_audio_tokens.embed_audio_tokens."),
    (re.compile(r"^(layers|norm|embed_tokens)\."), r"model.\1."),
]


def native_name(name: str) -> str:
    """The native name of a tensor of either layout."""
    for pattern, replacement in BOSON_RENAMES:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return name


def load_model(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", text_head: bool = True
) -> HiggsAudio:
    """The model with the folder's weights. `text_head=False` leaves the head out: generation does not need it.

    Raises CheckpointError naming every tensor that does not fit.
    """
    with torch.device("meta"):
        model = HiggsAudio(read_model_config(folder))
    if not text_head:
        del model.text_lm_head
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in read_tensors(folder):
        if name not in expected:
            if name != "text_lm_head.weight":
                problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, config.json says {list(expected[name])}")
        else:
            state[name] = tensor.to(device=device, dtype=dtype)
    problems += [f"missing {name}" for name in expected if name not in state and not any(name in p for p in problems)]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{folder}: weights do not fit the model: {shown}")
    model.load_state_dict(state, assign=True)
    return model


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(native name, tensor) of every tensor in the folder's safetensors files."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a dict
                yield native_name(name), file.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise CheckpointError(f"{folder}: missing weight file {', '.join(absent)}; download the whole repository again")
    return files


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype the folder's weights are stored in."""
    return next(tensor.dtype for _, tensor in read_tensors(folder))
