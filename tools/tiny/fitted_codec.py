"""A codec of the true architecture that gives back the clips it was fitted to: what the demo says can be heard.

In: waves. Out: config and weights, fitted by copying, without training. Both convolution stacks are written as a lapped
transform (MDCT: 960 samples a frame, sine window), of which a frame keeps the lowest 480 coefficients (below 6 kHz). Each
of the eight codebooks holds one eighth of them, 750 Hz, for the first 1024 frames (41 s) of the clips.

What it can: those 1024 frames come back as they were below 6 kHz, with a fade of 20 ms at the ends of a clip. What it
cannot: any other sound becomes, band by band, the nearest of the 1024 frames; its rhythm is heard, its words hardly, its
voice not. It is for the demo and for tests that listen; nothing that it does with other voices says anything about the
released codec.

Every codebook has its own random order of entries, so that eight codebooks are not one, and half of a percent or so of
every distance is the semantic branch's, so that codes depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.delay_pattern import NUM_CODEBOOKS
from shards.encoders.codec import HOP
from tools.tiny.codec import TINY_CONFIG, joint_features, random_weights, save_codec

NUM_ENTRIES = 1024
BAND = 60  # coefficients of 12.5 Hz in a codebook
SEMANTIC_PER_BOOK = 4
NUM_COEFFICIENTS = NUM_CODEBOOKS * BAND
FITTED_CONFIG: dict[str, Any] = {
    **TINY_CONFIG,
    "acoustic_model_config": {
        **TINY_CONFIG["acoustic_model_config"],
        "encoder_hidden_size": 20,  # its fourth block then has 320 channels: the samples between the last two strides
        "decoder_hidden_size": NUM_COEFFICIENTS,
        "hidden_size": NUM_COEFFICIENTS,
    },
}
SNAKE_ALPHA = 1e-5  # x + alpha * x^2: a straight line
UNIT_SCALE = 3e-5  # of the residual units' second convolutions: -75 dB of the sound, but no tensor is without effect
SEMANTIC_SCALE = 0.5  # standard deviation of a semantic feature where a coefficient's is about 1


def write_fitted_codec(folder: Path, seed: int, waves: list[np.ndarray]) -> int:
    """Write config.json and model.safetensors in the native layout; the number of frames that the codebooks hold.

    waves: [S] float32 at 24 kHz each, at least one. Same seed and waves, same bytes, in either environment.
    """
    with _one_thread():
        state, num_held = fitted_codec(seed, waves)
    save_codec(folder, FITTED_CONFIG, state)
    return num_held


def fitted_codec(seed: int, waves: list[np.ndarray]) -> tuple[dict[str, Tensor], int]:
    """Weights under native names, and the number of frames that the codebooks hold."""
    from shards.encoders.codec import codec_model, native_tensors, pad_to_frames

    model = codec_model(FITTED_CONFIG).eval()
    state = native_tensors(model)  # the model's own tensors: what is written into them, the model computes with
    generator = torch.Generator().manual_seed(seed)
    features: list[Tensor] = []  # [T, d] of each clip
    with torch.no_grad():
        for name in sorted(state):
            state[name].copy_(_initial(name, state[name].shape, generator))
        _write_encoder(state)
        _write_decoder(state)
        for wave in waves:
            if sum(map(len, features)) < NUM_ENTRIES:
                features.append(joint_features(model, torch.from_numpy(pad_to_frames(wave))[None, None]))
        held = torch.cat(features)[:NUM_ENTRIES]
        _write_codebooks(state, held, generator)
    return {name: tensor.contiguous() for name, tensor in state.items()}, len(held)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of a convolution's sum depends on the number of threads, and the bytes on it."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _initial(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random weights; but what stands between the strided convolutions hardly changes what passes."""
    weights = random_weights(name, shape, generator)
    if name.endswith("alpha"):
        return SNAKE_ALPHA * weights
    if ".res_unit" in name and name.startswith("acoustic") and name.endswith("conv2.weight"):
        return UNIT_SCALE * weights
    return weights


def transform() -> Tensor:
    """The lapped transform [2 * HOP, NUM_COEFFICIENTS] float32: from a frame's window of samples to its coefficients.

    Orthonormal over all HOP coefficients: neighbouring frames overlap by half, and what both say adds up to the wave.
    """
    sample, coefficient = torch.arange(2 * HOP).double()[:, None], torch.arange(NUM_COEFFICIENTS).double()[None]
    window = torch.sin(math.pi / (2 * HOP) * (sample + 0.5))
    wave = torch.cos(math.pi / HOP * (sample + 0.5 + HOP / 2) * (coefficient + 0.5))
    return (math.sqrt(2 / HOP) * window * wave).float()


# --- the two convolution stacks -------------------------------------------------------------------------------------
# A convolution of stride s has a kernel of 2s and pads ceil(s / 2): step t reads, or writes, 2s steps of the finer level
# from s * t - ceil(s / 2) on. All but one of them only lay out: the s values of a step stand in s groups of channels.


