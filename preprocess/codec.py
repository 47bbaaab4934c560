"""The codec: waves to codes and back, loaded from either layout.

In: a wave [S] float32 at 24 kHz. Out: raw codes [8, T] uint16, 25 frames a second. Waves are padded with zeros to a
multiple of 960 samples and encoded one at a time: at other lengths the two reference implementations disagree (their
branches pad differently), and zero padding to the longest of a batch changes most codes. The price is that a CPU core
encodes about two seconds of audio a second at full size, whatever the batch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_RATE = 24000
HOP = 960  # samples per frame

# boson name -> native name, after folding weight_norm; complete for the 601 tensors of the released codec.
BOSON_RENAMES: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"^(encoder|decoder_2)\.(block|model)\.(\d+)\.(.+)$"), lambda m: _rename_dac(*m.groups())),
    (re.compile(r"^quantizer\.vq\.layers\.(\d+)\._codebook\."), r"quantizer.quantizers.\1.codebook."),
    (re.compile(r"^quantizer\.vq\.layers\."), "quantizer.quantizers."),
    (re.compile(r"^fc_prior\."), "fc."),
    (re.compile(r"^fc_post([12])\."), r"fc\1."),
    (re.compile(r"^((?:encoder|decoder)_semantic(?:\..*?)?)\.conv\.conv\."), r"\1.conv."),
    (re.compile(r"^((?:encoder|decoder)_semantic\.(?:.*\.)?conv[12])\.conv\."), r"\1."),
]


class Codec:
    """A loaded codec on one device."""

    def __init__(self, model: Any, device: str) -> None:
        self._model = model.eval().to(device)
        self._device = device

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """wave [S] float32 at 24 kHz -> codes [8, ceil(S / 960)] uint16."""
        return self.encode_batch(pad_to_frames(wave)[None])[0]

    def encode_batch(self, waves: np.ndarray) -> np.ndarray:
        """waves [n, S] float32 of equal length, S a multiple of 960 -> codes [n, 8, S / 960] uint16."""
        import torch

        with torch.inference_mode():
            codes = self._model.encode(torch.from_numpy(waves).to(self._device)[:, None]).audio_codes
        assert codes.shape[2] * HOP == waves.shape[1], (codes.shape, waves.shape)
        return codes.cpu().numpy().astype(np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """codes [8, T] -> wave [T * 960] float32 at 24 kHz."""
        import torch

        if codes.shape[1] == 0:
            return np.zeros(0, np.float32)
        with torch.inference_mode():
            tensor = torch.from_numpy(codes.astype(np.int64)).to(self._device)[None]
            return self._model.decode(tensor).audio_values[0, 0].float().cpu().numpy()


def pad_to_frames(wave: np.ndarray) -> np.ndarray:
    """Zeros behind a wave [S] up to a whole number of frames."""
    return np.pad(wave, (0, -len(wave) % HOP))


def load_codec(folder: Path, device: str = "cpu") -> Codec:
    """Load a codec folder of either layout, strictly. Raises CheckpointError."""
    import transformers

    if not hasattr(transformers, "HiggsAudioV2TokenizerModel"):
        raise CheckpointError(
            f"the codec needs transformers 5.3 or newer, found {transformers.__version__}; install this project without "
            "the boson extra to run stage one"
        )
    layout, config = codec_layout(folder)
    return Codec(_load_native(folder) if layout == "native" else _load_boson(folder, config), device)


def codec_layout(folder: Path) -> tuple[str, dict[str, Any]]:
    """("native" or "boson", its config) of a codec folder, without loading weights. Raises CheckpointError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}/config.json: not readable as a codec's config: {error}") from None
    if "acoustic_model_config" in config and (folder / "model.safetensors").is_file():
        return "native", config
    if "n_q" in config and (folder / "model.pth").is_file():
        return "boson", config
    raise CheckpointError(
        f"{folder}: neither a native codec (acoustic_model_config in config.json, model.safetensors) nor a boson one "
        "(n_q in config.json, model.pth)"
    )


