"""The matrix products of one column, as few of them as the weights allow.

In: linear layers. Out: functions of rows. Layers that read the same rows become one product: their weights are laid one
behind the other in one block of memory, and the layers go on as views of it, so it costs no memory. Nothing is remembered
about it but where the weights lie; whoever replaces a weight gets a new block at the next engine. Layers with an adapter are
called as they are, and a model that has any keeps all its weights where they are, because it may be in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_plain(layer: nn.Module) -> bool:
    """A linear layer without bias, adapter or shards: its product is F.linear with its weight."""
    return type(layer) is nn.Linear and layer.bias is None and not isinstance(layer.weight, DTensor)


def has_adapters(model: nn.Module) -> bool:
    return any(".lora_" in name for name, _ in model.named_parameters())


def joined(layers: Sequence[nn.Module], may_move: bool) -> Callable[[Tensor], Tensor]:
    """x [B, in] -> the outputs of all layers side by side [B, sum of out]."""
    if may_move and all(is_plain(layer) for layer in layers):
        weight = lay_together([layer.weight for layer in layers])  # pyright: ignore[reportArgumentType]
        return lambda x: F.linear(x, weight)
    return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)


def fast_product(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """x [B, in] -> layer(x) [B, out]; on a CPU with a copy of the weight that lies the other way round.

    For the head: MKL multiplies one row by a wide weight at 0.3 to 0.7 of the rate that its transposed copy allows (NOTES.md).
    """
    if is_plain(layer) and layer.weight.device.type == "cpu":
        assert isinstance(layer.weight, Tensor)
        transposed = layer.weight.detach().T.contiguous()
        return lambda x: torch.mm(x, transposed)
    return layer


def added(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """(rows [B, out], x [B, in]) -> rows + layer(x), the sum as part of the product."""
    if is_plain(layer):
        assert isinstance(layer.weight, Tensor)
        transposed = layer.weight.detach().T
        return lambda rows, x: torch.addmm(rows, x, transposed)
    return lambda rows, x: rows + layer(x)


def lay_together(weights: list[nn.Parameter]) -> Tensor:
    """Weights [out, in] as one [sum of out, in]; afterwards each parameter is a view of it."""
    first, width = weights[0].detach(), weights[0].shape[1]
    height = sum(len(weight) for weight in weights)
    if not lie_together(weights):
        block = torch.cat([weight.detach() for weight in weights])
        start = 0
        for weight in weights:
            weight.data = block[start : start + len(weight)]
            start += len(weight)
        return block
    return first.as_strided((height, width), (width, 1), first.storage_offset())


def lie_together(weights: list[nn.Parameter]) -> bool:
    """One behind the other in the same storage."""
    storage = weights[0].untyped_storage().data_ptr()
    expected = weights[0].storage_offset()
    for weight in weights:
        is_next = weight.untyped_storage().data_ptr() == storage and weight.storage_offset() == expected
        if not (is_next and weight.is_contiguous()):
            return False
        expected += weight.numel()
    return True
