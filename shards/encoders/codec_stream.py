"""Codes to a wave piece by piece, without clicks: the joined pieces equal the decode of the whole.

In: raw codes [8, n] as they are spoken. Out: float32 samples at 24 kHz, 960 a frame. The decoder looks at frames on both sides
of the one it sounds, so a piece is cut from the middle of a window with `CONTEXT` frames on either side; the ends of the stream
are the ends of the window, as in the whole decode. The price is that sound comes `CONTEXT` frames (1.28 s) behind its codes.
With `first_chunk` the first frames come at once, not quite as they will be, and the seam behind them is cross-faded.
"""

from __future__ import annotations

import numpy as np

from shards.encoders.codec import HOP, Codec
from shards.errors import ConfigError

CONTEXT = 32  # frames on each side; the decoder's reach is less (tests/test_codec_stream.py measures it)
FADE = HOP  # samples over which an early start passes into the exact sound: one frame, 40 ms


class CodecStream:
    """Pieces of one stream, in order."""

    def __init__(self, codec: Codec, first_chunk: int | None = None) -> None:
        """`first_chunk`: sound as soon as so many frames are known. Raises ConfigError below 2, since one is the seam."""
        if first_chunk is not None and not (isinstance(first_chunk, int) and first_chunk >= 2):
            raise ConfigError(
                f"first_chunk is {first_chunk!r} frames; expected a whole number, at least 2, of which one is the cross-fade"
            )
        self._codec = codec
        self._first_chunk = first_chunk
        self._codes: np.ndarray | None = None  # [8, n] from frame `_start` on
        self._start = 0
        self._emitted = 0  # frames
        self._early = np.zeros(0, np.float32)  # how the frame at the seam would have gone on

    def feed(self, codes: np.ndarray) -> np.ndarray:
        """The next codes [8, n] -> what can be said for certain by now, [S] float32; often nothing."""
        self._codes = codes if self._codes is None else np.concatenate([self._codes, codes], axis=1)
        known = self._start + self._codes.shape[1]
        if self._first_chunk is not None and known >= self._first_chunk:
            self._first_chunk = None
            if known - CONTEXT < 2:
                return self._begin(known)
        return self._emit(known - CONTEXT)

    def finish(self) -> np.ndarray:
        """No more codes: the rest [S] float32."""
        return np.zeros(0, np.float32) if self._codes is None else self._emit(self._start + self._codes.shape[1])

    def _begin(self, known: int) -> np.ndarray:
        """An early start: all that is known but for one frame, which will be cross-faded."""
        assert self._codes is not None
        wave = self._codec.decode(self._codes)
        self._emitted = known - 1
        self._early = wave[-FADE:]
        return wave[:-FADE]

    def _emit(self, end: int) -> np.ndarray:
        """The frames up to `end`; forgets the codes that no later frame sees."""
        assert self._codes is not None
        if end <= self._emitted:
            return np.zeros(0, np.float32)
        wave = self._codec.decode(self._codes[:, : end + CONTEXT - self._start])
        wave = wave[(self._emitted - self._start) * HOP : (end - self._start) * HOP]
        if len(self._early):
            share = np.linspace(0, 1, FADE, dtype=np.float32)
            wave = np.concatenate([self._early * (1 - share) + wave[:FADE] * share, wave[FADE:]])
            self._early = self._early[:0]
        self._emitted = end
        drop = max(0, end - CONTEXT - self._start)
        self._codes, self._start = self._codes[:, drop:], self._start + drop
        return wave
