"""MOS predictors: how natural a wave sounds, as a network guesses it. Used as a difference to the real recording alone.

In: waves at 16 kHz. Out: named values on a scale of 1 to 5. Their absolute values mean nothing here: none of them was ever
checked on Arabic, and both follow microphone and codec as much as the voice. The same guess of the same sentence's own
recording cancels most of that. Both ship their weights in wheels: speechmos (DNSMOS P.835, Microsoft, MIT) and distillmos
(Microsoft, MIT).
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, Protocol

import numpy as np

from shards.errors import ConfigError
from train.evaluation.metric_models import (
    INSTALL_EXTRA,
    SAMPLE_RATE,
    ModelIdentity,
    NotInstalled,
    onnx_session,
    package_file,
    sha256_of,
)

KNOWN = ("dnsmos", "distillmos")
LOWEST = 1.0  # of the scale: what a wave that is not there gets
WINDOW_S = 9.01  # what DNSMOS listens to at a time
WINDOW = int(WINDOW_S * SAMPLE_RATE)


class MosPredictor(Protocol):
    identity: ModelIdentity

    def values(self, wave: np.ndarray) -> dict[str, float]:
        """wave [S] float32 at 16 kHz, not empty -> values by name."""
        ...


def check_predictor(name: str) -> None:
    """Raises ConfigError for a name that is none; nothing is loaded."""
    if name not in KNOWN:
        raise ConfigError(f"--mos {name!r}: no such predictor; known: {', '.join(KNOWN)}, none")


def load_predictor(name: str, device: str = "cpu") -> MosPredictor:
    """Load by the name of --mos. Raises NotInstalled, or ConfigError for a name that is none."""
    check_predictor(name)
    return Dnsmos() if name == "dnsmos" else DistillMos(device)


class Dnsmos:
    """DNSMOS P.835: overall quality and background noise. A short wave is repeated up to its window, as the package does."""

    def __init__(self) -> None:
        path, version = package_file("speechmos", "dnsmos", "dnsmos_models/sig_bak_ovr.onnx")
        try:
            import onnxruntime  # noqa: F401 - asked for here, so that its absence is one line
            from speechmos.dnsmos import DNSMOS
        except ImportError as error:
            raise NotInstalled(f"dnsmos: lacks {error.name}; {INSTALL_EXTRA}") from None
        self._session = onnx_session(path)
        self._scale: Any = DNSMOS.get_polyfit_val
        self.identity = ModelIdentity("dnsmos", version, sha256_of(path))

    def values(self, wave: np.ndarray) -> dict[str, float]:
        wave = np.clip(wave, -1, 1).astype(np.float32)
        while len(wave) < WINDOW:
            wave = np.concatenate([wave, wave])
        found = []
        for second in range(int(len(wave) // SAMPLE_RATE - WINDOW_S) + 1):
            start, end = second * SAMPLE_RATE, int((second + WINDOW_S) * SAMPLE_RATE)
            if end - start < WINDOW:
                continue  # the package leaves out windows whose end rounds to a sample less; values are comparable with its own
            part = wave[None, start:end]
            signal, background, overall = np.asarray(self._session.run(None, {"input_1": part})[0])[0]
            found.append(self._scale(None, signal, background, overall, False))
        _, background, overall = np.mean(found, axis=0)
        return {"dnsmos": float(overall), "dnsmos background": float(background)}


class DistillMos:
    """DistillMOS: overall quality, learned from a large self-supervised model's judgement."""

    def __init__(self, device: str) -> None:
        path, version = package_file("distillmos", "distillmos", "weights/distill_mos_v7.pt")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints the path of its weights
                from distillmos import ConvTransformerSQAModel

                self._model: Any = ConvTransformerSQAModel().eval().to(device)
        except ImportError as error:
            raise NotInstalled(f"distillmos: lacks {error.name}; {INSTALL_EXTRA}") from None
        self._device = device
        self.identity = ModelIdentity("distillmos", version, sha256_of(path))

    def values(self, wave: np.ndarray) -> dict[str, float]:
        import torch

        with torch.inference_mode():
            guess = self._model(torch.from_numpy(np.ascontiguousarray(wave, np.float32))[None].to(self._device))
        return {"distillmos": float(guess)}
