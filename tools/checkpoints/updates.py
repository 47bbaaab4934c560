"""The update that an adapter is: scale * B * A of every module, by its factors; norms and products without the whole matrix.

In: a checkpoint folder. Out: `Update`s. A whole matrix of the released model has 25 million numbers and there are 280 of
them, so all is done with r x r products of the factors. A is [r, in], B [out, r].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shards.errors import CheckpointError
from train.model.lora import PEFT_PREFIX, group_of, read_adapter_config

A, B, LENGTHS = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


class Factors(NamedTuple):
    down: Tensor  # A [r, in] float64
    up: Tensor  # B [out, r] float64
    scale: float


@dataclass(frozen=True)
class Update:
    """Of one adapter."""

    config: LoraConfig
    factors: dict[str, Factors]  # by module
    whole: dict[str, Tensor]  # modules that are trained whole from zero, by tensor
    uses_dora: bool

    def group(self, module: str) -> str:
        return group_of(f"{module}.lora_A")

    def squares(self) -> dict[str, float]:
        """Squared norm of the update by group of modules."""
        found: dict[str, float] = {}
        for module, factors in self.factors.items():
            group = self.group(module)
            found[group] = found.get(group, 0.0) + inner(factors, factors)
        for name, tensor in self.whole.items():
            found[name] = float(tensor.double().square().sum())
        return found

    def product(self, other: Update) -> float | None:
        """Sum of the products of equal places; None where the two do not change the same modules."""
        if self.factors.keys() != other.factors.keys() or self.whole.keys() != other.whole.keys():
            return None
        pairs = [(self.factors[module], other.factors[module]) for module in self.factors]
        if any(one.down.shape[1] != two.down.shape[1] or len(one.up) != len(two.up) for one, two in pairs):
            return None
        return sum(inner(one, two) for one, two in pairs) + sum(
            float((self.whole[name].double() * other.whole[name].double()).sum()) for name in self.whole
        )


def inner(one: Factors, other: Factors) -> float:
    """Sum over all places of the product of the two updates: tr(B1' B2 A2 A1')."""
    return one.scale * other.scale * float(((one.up.T @ other.up) * (one.down @ other.down.T)).sum())


def read_update(folder: Path) -> Update:
    """Of a checkpoint folder, or of an adapter folder. Raises CheckpointError for what is damaged or not finite."""
    adapter = folder if (folder / "adapter_config.json").is_file() else folder / "adapter"
    config = read_adapter_config(adapter / "adapter_config.json")
    path = adapter / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not readable: {str(error).splitlines()[0]}; give a sound checkpoint") from None
    if config.rank_pattern or config.alpha_pattern:
        raise CheckpointError(f"{adapter}: ranks or scales by module (rank_pattern, alpha_pattern) are not read here")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise CheckpointError(f"{path}: not finite: {broken[0]}; give an older checkpoint")
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    factors, whole = {}, {}
    for name, tensor in tensors.items():
        module = name.removeprefix(PEFT_PREFIX)
        if name.endswith(A):
            up = tensors.get(name.removesuffix(A) + B)
            if up is None or tensor.ndim != 2 or up.ndim != 2 or tensor.shape[0] != up.shape[1]:
                raise CheckpointError(f"{path}: {name} has no B of its rank; give a sound checkpoint")
            if tensor.shape[0] != config.r:  # the scale is alpha / r
                raise CheckpointError(
                    f"{path}: {name} has rank {tensor.shape[0]}, adapter_config.json says {config.r}; give a sound checkpoint"
                )
            factors[module.removesuffix(A)] = Factors(tensor.double(), up.double(), scale)
        elif not name.endswith((B, LENGTHS)):
            whole[module] = tensor
    lonely = [name for name in tensors if name.endswith(B) and f"{name.removesuffix(B)}{A}" not in tensors]
    if lonely:
        raise CheckpointError(f"{path}: {lonely[0]} has no A; give a sound checkpoint")
    if not factors:
        raise CheckpointError(f"{path}: holds no LoRA layer; give a checkpoint of `train`")
    return Update(config, factors, whole, any(name.endswith(LENGTHS) for name in tensors) or config.use_dora)
