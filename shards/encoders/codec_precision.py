"""In which numbers the codec's encoder computes: float32 and nothing less, unless bfloat16 was asked for.

In: a codec model of either implementation. Out: the same model, whose two branches (acoustic encoder; HuBERT with the layers
behind it) run under autocast to bfloat16, while resampling, the joint layer and the quantizer stay in float32: rounding there
would move a frame to another code at once. bfloat16 gives other codes for some frames, so data sets made with it have a
fingerprint of their own (`shards.artifacts.codec_fingerprint`). How many differ depends on codec and clips: `bench codec` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BRANCHES = ("acoustic_encoder", "semantic_model", "encoder_semantic")  # names of either implementation
BF16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # of /proc/cpuinfo; the last one is ARM's


def compute_in_bf16(model: Any, device: str) -> None:
    """Change the model's encoder in place; what it hands to the joint layer is float32 again."""
    for name in BRANCHES:
        branch = getattr(model, name)
        branch.forward = _autocast(branch.forward, torch.device(device).type)


def _autocast(forward: Callable[..., Any], kind: str) -> Callable[..., Any]:
    def in_bf16(*arguments: Any, **named: Any) -> Any:
        with torch.autocast(kind, torch.bfloat16):
            return as_float32(forward(*arguments, **named))

    return in_bf16


def as_float32(output: Any) -> Any:
    """A tensor, a tuple of them, or an output of transformers that holds such; None stays None."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, tuple):
        return tuple(map(as_float32, output))
    if isinstance(output, dict):
        return type(output)(**{key: as_float32(value) for key, value in output.items()})
    return output


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 products and convolutions of CUDA keep their 24 bits: cuDNN rounds to the 11 of TF32 unless told not to."""
    convolutions: Any = torch.backends.cudnn  # a module whose switches pyright does not see
    products = torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def lacks_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor says that it cannot multiply bfloat16, so that torch has to imitate it, slowly."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = {word for line in lines if line.split(":")[0].strip() in ("flags", "Features") for word in line.split()}
    return bool(flags) and not flags & BF16_INSTRUCTIONS
