"""How many floating point operations a step needs, and how many this machine can do: their ratio is `metrics/mfu`.

Counted is what the mathematics asks for: frozen weights cost a forward product and one for the input's gradient (4 per
weight and row; training them would be 6), LoRA weights also one for their own gradient (6), heads only at learned rows,
attention only inside documents and below the diagonal. Recomputed layers are not counted twice. The rate is not a data
sheet's: it is one large matrix product, measured on this device before training.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from train.model.batch import PackedBatch
from train.model.config import ModelConfig
from train.model.lora import group_of, lora_parameters
from train.model.products import product


def step_flops(config: ModelConfig, lora_sizes: dict[str, int], batches: list[PackedBatch]) -> float:
    """Operations of forward and backward over these packs; `lora_sizes` of `lora_sizes_of`."""
    total = 0.0
    for batch in batches:
        num_text, num_audio = len(batch.text_ids), len(batch.codes)
        rows = num_text + num_audio
        learned = {"text_lm_head": len(batch.text_targets), "audio_lm_head": len(batch.audio_rows)}
        width, inner = config.hidden_size, config.intermediate_size
        attention = width * config.head_dim * 2 * (config.num_heads + config.num_key_value_heads)
        total += 4 * rows * config.num_layers * (attention + 3 * width * inner)
        total += 4 * learned["text_lm_head"] * width * config.vocab_size
        total += 4 * learned["audio_lm_head"] * width * config.num_codebooks * config.codebook_vocab
        # Two products of [pairs, E] per head forward, and two and a half times that backward (scores are made again).
        total += 3.5 * 4 * config.num_layers * config.num_heads * config.head_dim * batch.num_attended
        for group, size in lora_sizes.items():
            if group.startswith("mlp."):
                used = num_text
            elif group.startswith("audio_mlp."):
                used = num_audio
            else:
                used = learned.get(group, rows)
            total += 6 * size * used
    return total


def lora_sizes_of(model: nn.Module) -> dict[str, int]:
    """Trainable weights per group, of whole tensors also where they are sharded."""
    sizes: dict[str, int] = {}
    for name, parameter in lora_parameters(model):
        sizes[group_of(name)] = sizes.get(group_of(name), 0) + parameter.numel()
    return sizes


def matmul_rate(device: torch.device) -> float:
    """Operations a second of one square product: 8192 in bf16 on CUDA, 1024 in fp32 on a CPU; the best of five.

    On a CPU by the processor's time, and by the library that training calls.
    """
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    # Random: a GPU multiplies equal numbers faster, because fewer bits change and it draws less power.
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    now = time.perf_counter if on_gpu else time.process_time
    for _ in range(5):
        if on_gpu:
            torch.cuda.synchronize(device)
        started = now()
        product(one, other)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, (now() - started) / (1 if on_gpu else torch.get_num_threads()))
    return 2 * size**3 / best
