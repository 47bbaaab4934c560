"""A Whisper encoder as Higgs Audio uses it: log-mel of a reference in, hidden states at 25 Hz out.

It differs from Whisper's own in three places (boson-ai/higgs-audio, HiggsAudioEncoder): padding frames are masked out of
attention, hidden states are averaged in pairs (50 -> 25 Hz), and the last layer norm comes after the averaging. Because
masked positions reach nobody, only the clips' own frames are computed, not 30 s; the result is the same (tested). It
lies in this package because stage one stores its output and stage two computes it: both must mean the same thing.

Letters: C clips, m positions at 50 Hz of the longest, W rows at 25 Hz of one clip, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.encoders.tensor_files import tensors_in
from shards.errors import CheckpointError
from shards.json_file import count_of, part_of, read_json_object
from shards.mel import num_positions

NUM_MELS = 128
MAX_POSITIONS = 1500
MAX_SIZE = 1 << 16  # large-v3 has 5120 at most
# Sizes of a boson config.json that leaves them out: its class's defaults, Whisper large-v3.
BOSON_SIZES = {
    "num_mel_bins": 128,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
}
PREFIXES = ("model.encoder.", "encoder.", "audio_tower.")  # of a Whisper checkpoint, or of Higgs Audio's own tower


class WhisperSizes(NamedTuple):
    """What a tower's weights are shaped by."""

    width: int  # d
    num_layers: int
    num_heads: int
    inner: int  # of the feed-forward network


class WhisperTower(nn.Module):
    """Parameter names equal transformers' `WhisperEncoder`."""

    def __init__(self, sizes: WhisperSizes) -> None:
        super().__init__()
        width, num_layers, num_heads, inner = sizes
        self.conv1 = nn.Conv1d(NUM_MELS, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(MAX_POSITIONS, width)
        self.layers = nn.ModuleList(_Layer(width, num_heads, inner) for _ in range(num_layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """features [C, 128, 2 m + 2] of C clips -> states [C, m // 2, d]; rows behind a clip's own W mean nothing.

        positions [C] int64: how many of the m positions at 50 Hz are each clip's own; None: all of them. The two frames
        more keep the convolutions' edge away from the last position.
        """
        longest = features.shape[2] // 2 - 1
        x = F.gelu(self.conv2(F.gelu(self.conv1(features.to(self.conv1.weight.dtype)))))[..., :longest]
        x = x.transpose(1, 2) + self.embed_positions.weight[:longest]
        mask = None
        if positions is not None:
            mask = torch.arange(longest, device=x.device) < positions[:, None]  # [C, m]: which keys are of the clip
            mask = mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        x = F.avg_pool1d(x.transpose(1, 2), kernel_size=2, stride=2).transpose(1, 2)
        return self.layer_norm(x)


def tower_features(features: np.ndarray, num_samples: int) -> np.ndarray:
    """The part [128, 2 m + 2] of a clip's 30-s features [128, 3000] that its m positions depend on.

    A clip of the full 30 s has nothing behind it; the convolutions pad with zeros there, so zeros stand for it.
    """
    needed = 2 * num_positions(num_samples) + 2
    return np.pad(features[:, :needed], ((0, 0), (0, max(0, needed - features.shape[1]))))


class _Layer(nn.Module):
    def __init__(self, width: int, num_heads: int, inner: int) -> None:
        super().__init__()
        self.self_attn = _Attention(width, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def read_whisper_sizes(folder: Path) -> WhisperSizes | None:
    """The tower's sizes from config.json of a Whisper checkpoint or of a Higgs Audio model; None when it has no tower."""
    path = folder / "config.json"
    config = read_json_object(path, "the config of a Whisper checkpoint")
    if config.get("model_type") == "higgs_audio_v2":
        if config.get("audio_encoder_config") is None:  # the native layout has none; ours adds it
            return None
        config = part_of(config, "audio_encoder_config", path)
    elif config.get("model_type") == "higgs_audio":
        if config.get("skip_audio_tower", False):  # it may describe a tower that the checkpoint does not have
            return None
        config = {**BOSON_SIZES, **part_of(config, "audio_encoder_config", path)}
    keys = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
    sizes = WhisperSizes(*(count_of(config, key, path, most=MAX_SIZE) for key in keys))
    if sizes.width % sizes.num_heads:
        raise CheckpointError(f"{path}: d_model {sizes.width} is no multiple of {sizes.num_heads} heads")
    if config.get("num_mel_bins") != NUM_MELS:
        raise CheckpointError(
            f"{folder}: {config.get('num_mel_bins')} mels, Higgs Audio needs {NUM_MELS} (Whisper large-v3)"
        )
    return sizes


def load_whisper_tower(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> WhisperTower:
    """The tower of a Whisper checkpoint or of a Higgs Audio model that has one, strictly. Raises CheckpointError."""
    sizes = read_whisper_sizes(folder)
    if sizes is None:
        raise CheckpointError(f"{folder}: this model has no Whisper tower; name a Whisper checkpoint")
    with torch.device("meta"):
        tower = WhisperTower(sizes)
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in encoder_tensors(folder)}
    expected = tower.state_dict()
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {list(state[name].shape)}, config.json says {list(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError(f"{folder}: the encoder does not fit: {'; '.join(sorted(problems)[:6])}")
    tower.load_state_dict(state, assign=True)
    return tower.eval().requires_grad_(False)


def encoder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name without prefix, tensor) of every tower tensor in the folder's safetensors files."""
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in tensors_in(path):
            for prefix in PREFIXES:
                if name.startswith(prefix):
                    yield name.removeprefix(prefix), tensor
