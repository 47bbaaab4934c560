"""The codec: waves to codes and back, loaded from either layout, run by either implementation.

In: a wave [S] float32 at 24 kHz. Out: raw codes [8, T] uint16, 25 frames a second. Waves are padded with zeros to a
multiple of 960 samples and encoded one at a time: at other lengths the two reference implementations disagree (their
branches pad differently), and zero padding to the longest of a batch changes most codes. The price is that a CPU core
encodes about two seconds of audio a second at full size, whatever the batch. Numbers are float32, on a GPU too, unless
bfloat16 is asked for (`codec_precision.py`).

Which implementation runs is decided by what is installed: transformers' own class (5.3 or newer), else boson-multimodal's
blocks. Equal weights give equal codes in both (tests/test_boson_codec.py).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.encoders.codec_names import native_name, native_state
from shards.errors import CheckpointError
from shards.json_file import read_json_object
from shards.manifest import Precision
from shards.printable import first_line
from shards.sequence import FRAMES_PER_SECOND, SAMPLE_RATE

if TYPE_CHECKING:
    from torch import Tensor, nn

HOP = SAMPLE_RATE // FRAMES_PER_SECOND  # 960 samples per frame
CHECK_FRAMES = 50  # of noise that a changed encoder must encode as before
_log = logging.getLogger(__name__)


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

        from shards.encoders.codec_precision import full_float32

        with torch.inference_mode(), full_float32():
            codes = self._model.encode(torch.from_numpy(waves).to(self._device)[:, None], return_dict=False)
        assert codes.shape[2] * HOP == waves.shape[1], (codes.shape, waves.shape)
        return codes.cpu().numpy().astype(np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """codes [8, T] -> wave [T * 960] float32 at 24 kHz."""
        import torch

        if codes.shape[1] == 0:
            return np.zeros(0, np.float32)
        with torch.inference_mode():
            tensor = torch.from_numpy(codes.astype(np.int64)).to(self._device)[None]
            return self._model.decode(tensor, return_dict=False)[0, 0].float().cpu().numpy()


def pad_to_frames(wave: np.ndarray) -> np.ndarray:
    """Zeros behind a wave [S] up to a whole number of frames."""
    return np.pad(wave, (0, -len(wave) % HOP))


def load_codec(
    folder: Path, device: str = "cpu", precision: Precision = "fp32", tell: Callable[[str], None] = _log.warning
) -> Codec:
    """Load a codec folder of either layout, strictly. Raises CheckpointError.

    precision: of its encoder. tell: is given what a user should know about its speed on this machine, if anything.
    """
    from shards.encoders.codec_precision import compute_in_bf16, lacks_bf16

    layout, config = codec_layout(folder)
    rate = config.get("sample_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:  # and resampling from a rate like 44,101 Hz to HuBERT's would cost it gigabytes
        raise CheckpointError(f"{folder}/config.json: sample_rate is {rate!r}; Higgs Audio's codec has {SAMPLE_RATE}")
    if layout == "native":
        from shards.encoders.tensor_files import load_tensors

        state = load_tensors(folder / "model.safetensors")
    else:
        state = native_state(_pickled_tensors(folder / "model.pth"))

    def build() -> nn.Module:
        try:
            model = codec_model(config if layout == "native" else native_config(config))
        except CheckpointError:
            raise
        except KeyError as error:
            raise CheckpointError(f"{folder}/config.json: lacks {error}, which a {layout} codec's config has") from None
        except Exception as error:  # of a class that is not ours, about settings of any kind
            raise CheckpointError(
                f"{folder}/config.json: no codec can be built from it: {first_line(error)}; download it again"
            ) from None
        fill(model, state, folder)
        return model.eval()

    is_bf16 = precision == "bf16"
    if device == "cpu":
        model = _faster_on_cpu(build, in_float32=not is_bf16, tell=tell)
    else:
        model = build()
    if is_bf16:
        compute_in_bf16(model, device)
        if device == "cpu" and lacks_bf16():
            tell(
                'codec: this processor has no bfloat16 instructions (AVX512-BF16, AMX), so codec_precision = "bf16" is slower '
                'here than "fp32"'
            )
    return Codec(model, device)


def _faster_on_cpu(build: Callable[[], nn.Module], in_float32: bool, tell: Callable[[str], None]) -> Any:
    import torch

    from shards.encoders.codec_on_cpu import Changes, faster

    noise = 0.1 * torch.randn(1, 1, CHECK_FRAMES * HOP, generator=torch.Generator().manual_seed(0))
    # What oneDNN packs is float32; autocast chooses by itself.
    return faster(build, noise, None if in_float32 else Changes(), tell)


def _pickled_tensors(path: Path) -> dict[str, Tensor]:
    """boson's model.pth, without running what it holds. Raises CheckpointError."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has many kinds for a file that is none
        raise CheckpointError(f"{path}: not readable: {first_line(error)}; download it again") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: holds no tensors by name, which a boson codec's has")
    return state


