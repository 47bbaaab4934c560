"""A recognizer for tests of `preprocess slice`: text and figures follow from the wave alone; every hearing is counted."""

from __future__ import annotations

import hashlib
import time

import numpy as np

from preprocess.slicing.pieces_folder import Heard


class FakeRecognizer:
    """`figures`: (log-probability, no-speech probability, compression ratio) by turns, by a hash of the wave."""

    def __init__(
        self,
        identity: str = "fake",
        figures: tuple[tuple[float, float, float], ...] = ((-0.3, 0.1, 1.2),),
        seconds: float = 0.0,
    ) -> None:
        self.identity = identity
        self.num_heard = 0
        self._figures = figures
        self._seconds = seconds

    def hear(self, wave: np.ndarray) -> Heard:
        assert wave.dtype == np.float32
        assert wave.ndim == 1
        time.sleep(self._seconds)
        self.num_heard += 1
        digest = hashlib.sha256(wave.tobytes()).digest()
        return Heard(f"نص {len(wave)} {digest[:2].hex()}", *self._figures[digest[0] % len(self._figures)])
