"""Reads one audio file: bytes in, mono float32 waves at 24 kHz (codec) and 16 kHz (Whisper) out, or a named fault.

Decoders read cut-off files without a complaint, so what was read is held against what the container states, where it states
something. Nothing is replaced by silence: a file with a fault is rejected with one of REASONS, and the row that needs it
with it. The one repair is a length that a pipe left open (audio_containers.py, mpeg_frames.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from preprocess.audio_containers import missing, unread
from preprocess.audio_decoders import read_samples, without_id3
from preprocess.audio_file import read_bytes as read_bytes
from preprocess.audio_quality import measure_sound
from preprocess.reasons import AudioFault
from preprocess.segment import WHOLE, Segment
from shards.columns import UNKNOWN, SoundMeasures
from shards.sequence import SAMPLE_RATE

CODEC_RATE = SAMPLE_RATE
WHISPER_RATE = 16000
SILENT_PEAK = 1e-3  # -60 dB of full scale: nothing anybody said
QUIET_PEAK = 0.03  # -30 dB
FULL_SCALE = 0.999
INTEGER_PEAK = 16.0  # +24 dB: no loudness, but integers written as floats
CANCELLED = 0.5  # of the level that channels without any likeness would have when mixed
SILENCE_BELOW_PEAK = 0.02  # -34 dB of the clip's peak counts as leading or trailing silence
LONG_SILENCE_S = 1.0
DC_OFFSET = 0.02
LOW_SAMPLE_RATE = 16000
NARROW = 0.75  # of the band that rate and codec could carry: an upsampled or hard-packed file ends below
NOISY_DB = 10.0  # from the speech down to the quietest frames; recordings that are wanted have 25 and more


class AudioMeasures(msgspec.Struct, frozen=True):
    """What was found in a decoded file; kept beside its codes, so that no file is decoded twice."""

    duration_s: float
    sample_rate: int
    num_channels: int
    clipped_share: float
    leading_silence_s: float
    trailing_silence_s: float
    warnings: list[str]
    sound: SoundMeasures = UNKNOWN
    cut_start_s: float | None = None  # what `sound_edits` took away; None: nothing was asked for
    cut_end_s: float | None = None
    gain_db: float | None = None


@dataclass(frozen=True)
class AudioFile:
    """A decoded file."""

    wave: np.ndarray  # [S] float32, mono, at the file's own rate
    measures: AudioMeasures

    def at(self, sample_rate: int) -> np.ndarray:
        """The wave [ceil(S * sample_rate / own rate)] float32 at another rate, resampled by RESAMPLER."""
        own_rate = self.measures.sample_rate
        if sample_rate == own_rate:
            return self.wave
        import soxr

        wave = soxr.resample(self.wave, own_rate, sample_rate, quality="HQ")
        length = -(-len(self.wave) * sample_rate // own_rate)
        return np.pad(wave, (0, max(0, length - len(wave))))[:length]  # soxr rounds the length to the nearest


@dataclass(frozen=True)
class AudioLimits:
    min_duration_s: float = 0.5
    max_duration_s: float = 30.0
    max_clipped_share: float = 0.02


def decode(data: bytes, limits: AudioLimits, segment: Segment = WHOLE) -> AudioFile:
    """Decode and check a file's bytes, or the segment of them that the row means. Raises AudioFault.

    The limits hold for the segment; of a longer file no more than the segment is kept in memory.
    """
    segment.check()
    data = without_id3(data)
    if segment.is_whole and (lacks := missing(data)):
        raise AudioFault("audio_truncated", lacks)
    if segment.duration_s is None and (left := unread(data)):
        raise AudioFault("audio_several", left)
    decoded = read_samples(data, limits.max_duration_s, segment)
    samples, sample_rate = decoded.samples, decoded.sample_rate  # [S, channels]
    is_cut_off = len(samples) > limits.max_duration_s * sample_rate
    if not is_cut_off:
        segment.check_read(len(samples), sample_rate)
        if segment.is_whole and decoded.declared and len(samples) < decoded.declared:
            raise AudioFault("audio_truncated", f"{len(samples)} of {decoded.declared} samples could be read")
    duration_s = len(samples) / sample_rate
    if duration_s < limits.min_duration_s:
        raise AudioFault("audio_too_short", f"{duration_s:.3f} s, at least {limits.min_duration_s:g} s")
    if is_cut_off:
        length_s = decoded.declared / sample_rate - segment.offset_s if decoded.declared else segment.duration_s
        stated = f"{segment.duration_s or length_s:.3f} s" if length_s else "longer than the limit"
        raise AudioFault("audio_too_long", f"{stated}, at most {limits.max_duration_s:g} s")
    if not np.isfinite(samples).all():
        raise AudioFault("audio_not_finite", f"{int((~np.isfinite(samples)).sum())} samples are NaN or infinite")
    peak = float(np.abs(samples).max())
    if peak > INTEGER_PEAK:
        raise AudioFault("audio_scale", f"peak {peak:.6g}, full scale is 1: {_scale_of(peak)}")
    clipped_share = float((np.abs(samples) >= FULL_SCALE).mean())
    if clipped_share > limits.max_clipped_share:
        detail = f"{clipped_share:.1%} of the samples at full scale or beyond, at most {limits.max_clipped_share:.1%}"
        raise AudioFault("audio_clipped", detail)
    wave, cancels = _mix(samples)
    measures = _measure(wave, sample_rate, samples.shape[1], clipped_share, cancels)
    return AudioFile(wave, measures)


def _scale_of(peak: float) -> str:
    for bits in (16, 24, 32):
        if peak <= 1 << (bits - 1):
            return f"{bits}-bit integers written as floats; divide them by {1 << (bits - 1)}"
    return "the samples are not audio, or damaged"


def mixed(samples: np.ndarray) -> np.ndarray:
    """samples [S, channels] -> [S]: the mean of the channels, or the loudest where they cancel."""
    return _mix(samples)[0]


def _mix(samples: np.ndarray) -> tuple[np.ndarray, bool]:
    """samples [S, channels] -> (the mean of the channels [S], False), or (the loudest, True) where the mean cancels them.

    Channels without any likeness mix to sqrt(sum of squares) / channels; half of that is left only where one is much like
    another upside down (correlation below -0.75 at equal loudness). Speech is then gone or thin, so one channel is taken.
    """
    wave = samples.mean(axis=1)
    if samples.shape[1] == 1:
        return wave, False
    swing = samples.std(axis=0, dtype=np.float64)
    unlike = float(np.sqrt((swing**2).sum())) / samples.shape[1]
    if float(wave.std(dtype=np.float64)) < CANCELLED * unlike:
        return np.ascontiguousarray(samples[:, int(swing.argmax())]), True
    return wave, False


def _measure(
    wave: np.ndarray, sample_rate: int, num_channels: int, clipped_share: float, cancels: bool
) -> AudioMeasures:
    """Silence, level and rate of a wave [S]. Raises AudioFault for one that is silent throughout."""
    loudness = np.abs(wave)
    peak = float(loudness.max())
    if peak < SILENT_PEAK:
        raise AudioFault("audio_silent", f"peak {peak:.1e}, full scale is 1")
    loud = np.flatnonzero(loudness > SILENCE_BELOW_PEAK * peak)
    leading_s = float(loud[0]) / sample_rate
    trailing_s = float(len(wave) - 1 - loud[-1]) / sample_rate
    sound = measure_sound(wave, sample_rate)
    found = {
        "low_sample_rate": sample_rate < LOW_SAMPLE_RATE,
        "quiet": peak < QUIET_PEAK,
        "dc_offset": abs(float(wave.mean())) > DC_OFFSET,
        "leading_silence": leading_s > LONG_SILENCE_S,
        "trailing_silence": trailing_s > LONG_SILENCE_S,
        "channels_cancel": cancels,
        "narrow_band": sound.bandwidth_hz < NARROW * min(sample_rate, CODEC_RATE) / 2,
        "noisy": sound.level_db - sound.noise_db < NOISY_DB,
    }
    warnings = [code for code, holds in found.items() if holds]
    duration_s = len(wave) / sample_rate
    return AudioMeasures(duration_s, sample_rate, num_channels, clipped_share, leading_s, trailing_s, warnings, sound)
