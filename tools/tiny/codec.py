"""A small random codec of the true shape: 24 kHz, 25 frames a second, 8 codebooks of 1024, tiny channels.

A codec with plain random weights gives nearly the same codes for every sound, and a training test on such codes proves
little. So its two feature branches are scaled to equal strength and every codebook is filled with features of a
synthetic, speech-like signal: codes then follow the sound. It reconstructs nothing; decoded audio is noise.

Whichever implementation of the codec is installed computes the features; weights are drawn by name, so the files are the
same, byte for byte. `tools/tiny/fitted_codec.py` has the one that can be listened to.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.delay_pattern import NUM_CODEBOOKS
from shards.sequence import SAMPLE_RATE
from shards.writer import write_bytes

RATIOS = [8, 5, 4, 2, 3]  # of the released codec: 960 samples a frame
TINY_CONFIG: dict[str, Any] = {
    "model_type": "higgs_audio_v2_tokenizer",
    "architectures": ["HiggsAudioV2TokenizerModel"],
    "dtype": "float32",
    "sample_rate": SAMPLE_RATE,
    "target_bandwidths": [0.5, 1, 1.5, 2],  # kbit/s; the last one means 8 codebooks
    "codebook_dim": 64,
    "codebook_size": 1024,
    "acoustic_model_config": {
        "model_type": "dac",
        "encoder_hidden_size": 8,
        "decoder_hidden_size": 32,
        "hidden_size": 16,
        "downsampling_ratios": RATIOS,
        "upsampling_ratios": RATIOS,
    },
    "semantic_model_config": {
        "model_type": "hubert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "mask_time_prob": 0.0,
    },
}
CALIBRATION_S = 24  # 600 frames, each codebook of 1024 entries drawn from them with noise


def write_codec(folder: Path, seed: int) -> None:
    """Write config.json and model.safetensors in the native layout. Same seed, same bytes, in either environment."""
    save_codec(folder, TINY_CONFIG, calibrated_codec(TINY_CONFIG, seed))


def save_codec(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors of native names."""
    from shards.encoders.tensor_files import save_tensors

    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(state, folder / "model.safetensors")
    write_bytes(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())


def calibrated_codec(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random weights of a codec whose codes follow the sound, under native names."""
    from shards.encoders.codec import codec_model, native_tensors

    model = codec_model(config).eval()
    state = native_tensors(model)  # the model's own tensors: what is written into them, the model computes with
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(state):
            state[name].copy_(random_weights(name, state[name].shape, generator))
        wave = speech_like(generator)
        _calibrate(state, joint_features(model, wave), config["acoustic_model_config"]["hidden_size"], generator)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def random_weights(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Weights by name and shape alone, because the two implementations draw theirs in different orders.

    Standard deviation 1 / sqrt(fan in); biases 0; norms and snakes 1. The second convolution of a residual unit of the
    acoustic model is small, so that fifteen of them in a row do not blow the sound up, and so is the last one of all:
    decoded noise is then as loud as speech (RMS near 0.1 on the Arabic clips, measured).
    """
    if name.endswith("bias") or ".codebook." in name:
        return torch.full(shape, 1.0 if name.endswith("inited") else 0.0)
    if len(shape) == 1 or name.endswith(("alpha", "original0")):
        return torch.ones(shape)
    scale = 1.0
    if name == "acoustic_decoder.conv2.weight":
        scale = 1 / 400
    elif name.startswith("acoustic") and ".res_unit" in name and name.endswith("conv2.weight"):
        scale = 0.1
    return scale * torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))


def joint_features(model: nn.Module, wave: Tensor) -> Tensor:
    """wave [1, 1, S] -> what the codec's first linear layer reads, acoustic before semantic [T, d]."""
    inputs: list[Tensor] = []
    (joint,) = [layer for name, layer in model.named_modules() if name in ("fc", "fc_prior")]
    hook = joint.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0].clone()))
    cast(Any, model).encode(wave, return_dict=False)
    hook.remove()
    return inputs[0]


def _calibrate(state: dict[str, Tensor], features: Tensor, num_acoustic: int, generator: torch.Generator) -> None:
    """features [T, d]. Centre and scale them, then fill the codebooks one residual after another."""
    weight, bias = state["fc.weight"], state["fc.bias"]
    for part in (slice(0, num_acoustic), slice(num_acoustic, None)):
        weight[:, part] /= features[:, part].std(dim=0).mean()
    weight *= math.sqrt(weight.shape[1])
    bias.copy_(-(features @ weight.T).mean(dim=0))

    residual = F.linear(features, weight, bias)  # [T, d]
    for number in range(NUM_CODEBOOKS):
        prefix = f"quantizer.quantizers.{number}"
        embed = state[f"{prefix}.codebook.embed"]
        points = F.linear(residual, state[f"{prefix}.project_in.weight"], state[f"{prefix}.project_in.bias"])
        chosen = torch.randint(len(points), (len(embed),), generator=generator)
        noise = torch.randn(embed.shape, generator=generator)
        embed.copy_(points[chosen] + 0.5 * points.std(dim=0) * noise)
        nearest = embed[torch.cdist(points, embed).argmin(dim=1)]
        residual = residual - F.linear(
            nearest, state[f"{prefix}.project_out.weight"], state[f"{prefix}.project_out.bias"]
        )


def speech_like(generator: torch.Generator) -> Tensor:
    """A wave [1, 1, S] that changes as speech does: voiced and noisy stretches of 40-240 ms with moving formants."""
    pieces: list[Tensor] = []
    total = 0
    while total < CALIBRATION_S * SAMPLE_RATE:
        draw = torch.rand(8, generator=generator)
        length = int(SAMPLE_RATE * (0.04 + 0.2 * draw[0].item()))
        time_s = torch.arange(length) / SAMPLE_RATE
        pitch_hz = 80 + 200 * draw[1]
        piece = torch.zeros(length)
        if draw[2] < 0.7:
            for harmonic in range(1, 25):
                frequency_hz = harmonic * pitch_hz
                gain = sum(
                    math.exp(-(((frequency_hz - centre_hz) / 250) ** 2))
                    for centre_hz in (300 + 700 * draw[3], 900 + 1500 * draw[4], 2500 + 1000 * draw[5])
                )
                piece += gain * torch.sin(2 * math.pi * frequency_hz * time_s + harmonic)
        else:
            piece += torch.randn(length, generator=generator) * draw[6]
        envelope = torch.sin(math.pi * torch.linspace(0, 1, length)).clamp(min=0).sqrt()
        pieces.append(piece * envelope * (0.05 + 0.25 * draw[7]))
        total += length
    return torch.cat(pieces)[: CALIBRATION_S * SAMPLE_RATE][None, None]
