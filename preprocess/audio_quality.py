"""What a decoded wave is worth: how far up its sound reaches, how loud the speech is, how much noise lies under it.

In: the mono wave at the file's own rate. Out: `SoundMeasures`. A file brought up from 8 or 16 kHz states a high rate and holds
nothing above 4 or 8 kHz: its spectrum ends at a cliff, which no voice or room makes. The bandwidth is where that cliff stands;
without one it is half the rate. The price: what was brought up without a filter (samples repeated or joined by lines) mirrors
its sound above the cliff and counts as full-band.
"""

from __future__ import annotations

import numpy as np

from shards.columns import SoundMeasures

WINDOW = 1024  # samples; bins of 23 Hz at 24 kHz
MAX_WINDOWS = 400  # of all, evenly: enough for a mean, and a long clip costs no more
BAND_HZ = 250.0  # the spectrum is looked at in bands of this width
LOWEST_CLIFF_HZ = 2500.0  # telephones end at 3400; below, vowels alone make slopes as steep
CLIFF_DB = 20.0  # between the two bands below a cliff and the loudest two above it
EMPTY_DB = -55.0  # of the loudest band: what lies above a cliff is quieter than this
FRAME_S = 0.02
SPEECH_BELOW_PEAK_DB = 25.0  # frames at most this far below the loud ones are speech
NOISE_PERCENTILE = 5.0
LOWEST_DB = -120.0


def measure_sound(wave: np.ndarray, sample_rate: int) -> SoundMeasures:
    """wave [S] float32, not empty -> bandwidth in Hz, level of the speech and of the noise in dB of full scale."""
    wave = wave - wave.mean()
    level_db, noise_db = levels(wave, sample_rate)
    return SoundMeasures(bandwidth(wave, sample_rate), level_db, noise_db)


def bandwidth(wave: np.ndarray, sample_rate: int) -> float:
    """Hz: where the spectrum ends at a cliff, else half the rate."""
    half = sample_rate / 2
    bands = band_levels(wave, sample_rate)
    first = int(LOWEST_CLIFF_HZ / BAND_HZ)
    loudest = float(bands.max())
    for edge in range(
        first, len(bands) - 2
    ):  # bands[edge] is the first that may be empty; its neighbour below is the slope
        above = float(bands[edge + 1 :].max())
        below = float(bands[edge - 2 : edge].max())
        if above < loudest + EMPTY_DB and below - above > CLIFF_DB:
            return edge * BAND_HZ
    return half


def band_levels(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """Mean power of each BAND_HZ [n] in dB, of windows spread evenly over the wave."""
    count = len(wave) // WINDOW
    if not count:
        wave, count = np.pad(wave, (0, WINDOW - len(wave))), 1
    windows = wave[: count * WINDOW].reshape(count, WINDOW)[:: -(-count // MAX_WINDOWS)]
    spectrum = np.fft.rfft(windows * HANN)
    power = (spectrum.real**2 + spectrum.imag**2).mean(axis=0)
    band = (np.arange(len(power)) * (sample_rate / WINDOW) / BAND_HZ).astype(int)
    sums = np.bincount(band, power) / np.maximum(1, np.bincount(band))
    return decibel(sums[: int(sample_rate / 2 / BAND_HZ)])


def levels(wave: np.ndarray, sample_rate: int) -> tuple[float, float]:
    """(RMS of the frames that are speech, RMS of the quietest frames), in dB of full scale."""
    size = max(1, int(FRAME_S * sample_rate))
    count = max(1, len(wave) // size)
    frames = wave[: count * size].reshape(count, -1)
    power = np.einsum("ns,ns->n", frames, frames, dtype=np.float64) / frames.shape[1]
    frame_db = decibel(power)
    loud_db = float(np.percentile(frame_db, 95))
    level_db = float(decibel(power[frame_db >= loud_db - SPEECH_BELOW_PEAK_DB].mean()))
    return level_db, float(np.percentile(frame_db, NOISE_PERCENTILE))


def decibel(power: np.ndarray) -> np.ndarray:
    return np.maximum(LOWEST_DB, 10 * np.log10(np.maximum(power, 1e-30)))


HANN = np.hanning(WINDOW).astype(np.float32)