def write_wave(path: Path, wave: np.ndarray) -> None:
    """wave [S] float32 -> 16-bit PCM wav at 24 kHz, atomically; what is louder than full scale is clipped."""
    import io

    import soundfile

    from shards.writer import write_bytes

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wave, -1, 1), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    write_bytes(path, buffer.getvalue())


def codec_layout(folder: Path) -> tuple[str, dict[str, Any]]:
    """("native" or "boson", its config) of a codec folder, without loading weights. Raises CheckpointError."""
    config = read_json_object(folder / "config.json", "a codec's config")
    if "acoustic_model_config" in config and (folder / "model.safetensors").is_file():
        return "native", config
    if "n_q" in config and (folder / "model.pth").is_file():
        return "boson", config
    raise CheckpointError(
        f"{folder}: neither a native codec (acoustic_model_config in config.json, model.safetensors) nor a boson one "
        "(n_q in config.json, model.pth)"
    )


def native_config(boson: dict[str, Any]) -> dict[str, Any]:
    """boson's config.json (the original training config) -> the native one, as far as it decides sizes."""
    return {
        "sample_rate": boson["sample_rate"],
        # Bandwidth of n_q books: 10 bit * 25 frames/s each, in kbit/s. The last entry decides the number of books.
        "target_bandwidths": [rate for rate in boson["target_bandwidths"] if rate <= boson["n_q"] * 0.25],
        "codebook_dim": boson.get("codebook_dim", 64),
        "codebook_size": boson["bins"],
        "acoustic_model_config": {
            "model_type": "dac",
            "encoder_hidden_size": boson.get("encoder_hidden_size", 64),
            "decoder_hidden_size": boson.get("decoder_hidden_size", 1024),
            "hidden_size": boson["D"],
            "downsampling_ratios": boson["ratios"],
            "upsampling_ratios": boson["ratios"],
        },
        # The released config names HuBERT base by id; a tiny one for tests carries its sizes.
        "semantic_model_config": {
            "model_type": "hubert",
            "mask_time_prob": 0.0,
            **boson.get("semantic_config", {}),
        },
    }


def codec_model(config: dict[str, Any]) -> nn.Module:
    """An untrained codec of a native config, built from what this environment has. Raises CheckpointError.

    Its `encode` ([n, 1, S] -> codes [n, 8, T]) and `decode` ([n, 8, T] -> [n, 1, S]) give tensors with return_dict=False.
    """
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        if hasattr(transformers, "HiggsAudioV2TokenizerModel"):
            return transformers.HiggsAudioV2TokenizerModel(transformers.HiggsAudioV2TokenizerConfig.from_dict(config))
        if importlib.util.find_spec("boson_multimodal"):
            from shards.encoders.codec_boson import BosonCodec

            return BosonCodec(config)
    raise CheckpointError(
        f"nothing here can run the codec: transformers {transformers.__version__} lacks HiggsAudioV2TokenizerModel, and "
        "boson_multimodal is not installed; install transformers 5.3 or newer, or this project with its boson extra"
    )


def native_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A codec's own tensors (not copies) under native names, whichever implementation it is."""
    return {native_name(name): tensor for name, tensor in model.state_dict().items()}


def fill(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Load weights of native names, strictly: nothing missing, nothing left over, every shape as the config says."""
    expected = native_tensors(model)
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
    model.load_state_dict({name: state[native_name(name)] for name in model.state_dict()})
