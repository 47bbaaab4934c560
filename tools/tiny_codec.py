"""A small random codec of the true shape: 24 kHz, 25 frames a second, 8 codebooks of 1024, tiny channels.

A codec with plain random weights gives nearly the same codes for every sound, and a training test on such codes proves
little. So its two feature branches are scaled to equal strength and every codebook is filled with features of a
synthetic, speech-like signal: codes then follow the sound. It reconstructs nothing; decoded audio is noise.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAMPLE_RATE = 24000
CALIBRATION_S = 24  # 600 frames, each codebook of 1024 entries drawn from them with noise


def write_codec(folder: Path, seed: int) -> None:
    """Write config.json and model.safetensors in the native layout. Same seed, same bytes."""
    from transformers import DacConfig, HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel, HubertConfig

    ratios = [8, 5, 4, 2, 3]
    acoustic = DacConfig(
        encoder_hidden_size=8,
        decoder_hidden_size=32,
        hidden_size=16,  # pyright: ignore[reportCallIssue] - declared at run time
        downsampling_ratios=ratios,
        upsampling_ratios=ratios,  # pyright: ignore[reportCallIssue]
    )
    semantic = HubertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
    )
    config = HiggsAudioV2TokenizerConfig(
        target_bandwidths=[0.5, 1, 1.5, 2],  # the last one means 8 codebooks
        acoustic_model_config=acoustic,
        semantic_model_config=semantic,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = HiggsAudioV2TokenizerModel(config).eval()
        generator = torch.Generator().manual_seed(seed)
        _calibrate(model, speech_like(generator), generator)
    model.save_pretrained(folder)


def _calibrate(model: Any, wave: Tensor, generator: torch.Generator) -> None:
    """wave [1, 1, S]. Centre and scale the joint features, then fill the codebooks one residual after another."""
    semantic = model.encoder_semantic(model._extract_semantic_features(wave).transpose(1, 2))
    acoustic = model.acoustic_encoder(wave)
    num_frames = min(semantic.shape[-1], acoustic.shape[-1])
    features = torch.cat((acoustic[..., :num_frames], semantic[..., :num_frames]), dim=1)[0].T  # [T, d]
    num_acoustic = acoustic.shape[1]
    for part in (slice(0, num_acoustic), slice(num_acoustic, None)):
        model.fc.weight[:, part] /= features[:, part].std(dim=0).mean()
    model.fc.weight.copy_(model.fc.weight * math.sqrt(model.fc.weight.shape[1]))
    model.fc.bias.copy_(-(features @ model.fc.weight.T).mean(dim=0))

    residual = model.fc(features)  # [T, d]
    for quantizer in model.quantizer.quantizers:
        points = quantizer.project_in(residual)
        chosen = torch.randint(len(points), (quantizer.codebook.embed.shape[0],), generator=generator)
        noise = torch.randn(len(chosen), points.shape[1], generator=generator)
        quantizer.codebook.embed.copy_(points[chosen] + 0.5 * points.std(dim=0) * noise)
        codes = torch.cdist(points, quantizer.codebook.embed).argmin(dim=1)
        residual = residual - quantizer.project_out(quantizer.codebook.embed[codes])


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
