"""Waves of parts as one wave, each cross-faded into the next, whether they come whole or piece by piece.

In: pieces of one part after the other. Out: samples of the whole; how the parts were cut into pieces changes nothing. The
price: the last `FADE_S` of a part come only when it is known what follows.
"""

from __future__ import annotations

import numpy as np

FADE_S = 0.05


class CrossFade:
    def __init__(self, sample_rate: int) -> None:
        self._fade = round(FADE_S * sample_rate)
        self._before = np.zeros(0, np.float32)  # the end of the parts before, not given out yet
        self._held = np.zeros(0, np.float32)  # of this part

    def feed(self, wave: np.ndarray) -> np.ndarray:
        """The next samples [S] of this part -> samples [n] that are final."""
        self._held = np.concatenate([self._held, wave])
        if len(self._held) < len(self._before):
            return self._held[:0]
        self._mix()
        return self._release()

    def end_part(self) -> np.ndarray:
        """This part is over, another will follow."""
        self._mix()
        wave = self._release()
        self._before, self._held = self._held, self._held[:0]
        return wave

    def finish(self) -> np.ndarray:
        """Nothing follows."""
        self._mix()
        wave, self._held = self._held, self._held[:0]
        return wave

    def _mix(self) -> None:
        """What came before passes into what is held; the shorter of both is the length of the fade."""
        length = min(len(self._before), len(self._held))
        share = (np.arange(1, length + 1, dtype=np.float32)) / (length + 1)
        kept, fading = np.split(self._before, [len(self._before) - length])
        mixed = fading * (1 - share) + self._held[:length] * share
        self._held = np.concatenate([kept, mixed, self._held[length:]])
        self._before = self._before[:0]

    def _release(self) -> np.ndarray:
        end = max(0, len(self._held) - self._fade)
        wave, self._held = self._held[:end], self._held[end:]
        return wave
