"""Sound and pictures for the report: clips decoded from their codes, and the recordings they were made of.

In: codes, or where a file lies. Out: a player and a mel picture, or why there is none. A recording is played only where the
file still is the one that was encoded (sha256), and only the segment that the row means.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.audio import AudioLimits, decode, read_bytes
from preprocess.reasons import AudioFault
from preprocess.sound_edits import as_encoded, segment_of
from shards.errors import PipelineError
from shards.manifest import Dataset
from shards.sample import AudioFacts
from shards.sequence import SAMPLE_RATE
from tools.web_page.page import escaped, player

ANY_LENGTH = AudioLimits(min_duration_s=0.0, max_duration_s=60.0, max_clipped_share=1.0)
MEL_BANDS = 64
WINDOW, HOP = 1024, 384  # at 24 kHz: 16 ms a column


class Players:
    """`note` says what is heard, or why nothing is."""

    def __init__(self, record: Dataset, config_path: Path | None, overrides: tuple[str, ...], num: int = 1) -> None:
        self._codec: Any = None
        self.fault = ""
        self.note = (
            "Above, from the codes: what the model hears and learns. Below it the recording that they were made of."
        )
        if not num:
            return
        try:
            self._codec = dataset_codec(record, config_path, overrides)
        except PipelineError as error:
            self.fault = str(error)
            self.note = f"Nothing is decoded from the codes: {error}"

    def of_codes(self, codes: np.ndarray) -> str:
        """codes [8, T]."""
        if self._codec is None:
            return "-"
        return sounding(self._codec.decode(codes))

    def of_file(self, audio: AudioFacts) -> str:
        try:
            return sounding(recording(audio))
        except AudioFault as fault:
            return f'<span class="failure">{escaped(audio.path)}: {escaped(fault.detail)}</span>'


def dataset_codec(record: Dataset, config_path: Path | None, overrides: tuple[str, ...]) -> Any:
    """The codec that made the codes. Raises ShardError where model.codec is another, PipelineError where there is none."""
    from shards.encoders.codec import load_codec
    from tools.inspect_shards.decode import codec_of

    return load_codec(codec_of(record, config_path, overrides))


def recording(audio: AudioFacts) -> np.ndarray:
    """The wave [S] at 24 kHz that was encoded, edited as it was ([audio]). Raises AudioFault."""
    data = read_bytes(audio.path)
    if audio.sha256 and hashlib.sha256(data).hexdigest() != audio.sha256:
        raise AudioFault("audio_unreadable", "the file was changed since it was encoded")
    return as_encoded(decode(data, ANY_LENGTH, segment_of(audio)), audio).at(SAMPLE_RATE)


def sounding(wave: np.ndarray) -> str:
    from tools.web_page.charts import png_picture

    return player(wave) + png_picture(mel_picture(wave), "mel spectrogram")


def mel_picture(wave: np.ndarray) -> np.ndarray:
    """wave [S] at 24 kHz -> dB [MEL_BANDS, columns], 70 dB below the loudest at most; low frequencies first."""
    padded = np.pad(wave.astype(np.float32), (0, max(0, WINDOW - len(wave))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(windows * np.hanning(WINDOW).astype(np.float32))) ** 2
    decibels = 10 * np.log10(power @ mel_filters().T + 1e-10).T
    return np.maximum(decibels, decibels.max() - 70)


def mel_filters() -> np.ndarray:
    """Triangles [MEL_BANDS, WINDOW // 2 + 1], evenly spread over 2595 log10(1 + f / 700)."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MEL_BANDS + 2) / 2595) - 1)
    bins = np.arange(WINDOW // 2 + 1) * SAMPLE_RATE / WINDOW
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.clip(np.minimum(rise, fall), 0, None)
    narrow = filters.sum(axis=1) == 0  # a band between two bins takes the nearest
    filters[narrow, np.abs(bins - edges[1:-1][narrow, None]).argmin(axis=1)] = 1
    return filters