def _write_encoder(state: dict[str, Tensor]) -> None:
    """Samples are gathered in channels, 8, 40, 160 and 320 of them; the last stride transforms six steps of 320.

    The decoder's frame t writes samples 960 t - 480 to 960 t + 1440, the last stride here reads from 960 t - 640 on. So the
    stride before it gathers 160 samples late; the price is the first 160 samples of a clip, where the fade begins.
    """
    _write(state, "acoustic_encoder.conv1", {(0, 0, 3): 1.0})
    channels = 1
    for block, (stride, late) in enumerate([(8, 0), (5, 0), (4, 0), (2, 1)]):
        first = math.ceil(stride / 2) + late
        taps = {
            (step * channels + channel, channel, first + step): 1.0
            for step in range(stride)
            for channel in range(channels)
        }
        _write(state, f"acoustic_encoder.block.{block}.conv1", taps)
        channels *= stride
    last = state["acoustic_encoder.block.4.conv1.weight"]  # [640, 320, 6]
    last.zero_()
    last[:NUM_COEFFICIENTS] = transform().view(6, 320, NUM_COEFFICIENTS).permute(2, 1, 0)
    _write(state, "acoustic_encoder.conv2", {(channel, channel, 1): 1.0 for channel in range(NUM_COEFFICIENTS)})


def _write_decoder(state: dict[str, Tensor]) -> None:
    """The first stride, 8 with a kernel of 16, says sixteenths of two frames, 120 samples each; the others lay them out."""
    _write(state, "acoustic_decoder.conv1", {(channel, channel, 3): 1.0 for channel in range(NUM_COEFFICIENTS)})
    first = state["acoustic_decoder.block.0.conv_t1.weight"]  # [480, 240, 16]
    first.zero_()
    first[:, :120] = transform().view(16, 120, NUM_COEFFICIENTS).permute(2, 1, 0)
    channels = 120
    for block, stride in enumerate([5, 4, 2, 3], start=1):
        channels //= stride
        taps = {
            (step * channels + channel, channel, math.ceil(stride / 2) + step): 1.0
            for step in range(stride)
            for channel in range(channels)
        }
        _write(state, f"acoustic_decoder.block.{block}.conv_t1", taps)
    _write(state, "acoustic_decoder.conv2", {(0, 0, 3): 1.0})


def _write(state: dict[str, Tensor], layer: str, taps: dict[tuple[int, int, int], float]) -> None:
    """A convolution's weight: the given places, and nothing else."""
    weight = state[f"{layer}.weight"]
    weight.zero_()
    for place, value in taps.items():
        weight[place] = value


# --- the quantizers -------------------------------------------------------------------------------------------------


def _write_codebooks(state: dict[str, Tensor], features: Tensor, generator: torch.Generator) -> None:
    """features [N, d], N <= 1024. Scale them, and give each codebook its own columns of all N."""
    scale = _feature_scale(features)
    state["fc.weight"].copy_(torch.diag(scale))
    state["fc2.weight"].zero_()
    state["fc2.weight"][:, :NUM_COEFFICIENTS] = torch.diag(1 / scale[:NUM_COEFFICIENTS])
    entries = _all_entries(features * scale)
    for book in range(NUM_CODEBOOKS):
        prefix = f"quantizer.quantizers.{book}"
        semantic = NUM_COEFFICIENTS + book * SEMANTIC_PER_BOOK
        columns = [*range(book * BAND, (book + 1) * BAND), *range(semantic, semantic + SEMANTIC_PER_BOOK)]
        chosen = torch.eye(len(scale))[columns]  # [64, d]
        state[f"{prefix}.project_in.weight"].copy_(chosen)
        state[f"{prefix}.project_out.weight"].copy_(chosen.T)
        order = torch.randperm(NUM_ENTRIES, generator=generator)
        state[f"{prefix}.codebook.embed"].copy_(entries[order][:, columns])


def _feature_scale(features: Tensor) -> Tensor:
    """[d]: coefficients to a standard deviation of about 1 in each band, within a band to the root of what they had.

    Rounded to quarters of an octave: a last bit of the features must not change every weight.
    """
    deviation = features.double().std(dim=0, correction=0).clamp_min(1e-5)
    scale = torch.full_like(deviation, SEMANTIC_SCALE) / deviation
    coefficients = deviation[:NUM_COEFFICIENTS].view(NUM_CODEBOOKS, BAND)
    flatter = coefficients**-0.5
    loudness = (coefficients * flatter).square().mean(dim=1, keepdim=True).sqrt()
    scale[:NUM_COEFFICIENTS] = (flatter / loudness).flatten()
    return torch.exp2((4 * torch.log2(scale)).round() / 4).float()


def _all_entries(held: Tensor) -> Tensor:
    """held [N, d] -> [1024, d]: where frames are missing, the held ones again, each time half as loud."""
    rounds = -(-NUM_ENTRIES // len(held))
    return torch.cat([held * 0.5**number for number in range(rounds)])[:NUM_ENTRIES]
