"""Matrix products of training's frozen weights, by the faster of two libraries on a CPU.

In: rows and a weight of any strides. Out: their product. MKL, which torch calls for float32, multiplies at 0.5 to 0.8 of
oneDNN's rate on AMD processors (NOTES.md), so there oneDNN is called. Both sum in an order of their own; neither is nearer
the truth. Which one is called follows from the processor's maker alone, never from a measurement, so that a run that goes on
sums as before. Elsewhere, and for a graph that is compiled, it is torch's own product.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.encoders.codec_on_cpu import is_amd


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, in] weight^T -> [R, out]; weight [out, in] may be a transposed view. No gradient is recorded."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32 or not takes_onednn():
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def plus_product(total: Tensor, x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """total [R, out] + scale x [R, in] weight^T; `total` is used up. No gradient is recorded."""
    if torch.compiler.is_compiling():  # in place, torch 2.11 would give zero gradients without a word (pytorch#180642)
        return torch.addmm(total, x, weight.T, alpha=scale)
    return total.addmm_(x, weight.T, alpha=scale)


@cache
def takes_onednn() -> bool:
    """On AMD processors, if this build of torch has oneDNN's product of plain tensors."""
    return is_amd() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
