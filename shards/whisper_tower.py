"""A Whisper encoder as Higgs Audio uses it: log-mel of a reference in, hidden states at 25 Hz out.

It differs from Whisper's own in three places (boson-ai/higgs-audio, HiggsAudioEncoder): padding frames are masked out of
attention, hidden states are averaged in pairs (50 -> 25 Hz), and the last layer norm comes after the averaging. Because
masked positions reach nobody, only the clip's own frames are computed, not 30 s; the result is the same (tested). It
lies in this package because stage one stores its output and stage two computes it: both must mean the same thing.

Letters: m mel frames that hear the clip, L = frames at 50 Hz after the convolutions, W = rows at 25 Hz, d width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import CheckpointError
from shards.mel import SAMPLES_PER_FRAME

NUM_MELS = 128
MAX_POSITIONS = 1500
PREFIXES = ("model.encoder.", "encoder.", "audio_tower.")  # of a Whisper checkpoint, or of Higgs Audio's own tower


def num_mel_frames(num_samples: int) -> int:
    """m of a clip of `num_samples` at 16 kHz."""
    return -(-num_samples // SAMPLES_PER_FRAME)


def num_rows(num_samples: int) -> int:
    """W: 1.0 s gives 25, 30 s gives 750. The formula is the released one's, rounding included."""
    return (_num_positions(num_mel_frames(num_samples)) - 2) // 2 + 1


def _num_positions(mel_frames: int) -> int:
    return (mel_frames - 1) // 2 + 1


class WhisperTower(nn.Module):
    """Parameter names equal transformers' `WhisperEncoder`."""

    def __init__(self, width: int, num_layers: int, num_heads: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(NUM_MELS, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(MAX_POSITIONS, width)
        self.layers = nn.ModuleList(_Layer(width, num_heads, inner) for _ in range(num_layers))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, num_samples: int) -> Tensor:
        """features [128, 3000] of one clip, padded to 30 s -> [W, d]."""
        positions = _num_positions(num_mel_frames(num_samples))
        # The last position hears one frame to each side: two more keep the convolutions' edge away from it.
        x = features[None, :, : 2 * positions + 2].to(self.conv1.weight.dtype)
        x = F.gelu(self.conv2(F.gelu(self.conv1(x))))[..., :positions]
        x = x.transpose(1, 2) + self.embed_positions.weight[:positions]
        for layer in self.layers:
            x = layer(x)
        x = F.avg_pool1d(x.transpose(1, 2), kernel_size=2, stride=2).transpose(1, 2)
        return self.layer_norm(x)[0, : num_rows(num_samples)]


class _Layer(nn.Module):
    def __init__(self, width: int, num_heads: int, inner: int) -> None:
        super().__init__()
        self.self_attn = _Attention(width, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def load_whisper_tower(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> WhisperTower:
    """The tower of a Whisper checkpoint folder, strictly. Raises CheckpointError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = [config[key] for key in ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{folder}: not a Whisper checkpoint: {error}") from None
    if config.get("num_mel_bins") != NUM_MELS:
        raise CheckpointError(
            f"{folder}: {config.get('num_mel_bins')} mels, Higgs Audio needs {NUM_MELS} (Whisper large-v3)"
        )
    with torch.device("meta"):
        tower = WhisperTower(*sizes)
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in _encoder_tensors(folder)}
    expected = tower.state_dict()
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    if problems:
        raise CheckpointError(f"{folder}: the encoder does not fit: {'; '.join(sorted(problems)[:6])}")
    tower.load_state_dict(state, assign=True)
    return tower.eval().requires_grad_(False)


def _encoder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a dict
                for prefix in PREFIXES:
                    if name.startswith(prefix):
                        yield name.removeprefix(prefix), file.get_tensor(name)
