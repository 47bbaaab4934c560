"""What the sides of a benchmark share: a process of their own each, and models of random weights in three sizes.

In: a size, a device, a seed. Out: figures as JSON from a side's process; a model filled where it will be used. "small" is for the
tests of the benchmarks, "middle" (hidden 512, 8 layers, full vocabulary) for a CPU, "full" (the released sizes) for a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_side(
    module: str, side: str, settings: dict[str, Any], threads: int, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """`python -m module SIDE SETTINGS` in a process of its own, so that its peak memory is its own; its last line is JSON."""
    from train.launch import allocator_settings

    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, **allocator_settings(os.environ), "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
    env.update(environment or {})
    command = [sys.executable, "-m", module, side, json.dumps(settings)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{module}, {side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def model_config(size: str) -> Any:
    from train.model.config import ModelConfig

    if size == "full":
        return ModelConfig(is_random=True)
    if size == "small":
        return ModelConfig(64, 128, 2, 4, 2, 16, is_random=True)
    if size == "tiny":  # what `tiny` writes
        from tools.tiny.cli import tiny_config

        return tiny_config()
    return ModelConfig(512, 1408, 8, 8, 4, 64, is_random=True)


def fill_randomly(model: Any, device: str, seed: int) -> None:
    """Weights made where they are used: N(0, 0.02), norms 1; bf16 on a GPU, else fp32."""
    import torch

    model.to(torch.bfloat16 if device == "cuda" else torch.float32).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)


def transformers_model(size: str, device: str, seed: int, weights: dict[str, Any] | None = None) -> Any:
    """transformers' own class with random weights of `fill_randomly`, or with `weights` by name, which it shares; eval mode."""
    import torch
    from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

    from train.model.config import native_config

    config = HiggsAudioV2Config(**native_config(model_config(size)))
    with torch.device("meta"):
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    rope = model.model.rotary_emb.__class__(config)  # `to_empty` would leave its buffers without values
    offsets = torch.arange(config.num_codebooks) * config.codebook_size
    if weights is None:
        fill_randomly(model, device, seed)
    else:
        model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = rope.to(device)
    model.model.embed_audio_tokens.register_buffer("audio_tokens_offsets", offsets.to(device), persistent=False)
    return model.eval()


def synchronise(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
