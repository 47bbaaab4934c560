"""From an utterance's codes to its wave, while it is spoken or when it is done: the one home of windows, parts and cross-fades.

In: an `Utterance` that somebody's engine moves on. Out: samples at 24 kHz, final as soon as they are given out. Looking at the
utterance and decoding are two calls, because the first must hold the engine still and the second takes long.
"""

from __future__ import annotations

import numpy as np

from shards.encoders.codec import Codec
from shards.encoders.codec_stream import CodecStream
from shards.sequence import SAMPLE_RATE
from tools.cross_fade import CrossFade
from tools.speech_request import SpeechPart
from tools.utterance import Utterance


class SpokenWave:
    def __init__(
        self, codec: Codec, utterance: Utterance, first_chunk: int | None = None, *, whole_parts: bool = False
    ) -> None:
        """whole_parts: decode a part when it is over, at a ninth of the price of decoding it while it comes."""
        self._codec, self._utterance, self._whole_parts = codec, utterance, whole_parts
        self._fade = CrossFade(SAMPLE_RATE)
        self._sound = CodecStream(codec, first_chunk)  # only the first part begins early
        self._num_fed = 0
        self._codes = np.zeros((0, 0), np.uint16)
        self._part: SpeechPart | None = None

    def follow(self) -> None:
        """After the engine has advanced: take what is new."""
        self._part = self._utterance.follow()
        self._codes = self._part.codes if self._part else self._utterance.codes()

    def waves(self) -> list[np.ndarray]:
        """Samples [S] float32 that are final by what `follow` has taken; none of them is empty."""
        waves: list[np.ndarray] = []
        if not self._whole_parts:
            waves.append(self._fade.feed(self._sound.feed(self._codes[:, self._num_fed :])))
            self._num_fed = self._codes.shape[1]
        if self._part is not None:
            rest = self._codec.decode(self._codes) if self._whole_parts else self._sound.finish()
            waves.append(self._fade.feed(rest))
            waves.append(self._fade.finish() if self._utterance.is_done else self._fade.end_part())
            self._sound, self._num_fed, self._part = CodecStream(self._codec), 0, None
        return [wave for wave in waves if len(wave)]


def whole_wave(codec: Codec, parts: list[SpeechPart]) -> np.ndarray:
    """The wave [S] float32 of parts that are over."""
    fade = CrossFade(SAMPLE_RATE)
    pieces: list[np.ndarray] = []
    for number, part in enumerate(parts):
        if number:
            pieces.append(fade.end_part())
        pieces.append(fade.feed(codec.decode(part.codes)))
    pieces.append(fade.finish())
    return np.concatenate(pieces)
