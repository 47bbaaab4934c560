"""LoRA of layers that read the same rows, as one function: one product with all their A, then each its own B.

In: rows and peft's own layers, adapted or not. Out: what each layer would give, with the same gradients up to the order of
sums. peft keeps its modules, names and files; only the calls differ. q, k, v read the rows once and not four times, updates
are added by the product that makes them, and backward keeps the rows, their products with A and, of a feed-forward network,
gate and up: what else it needs it computes again.

The surprising decision: nothing is done in place in a forward that is compiled, even where it would save a copy. torch 2.11 then
gives zero gradients without a word (pytorch#180642). Dropout, DoRA and LoRA of another dtype than the rows are peft's own
work, which `is_fusable` leaves to it.

Letters: R rows, r rank; a layer has W [out, in], and A [r, in], B [out, r] if it is adapted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.products import plus_product, product

ADAPTER = "default"  # peft's name of the only one


def is_fusable(layer: nn.Module, x: Tensor) -> bool:
    """A frozen linear layer without bias, plain or with a plain adapter in the dtype of `x`."""
    if type(layer) is nn.Linear:
        return layer.bias is None and not layer.weight.requires_grad
    adapted = cast("Any", layer)
    base = cast("Any", getattr(layer, "base_layer", None))
    if type(base) is not nn.Linear or base.bias is not None or list(getattr(layer, "lora_A", ())) != [ADAPTER]:
        return False
    is_plain = not (adapted.disable_adapters or adapted.merged or adapted.lora_variant or base.weight.requires_grad)
    same_dtype = adapted.lora_A[ADAPTER].weight.dtype == x.dtype
    return is_plain and same_dtype and isinstance(adapted.lora_dropout[ADAPTER], nn.Identity)


def tensors_of(layer: nn.Module) -> tuple[float, Tensor, Tensor | None, Tensor | None]:
    """(scaling, W, A, B), read where they are used: a sharded layer has its whole weights only during its forward."""
    if isinstance(layer, nn.Linear) and not hasattr(layer, "base_layer"):
        return 0.0, layer.weight, None, None
    adapted = cast("Any", layer)
    down, up = adapted.lora_A[ADAPTER].weight, adapted.lora_B[ADAPTER].weight
    return adapted.scaling[ADAPTER], adapted.base_layer.weight, down, up


def project(x: Tensor, layers: Sequence[nn.Module], fused: bool) -> Sequence[Tensor]:
    """x [R, in] -> [R, out] of each layer; one after another unless `fused`, and where no gradient is recorded.

    Nothing is kept then, and a sharded model speaks with the sums of a whole one, which is spoken layer by layer.
    """
    if not fused or not torch.is_grad_enabled() or not all(is_fusable(layer, x) for layer in layers):
        return [layer(x) for layer in layers]
    scalings, weights = [], []
    for layer in layers:
        scaling, *tensors = tensors_of(layer)
        scalings.append(scaling)
        weights += tensors
    return Projections.apply(x, tuple(scalings), *weights)  # pyright: ignore


def swiglu_down(gate: Tensor, up: Tensor, down: nn.Module, fused: bool) -> Tensor:
    """gate, up [R, in] -> down(silu(gate) * up) [R, out]."""
    if not fused or not torch.is_grad_enabled() or not is_fusable(down, gate):
        return down(F.silu(gate) * up)
    return SwigluDown.apply(gate, up, *tensors_of(down))  # pyright: ignore


class Projections(torch.autograd.Function):
    """x W^T + s x A^T B^T of several layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *weights: Tensor | None) -> tuple[Tensor, ...]:
        """weights: W, A, B of each layer, A and B None where it is not adapted."""
        layers = list(zip(weights[0::3], weights[1::3], weights[2::3], scalings, strict=True))
        downs = [down for _, down, _, _ in layers if down is not None]
        rows = product(x, torch.cat(downs)) if downs else None  # [R, sum of r]
        parts = iter(rows.split([len(down) for down in downs], dim=1) if rows is not None else ())
        outputs = []
        for weight, _, up, scaling in layers:
            out = product(x, cast("Tensor", weight))
            outputs.append(out if up is None else plus_product(out, next(parts), up, scaling))
        ctx.scalings = scalings
        # The rows are for the gradients of A only: with nothing adapted here, nothing is kept.
        ctx.save_for_backward(x if downs else None, rows, *weights)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, rows, *weights = ctx.saved_tensors
        layers = list(zip(grads, weights[0::3], weights[1::3], weights[2::3], ctx.scalings, strict=True))
        adapted = [(grad, down, up, scaling) for grad, _, down, up, scaling in layers if down is not None]
        sizes = [len(down) for _, down, _, _ in adapted]
        # [R, sum of r]: gradients of the rows' products with A
        grad_rows = [product(grad, (up * scaling).T) for grad, _, up, scaling in adapted]
        grad_rows = torch.cat(grad_rows, dim=1) if adapted else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = sum_of_products([(grad, weight.T) for grad, weight, _, _, _ in layers])
            if grad_rows is not None:
                grad_x.addmm_(grad_rows, torch.cat([down for _, down, _, _ in adapted]))
        grad_downs = iter((grad_rows.T @ x).split(sizes) if grad_rows is not None else ())
        parts = iter(rows.split(sizes, dim=1) if rows is not None else ())
        found: list[Tensor | None] = []
        for grad, _, down, _, scaling in layers:
            is_adapted = down is not None
            found += [
                None,
                next(grad_downs) if is_adapted else None,
                (grad.T @ next(parts)) * scaling if is_adapted else None,
            ]
        return grad_x, None, *found


class SwigluDown(torch.autograd.Function):
    """h W^T + s h A^T B^T with h = silu(gate) * up, which is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, scaling: float, weight: Tensor, a: Tensor | None, b: Tensor | None
    ) -> Tensor:
        hidden = F.silu(gate) * up
        out, rows = product(hidden, weight), None
        if a is not None and b is not None:
            rows = product(hidden, a)
            out = plus_product(out, rows, b, scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(gate, up, rows, weight, a, b)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        gate, up, rows, weight, a, b = ctx.saved_tensors
        grad_hidden = product(grad, weight.T)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_a = grad_b = None
        if a is not None:
            grad_rows = product(grad, (b * ctx.scaling).T)
            grad_hidden.addmm_(grad_rows, a)
            grad_a = grad_rows.T @ (silu * up)
            grad_b = (grad.T @ rows) * ctx.scaling
        # The slope of silu: sigmoid + silu (1 - sigmoid).
        grad_gate = sigmoid.addcmul_(silu, 1 - sigmoid).mul_(up).mul_(grad_hidden)
        return grad_gate, grad_hidden.mul_(silu), None, None, grad_a, grad_b


def sum_of_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of x weight^T over pairs of x [R, in] and weight [out, in]. For backward: it adds in place."""
    (x, weight), *others = pairs
    total = product(x, weight)
    for x, weight in others:
        total.add_(product(x, weight))
    return total
