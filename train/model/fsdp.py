"""FSDP2 around the model: which weights are sharded over the ranks, and what a sharded tensor is as a whole.

In: a model and a `World`. Out: the same model whose trainable weights and optimizer state are sharded. The surprising decision:
the frozen base is replicated, because on a card that holds it nothing needs to be gathered at every layer; `shard_base` shards
it too, for small cards, at the price of a gather per layer and pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.world import World


def apply_fsdp(model: nn.Module, blocks: nn.ModuleList, world: World, bf16: bool, shard_base: bool) -> None:
    """Shard trainable weights (and with `shard_base` all) over the ranks, one unit per block and one for the rest.

    Build the optimizer afterwards. Gradients are summed, not averaged: losses are divided by global counts instead.
    """
    if not world.is_distributed:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # it would round cos, sin and loss weights to bf16 without a word
    )
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    options: dict[str, Any] = {
        "mesh": init_device_mesh(world.device.type, (world.size,)),
        "mp_policy": policy,
        "ignored_params": set() if shard_base else frozen,
    }
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum; for NCCL it is the plain one
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "next_logits")  # speaking gathers weights as training does


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward passes reduce gradients over ranks: only the last one of a step need do so."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor of a sharded one; every rank must call this."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def own_numel(parameter: torch.nn.Parameter) -> int:
    """Weights of this rank's part."""
    from torch.distributed.tensor import DTensor

    data = parameter.data
    return data.to_local().numel() if isinstance(data, DTensor) else data.numel()
