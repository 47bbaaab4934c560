"""What this device can do at most: matrix products and copies, the two rates that bound a training step.

In: a device and the model's sizes. Out: FLOP/s of a large product and of the model's own, GB/s read plus written of a copy. All
shares in `bench train --protocol` are of these, measured in the same process, so that no data sheet is believed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tools.bench.steps import Stopwatch
from train.model.config import ModelConfig

REPEATS = {"cuda": 20, "cpu": 2}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 25}
SQUARE = {"cuda": 8192, "cpu": 512}


def measure_ceilings(config: ModelConfig, device: str, dtype: torch.dtype, num_rows: int) -> dict[str, Any]:
    """`num_rows`: of the model's own products."""
    size, width, inner = SQUARE[device], config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    shapes = {
        "square": (size, size, size),
        "q and o": (num_rows, width, config.num_heads * config.head_dim),
        "k and v": (num_rows, width, keys),
        "gate and up": (num_rows, width, inner),
        "down": (num_rows, inner, width),
    }
    products = {name: product_rate(shape, device, dtype) for name, shape in shapes.items()}
    return {"tflops": products, "matmul_tflops": products["square"], "copy_gb_per_s": copy_rate(device)}


def product_rate(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of [rows, in] times a weight [out, in], as layers multiply."""
    rows, inner, outer = shape
    # Random: a GPU multiplies equal numbers faster, because fewer bits change and it draws less power.
    x, weight = (torch.randn(n, inner, device=device, dtype=dtype) for n in (rows, outer))
    return 2e-12 * rows * inner * outer / seconds_of(lambda: x @ weight.T, device)


def copy_rate(device: str) -> float:
    """GB/s, bytes read and written."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e-9 * len(source) / seconds_of(lambda: target.copy_(source), device)


def seconds_of(work: Callable[[], Tensor], device: str) -> float:
    work()
    watch = Stopwatch(device)
    for _ in range(REPEATS[device]):
        work()
    return watch.seconds() / REPEATS[device]
