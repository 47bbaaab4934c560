"""The state of a run inside a checkpoint: LoRA weights, optimizer moments and the number of finished steps.

    state/tensors.safetensors   model/NAME and optimizer/NAME/MOMENT, whole and not sharded
    state/state.json            the format, and the step

In: model and optimizer. Out: these two files, and back. Checkpoints are taken from strangers, so nothing here can hold code:
no pickle, in no file. The price against torch's distributed format, whose metadata are a pickle, is that the first rank
gathers and writes everything: LoRA and its moments, not the base. The number of ranks may change in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from shards.encoders.tensor_files import load_tensors, save_tensors
from shards.errors import CheckpointError
from shards.writer import write_json
from train.model.lora import lora_parameters
from train.run_folder.checkpoint_folders import STATE, STATE_FORMAT, State, read_step

ONLY_TRAINABLE = StateDictOptions(ignore_frozen_params=True)
WHOLE_ON_CPU = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)
TENSORS = "state/tensors.safetensors"


def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies on the CPU, whole; empty on other ranks than the first. Every rank must call this."""
    # Weights first: taking them shards the model again where a forward without a backward (an evaluation) left it gathered;
    # in that state the optimizer's weights are not the model's, and torch fails with KeyError.
    weights = gather_weights(model)
    optimizer_state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=WHOLE_ON_CPU)
    tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
    for name, moments in optimizer_state.get("state", {}).items():
        for moment, tensor in moments.items():
            tensors[f"optimizer/{name}/{moment}"] = tensor.detach().cpu().clone().contiguous()
    return tensors if weights else {}


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """Trainable weights, whole and on the CPU; empty on other ranks than the first. Every rank must call this."""
    found: dict[str, Any] = get_model_state_dict(model, options=WHOLE_ON_CPU)
    names = {name for name, _ in lora_parameters(model)}
    return {name: tensor.clone().contiguous() for name, tensor in found.items() if name in names}


def write_state(folder: Path, tensors: dict[str, Tensor], step: int) -> None:
    """Into the checkpoint folder that is being written."""
    (folder / TENSORS).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / TENSORS)
    write_json(folder / STATE, State(format=STATE_FORMAT, step=step))


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put weights and moments into model and optimizer; returns the step. Every rank must call this.

    Learning rate, weight decay and the other settings stay as they are. Raises CheckpointError naming every tensor that
    does not fit.
    """
    step = read_step(folder)
    saved = load_tensors(folder / TENSORS)
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    own: dict[str, Any] = get_model_state_dict(model, options=ONLY_TRAINABLE)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=ONLY_TRAINABLE)
    wanted = {f"model/{name}": own[name] for name, _ in lora_parameters(model)} | dict(moments_of(state))
    problems = [f"missing {name}" for name in wanted.keys() - saved.keys()]
    problems += [f"unexpected {name}" for name in saved.keys() - wanted.keys()]
    problems += [
        f"{name} is {saved[name].dtype} {list(saved[name].shape)}, the run has {wanted[name].dtype} {list(wanted[name].shape)}"
        for name in wanted.keys() & saved.keys()
        if (saved[name].shape, saved[name].dtype) != (wanted[name].shape, wanted[name].dtype)
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(f"{folder}: {TENSORS} does not fit the run: {shown}; it was changed or is of another run")
    with torch.no_grad():
        for name, parameter in lora_parameters(model):
            parameter.copy_(placed_like(own[name], saved[f"model/{name}"]))
    for name, moments in state["state"].items():
        for moment, tensor in moments.items():
            moments[moment] = placed_like(tensor, saved[f"optimizer/{name}/{moment}"])
    set_optimizer_state_dict(model, optimizer, state, options=ONLY_TRAINABLE)
    for group, asked in zip(optimizer.param_groups, settings, strict=True):
        group.update(asked)  # weight decay as it is asked for now
    return step


def moments_of(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, tensor) of an optimizer state by parameter names."""
    for name, moments in state["state"].items():
        for moment, tensor in moments.items():
            yield f"optimizer/{name}/{moment}", tensor


def placed_like(own: Tensor, whole: Tensor) -> Tensor:
    """`whole` on the device of `own`, and sharded as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(own, DTensor):
        return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)
    return whole.to(own.device)
