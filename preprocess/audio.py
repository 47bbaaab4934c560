"""Reads one audio file: bytes in, mono float32 waves at 24 kHz (codec) and 16 kHz (Whisper) out, or a named fault.

libsndfile reads cut-off files without a complaint, so the frames read are held against the header, and for wav the
declared size against the file. Nothing is repaired or replaced by silence: a file with a fault is rejected with one of
REASONS, and the row that needs it with it.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import soundfile

from preprocess.reasons import AudioFault
from preprocess.segment import WHOLE, Segment

CODEC_RATE = 24000
WHISPER_RATE = 16000
SILENT_PEAK = 1e-3  # -60 dB of full scale: nothing anybody said
QUIET_PEAK = 0.03  # -30 dB
FULL_SCALE = 0.999
SILENCE_BELOW_PEAK = 0.02  # -34 dB of the clip's peak counts as leading or trailing silence
LONG_SILENCE_S = 1.0
DC_OFFSET = 0.02
LOW_SAMPLE_RATE = 16000
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 4000, 384000  # telephones have 8000; beyond lie damaged headers
EXACT_SEEK = frozenset({"WAV", "WAVEX", "FLAC", "AIFF", "AU", "CAF", "W64", "RF64"})  # libsndfile's names
BLOCK = 1 << 18  # samples


class AudioMeasures(msgspec.Struct, frozen=True):
    """What was found in a decoded file; kept beside its codes, so that no file is decoded twice."""

    duration_s: float
    sample_rate: int
    num_channels: int
    clipped_share: float
    leading_silence_s: float
    trailing_silence_s: float
    warnings: list[str]


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


def read_bytes(path: str) -> bytes:
    """The file's bytes. Raises AudioFault."""
    file = Path(path)
    try:
        if not file.is_file():
            detail = "not a regular file" if file.exists() else "no such file"
            raise AudioFault("audio_missing", detail)
        return file.read_bytes()
    except OSError as error:
        raise AudioFault("audio_unreadable", str(error.strerror)) from None


def decode(data: bytes, limits: AudioLimits, segment: Segment = WHOLE) -> AudioFile:
    """Decode and check a file's bytes, or the segment of them that the row means. Raises AudioFault.

    The limits hold for the segment; of a longer file no more than the segment is kept in memory.
    """
    segment.check()
    samples, declared, sample_rate = _samples(data, limits.max_duration_s, segment)  # [S, channels]
    missing = _missing_riff_bytes(data)
    if missing:
        raise AudioFault("audio_truncated", f"{missing} bytes fewer than its RIFF header says")
    if _ogg_is_cut(data):
        raise AudioFault("audio_truncated", "its last Ogg page does not end the stream")
    if len(samples) <= limits.max_duration_s * sample_rate:
        segment.check_read(len(samples), sample_rate)
    if segment.is_whole and 0 < declared < 1 << 40 and len(samples) != declared:
        raise AudioFault("audio_truncated", f"{len(samples)} of {declared} samples could be read")
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        detail = f"{sample_rate} Hz; accepted are {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz"
        raise AudioFault("audio_sample_rate", detail)
    duration_s = len(samples) / sample_rate
    if duration_s < limits.min_duration_s:
        raise AudioFault("audio_too_short", f"{duration_s:.3f} s, at least {limits.min_duration_s:g} s")
    if duration_s > limits.max_duration_s:
        raise AudioFault("audio_too_long", f"{duration_s:.3f} s, at most {limits.max_duration_s:g} s")
    wave = samples.mean(axis=1)
    if not np.isfinite(wave).all():
        raise AudioFault("audio_not_finite", f"{int((~np.isfinite(wave)).sum())} samples are NaN or infinite")
    clipped_share = float((np.abs(samples) >= FULL_SCALE).mean())
    if clipped_share > limits.max_clipped_share:
        detail = f"{clipped_share:.1%} of the samples at full scale or beyond, at most {limits.max_clipped_share:.1%}"
        raise AudioFault("audio_clipped", detail)
    return AudioFile(wave, _measure(wave, sample_rate, samples.shape[1], clipped_share))


