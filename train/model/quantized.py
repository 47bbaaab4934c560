"""Linear layers with weights of 8 or 4 bits, and the folder that says so.

In: a model folder whose config.json has our `quantization_config`. Out: the model with `QuantizedLinear` in place of the
layers it names. Scale and numbers are those that torchao chose (`checkpoints quantize`), stored as two plain tensors, so no
pickle is read and whoever only speaks needs no torchao. The price: no fused kernel beyond the one that torch has for 8 bits on
a CPU; elsewhere weights are widened at each use, which saves memory and not time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import CheckpointError
from shards.json_file import read_json_object

METHOD = "higgs_voice"  # of quantization_config: transformers refuses a method that it does not know, which is right
QDATA, SCALE = "qdata", "scale"


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """`quantization_config` of config.json."""

    quant_method: str = METHOD
    bits: Literal[4, 8]
    group_size: int  # weights of a row with one scale; 0: the whole row
    modules: list[str]  # native names


class QuantizedLinear(nn.Module):
    """A linear layer without bias: weight[o, i] = qdata[o, i] * scale[o, i // group size]."""

    qdata: Tensor  # [out, in] int8, or [out, in / 2] uint8: the even column in the low four bits, two's complement
    scale: Tensor  # [out, in / group size] float

    def __init__(self, in_features: int, out_features: int, bits: int, group_size: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size = group_size or in_features
        columns, dtype = (in_features, torch.int8) if bits == 8 else (in_features // 2, torch.uint8)
        self.register_buffer(QDATA, torch.zeros(out_features, columns, dtype=dtype))
        self.register_buffer(SCALE, torch.zeros(out_features, in_features // self.group_size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        if self.bits == 8 and self.group_size == self.in_features and x.dtype != torch.float16:  # else it may overflow
            rows = x.reshape(-1, self.in_features)
            if x.device.type == "cpu" and len(rows):
                ones = torch.ones(self.out_features, dtype=x.dtype)
                product = torch._weight_int8pack_mm(rows.contiguous(), self.qdata, ones)
            else:
                product = F.linear(rows, self.qdata.to(x.dtype))
            return (product * self.scale[:, 0]).to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return F.linear(x, self.dequantized(x.dtype))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that is computed with."""
        whole = self.qdata if self.bits == 8 else unpacked(self.qdata)
        groups = whole.to(self.scale.dtype).unflatten(1, (-1, self.group_size))
        return (groups * self.scale[:, :, None]).flatten(1).to(dtype)


def packed(whole: Tensor) -> Tensor:
    """[out, in] int8 of -8 to 7 -> [out, in / 2] uint8."""
    low, high = whole[:, 0::2] & 0xF, whole[:, 1::2] & 0xF
    return (low | (high << 4)).to(torch.uint8)


def unpacked(pairs: Tensor) -> Tensor:
    """The inverse of `packed`."""
    low, high = (pairs & 0xF).to(torch.int8), (pairs >> 4).to(torch.int8)
    return torch.stack(((low ^ 8) - 8, (high ^ 8) - 8), dim=2).flatten(1)


def read_quantization(folder: Path) -> Quantization | None:
    """What config.json says of it; None where weights are whole. Raises CheckpointError for another program's."""
    path = folder / "config.json"
    try:
        found = read_json_object(path, "a model's config").get("quantization_config")
        if found is None:
            return None
        if found.get("quant_method") == METHOD:
            return msgspec.convert(found, Quantization)
    except (AttributeError, msgspec.ValidationError) as error:
        raise CheckpointError(
            f"{path}: quantization_config is not readable: {error}; quantize the model anew"
        ) from None
    raise CheckpointError(
        f"{path}: quantized by {found.get('quant_method')!r}, which is not read here; give the model it was made of, or "
        "one of `checkpoints quantize`"
    )


def refuse_quantized(folder: Path, what: str) -> None:
    """Raises CheckpointError where `folder` holds quantized weights; `what` cannot be done with them."""
    if read_quantization(folder):
        raise CheckpointError(
            f"{folder}: its weights are quantized, so {what}; give the model that it was made of (quantize.json names it)"
        )


def put_quantized(model: nn.Module, quantization: Quantization, where: Path) -> None:
    """Replace the named layers by empty quantized ones. Raises CheckpointError for names that are no linear layers."""
    modules = dict(model.named_modules())
    for name in quantization.modules:
        layer = modules.get(name)
        divides = isinstance(layer, nn.Linear) and not layer.in_features % max(2, quantization.group_size)
        if not isinstance(layer, nn.Linear) or layer.bias is not None or quantization.group_size < 0 or not divides:
            raise CheckpointError(
                f"{where}/config.json: quantization_config names {name!r}, group size {quantization.group_size}, which does "
                "not fit a linear layer of this model; quantize the model anew"
            )
        with torch.device(layer.weight.device):
            empty = QuantizedLinear(layer.in_features, layer.out_features, quantization.bits, quantization.group_size)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, empty)
