"""What a step should take on a GPU, by arithmetic: written beside what was measured, so that a wrong idea shows.

In: the ceilings of this device, the work of a step, and a variant. Out: seconds. Products run at 88 % of the square product's
rate (a guess); what is no product is bytes over the copy rate. Bytes per row and layer were counted at hidden 3072, inner 8192,
rank 32, by adding up arguments and results of every operation that is neither a view nor a product (CPU, 2026-11); other sizes
are scaled by the width. Attention's products count as the others. Meant for the released sizes; nothing is predicted for others.
"""

from __future__ import annotations

from train.model.config import ModelConfig

PRODUCT_EFFICIENCY = 0.88
FULL_WIDTH = 3072
# kB per row and layer, forward and backward together.
ELEMENTWISE_EAGER, ELEMENTWISE_COMPILED = 2160 - 762, 540
LORA_LAYER_BY_LAYER, LORA_FUSED = 762, 360
TRANSFORMERS_EAGER = 2161 + 2310  # with peft's fp32 LoRA, dropout and autocast
RECOMPUTED_SHARE = 0.49  # of a step's operations, once more


def predicted_seconds(
    config: ModelConfig,
    ceilings: dict[str, float],
    flops: float,
    num_rows: int,
    compiled: bool,
    fused: bool,
    recompute: bool,
) -> float:
    """One step of ours: `flops` of `step_flops`, without recomputation; `num_rows` of its packs."""
    kb = (ELEMENTWISE_COMPILED if compiled else ELEMENTWISE_EAGER) + (LORA_FUSED if fused else LORA_LAYER_BY_LAYER)
    again = 1 + (RECOMPUTED_SHARE if recompute else 0)
    return again * step_seconds(config, ceilings, flops, num_rows, kb)


def predicted_padded_seconds(
    config: ModelConfig, ceilings: dict[str, float], flops: float, num_rows: int, useful_share: float, recompute: bool
) -> float:
    """One step of transformers' class with peft: places are computed whether they are useful or not."""
    again = 1 + (RECOMPUTED_SHARE if recompute else 0)
    return again * step_seconds(
        config, ceilings, flops / useful_share, round(num_rows / useful_share), TRANSFORMERS_EAGER
    )


def step_seconds(
    config: ModelConfig, ceilings: dict[str, float], flops: float, num_rows: int, kb_per_row_and_layer: float
) -> float:
    products = flops / (PRODUCT_EFFICIENCY * ceilings["matmul_tflops"] * 1e12)
    gigabytes = kb_per_row_and_layer * 1e-6 * config.hidden_size / FULL_WIDTH * config.num_layers * num_rows
    return products + gigabytes / ceilings["copy_gb_per_s"]