def _measure(wave: np.ndarray, sample_rate: int, num_channels: int, clipped_share: float) -> AudioMeasures:
    """Silence, level and rate of a wave [S]. Raises AudioFault for one that is silent throughout."""
    loudness = np.abs(wave)
    peak = float(loudness.max())
    if peak < SILENT_PEAK:
        raise AudioFault("audio_silent", f"peak {peak:.1e}, full scale is 1")
    loud = np.flatnonzero(loudness > SILENCE_BELOW_PEAK * peak)
    leading_s = float(loud[0]) / sample_rate
    trailing_s = float(len(wave) - 1 - loud[-1]) / sample_rate
    found = {
        "low_sample_rate": sample_rate < LOW_SAMPLE_RATE,
        "quiet": peak < QUIET_PEAK,
        "dc_offset": abs(float(wave.mean())) > DC_OFFSET,
        "leading_silence": leading_s > LONG_SILENCE_S,
        "trailing_silence": trailing_s > LONG_SILENCE_S,
    }
    warnings = [code for code, holds in found.items() if holds]
    duration_s = len(wave) / sample_rate
    return AudioMeasures(duration_s, sample_rate, num_channels, clipped_share, leading_s, trailing_s, warnings)


def _samples(data: bytes, max_duration_s: float, segment: Segment) -> tuple[np.ndarray, int, int]:
    """(samples [S, channels] float32 of the segment, samples the header declares for the file, rate).

    libsndfile first, PyAV for what it lacks.
    """
    try:
        with _Stream(io.BytesIO(data)) as file:
            duration_s = file.frames / file.samplerate
            if segment.is_whole and file.frames < 1 << 40 and duration_s > 2 * max_duration_s:
                # hours of audio would fill the memory
                raise AudioFault("audio_too_long", f"{duration_s:.3f} s by its header, at most {max_duration_s:g} s")
            samples = _read_segment(file, segment, max_duration_s)
            return samples, file.frames, file.samplerate
    except (soundfile.LibsndfileError, RuntimeError) as error:
        if not _is_mp4_or_webm(data):
            raise AudioFault("audio_unreadable", f"{len(data)} bytes: {error}") from None
    try:
        import av
    except ImportError:
        detail = "m4a and webm need PyAV: pip install -e '.[av]'"
        raise AudioFault("audio_unreadable", detail) from None
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.audio[0]
            to_float = av.AudioResampler(format="fltp")
            frames = [part.to_ndarray() for frame in container.decode(stream) for part in to_float.resample(frame)]
            samples = np.concatenate(frames, axis=1).T.astype(np.float32)
            return samples[segment.start(stream.rate) : segment.end(stream.rate)], 0, int(stream.rate)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise AudioFault("audio_unreadable", f"{len(data)} bytes: {error}") from None


class _Stream(soundfile.SoundFile):
    """A sound file that is read from front to back.

    soundfile seeks after each read of a seekable file, and libsndfile's MP3 decoder does not come back to the same samples.
    """

    def seekable(self) -> bool:
        return False


def _read_segment(file: _Stream, segment: Segment, max_duration_s: float) -> np.ndarray:
    """samples [S, channels] float32 of the segment; at most twice the longest that is allowed."""
    start, end = segment.start(file.samplerate), segment.end(file.samplerate)
    skip = start
    if file.format in EXACT_SEEK:
        file.seek(min(start, file.frames))
        skip = max(0, start - file.frames)
    while skip > 0 and len(dropped := file.read(min(skip, BLOCK), dtype="float32")):
        skip -= len(dropped)  # packed formats seek to a neighbour, so what lies before is decoded and dropped
    wanted = round(2 * max_duration_s * file.samplerate)
    if end is not None:
        wanted = min(wanted, end - start)
    blocks: list[np.ndarray] = []
    while wanted > 0 and skip == 0 and len(block := file.read(min(wanted, BLOCK), dtype="float32", always_2d=True)):
        blocks.append(block)
        wanted -= len(block)
    return np.concatenate(blocks) if blocks else np.zeros((0, file.channels), np.float32)


def _is_mp4_or_webm(data: bytes) -> bool:
    return data[4:8] == b"ftyp" or data[:4] == b"\x1a\x45\xdf\xa3"


def _ogg_is_cut(data: bytes) -> bool:
    """An Ogg file cut between pages decodes without a complaint, but its last page lacks the end-of-stream flag."""
    if data[:4] != b"OggS":
        return False
    last_page = data.rfind(b"OggS")
    return not data[last_page + 5] & 0x04


def _missing_riff_bytes(data: bytes) -> int:
    """How many bytes of the data chunk are not there; 0 for other formats and for streamed wavs of unknown size."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return 0
    position = 12
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, position)
        if name == b"data":
            unknown = size in (0, 0xFFFFFFFF, 0x7FFFFFFF)
            return 0 if unknown else max(0, position + 8 + size - len(data) - 1)  # a lost pad byte is harmless
        position += 8 + size + size % 2
    return 0
