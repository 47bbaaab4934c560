"""The matrix products of one column, as few of them as the weights allow.

In: linear layers. Out: functions of rows. Layers that read the same rows become one product: their weights are laid side by
side in one block of memory, and the layers go on as views of it, so it costs no memory. On a CPU the block lies the other way
round, [in, out]: MKL multiplies one row by a wide weight at 0.3 to 0.8 of the time (NOTES.md). Nothing is remembered about it
but where the weights lie; whoever replaces a weight gets a new block at the next engine. Layers with an adapter are called as
they are, and a model that has any keeps all its weights where they are, because it may be in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
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
        weights: list[nn.Parameter] = [layer.weight for layer in layers]  # pyright: ignore[reportAssignmentType]
        columns = lay_together(weights, weights[0].device.type == "cpu").T
        return lambda x: torch.mm(x, columns)
    return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)


def head_product(head: nn.Module, may_move: bool) -> Callable[[Tensor], Tensor]:
    """x [B, in] -> head(x) [B, out]; on a CPU a weight that must stay where it is is copied, its columns together."""
    if may_move and is_plain(head):
        return joined([head], may_move)
    if not is_plain(head) or head.weight.device.type != "cpu":
        return head
    assert isinstance(head.weight, Tensor)
    columns = head.weight.detach().T.contiguous()
    return lambda x: torch.mm(x, columns)


def added(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """(rows [B, out], x [B, in]) -> rows + layer(x), the sum as part of the product."""
    if is_plain(layer):
        assert isinstance(layer.weight, Tensor)
        transposed = layer.weight.detach().T
        return lambda rows, x: torch.addmm(rows, x, transposed)
    return lambda rows, x: rows + layer(x)


def lay_together(weights: list[nn.Parameter], by_columns: bool) -> Tensor:
    """Weights [out, in] as one [sum of out, in]; afterwards each parameter is a view of it.

    by_columns: what belongs to one input lies together, [in, sum of out] in memory.
    """
    height, width = sum(len(weight) for weight in weights), weights[0].shape[1]
    strides = (1, height) if by_columns else (width, 1)
    if not lie_together(weights, strides):
        block = weights[0].new_empty_strided((height, width), strides)
        start = 0
        for weight in weights:
            place = block[start : start + len(weight)]
            place.copy_(weight.detach())
            weight.data = place
            start += len(weight)
    return weights[0].detach().as_strided((height, width), strides, weights[0].storage_offset())


def lie_together(weights: list[nn.Parameter], strides: tuple[int, int]) -> bool:
    """One behind the other in the same storage, with these strides."""
    storage = weights[0].untyped_storage().data_ptr()
    expected = weights[0].storage_offset()
    for weight in weights:
        is_next = weight.untyped_storage().data_ptr() == storage and weight.storage_offset() == expected
        if not (is_next and weight.stride() == strides):
            return False
        expected += len(weight) * strides[0]
    return True