def _load_native(folder: Path) -> Any:
    from safetensors.torch import load_file
    from transformers import HiggsAudioV2TokenizerConfig

    config = HiggsAudioV2TokenizerConfig.from_pretrained(str(folder))
    return _build(config, load_file(folder / "model.safetensors"), folder)


def _load_boson(folder: Path, config: dict[str, Any]) -> Any:
    """The older layout: the original training config and model.pth."""
    import torch
    from transformers import DacConfig, HiggsAudioV2TokenizerConfig, HubertConfig

    state = native_state(torch.load(folder / "model.pth", map_location="cpu", weights_only=True))
    acoustic = DacConfig(
        encoder_hidden_size=config.get("encoder_hidden_size", 64),
        decoder_hidden_size=config.get("decoder_hidden_size", 1024),
        hidden_size=config["D"],  # pyright: ignore[reportCallIssue] - declared at run time
        downsampling_ratios=config["ratios"],
        upsampling_ratios=config["ratios"],  # pyright: ignore[reportCallIssue]
    )
    # The released config names HuBERT base by id; a tiny one for tests carries its sizes.
    semantic = HubertConfig(mask_time_prob=0.0, **config.get("semantic_config", {}))
    # Bandwidth of n_q books: 10 bit * 25 frames/s each, in kbit/s. The last entry decides the number of books.
    bandwidths = [rate for rate in config["target_bandwidths"] if rate <= config["n_q"] * 0.25]
    native = HiggsAudioV2TokenizerConfig(
        target_bandwidths=bandwidths,
        codebook_dim=config.get("codebook_dim", 64),
        codebook_size=config["bins"],
        acoustic_model_config=acoustic,
        semantic_model_config=semantic,
    )
    return _build(native, state, folder)


def _build(config: Any, state: dict[str, Tensor], folder: Path) -> Any:
    import torch
    from transformers import HiggsAudioV2TokenizerModel

    with torch.random.fork_rng(devices=[]):
        model = HiggsAudioV2TokenizerModel(config)
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(state[name].shape)}, the config says {list(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError(
            f"{folder}: codec weights do not fit: {'; '.join(sorted(problems)[:8])} ({len(problems)} in all)"
        )
    model.load_state_dict(state)
    return model


def native_state(boson: dict[str, Tensor]) -> dict[str, Tensor]:
    """boson's tensors under native names, weight_norm folded: weight = v * g / |v|, norm over all but the first axis."""
    folded: dict[str, Tensor] = {}
    for name, tensor in boson.items():
        if name.endswith(".weight_g"):
            v = boson[name[: -len("g")] + "v"]
            norm = v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))
            folded[name[: -len("_g")]] = v * (tensor / norm)
        elif not name.endswith(".weight_v"):
            folded[name] = tensor
    return {native_name(name): tensor for name, tensor in folded.items()}


def native_name(name: str) -> str:
    """The native name of a boson codec tensor."""
    for pattern, replacement in BOSON_RENAMES:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return name


def _rename_dac(side: str, _: str, outer: str, rest: str) -> str:
    """encoder.block.K.* and decoder_2.model.K.* of the acoustic model."""
    is_encoder = side == "encoder"
    prefix = "acoustic_encoder" if is_encoder else "acoustic_decoder"
    ends = {"0": "conv1", "6": "snake1", "7": "conv2"}
    if outer in ends:
        return f"{prefix}.{ends[outer]}.{rest}"
    block = f"{prefix}.block.{int(outer) - 1}"
    parts = rest.split(".")  # block.J.<leaf> or block.J.block.I.<leaf>
    inner = int(parts[1])
    if parts[2] == "block":
        unit = inner + 1 if is_encoder else inner - 1
        leaf = ("snake1", "conv1", "snake2", "conv2")[int(parts[3])]
        return f"{block}.res_unit{unit}.{leaf}.{'.'.join(parts[4:])}"
    leaf = {3: "snake1", 4: "conv1"}[inner] if is_encoder else {0: "snake1", 1: "conv_t1"}[inner]
    return f"{block}.{leaf}.{'.'.join(parts[2:])}"
