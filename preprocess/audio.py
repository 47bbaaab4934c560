"""Reads one audio file: bytes in, mono float32 waves at 24 kHz (codec) and 16 kHz (Whisper) out, or a named fault.

libsndfile reads cut-off files without a complaint, so the frames read are held against the header, and for wav the
declared size against the file. Nothing is repaired or replaced by silence: a file with a fault is rejected with one of
REASONS, and the row that needs it with it.
"""

from __future__ import annotations

import hashlib
import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

CODEC_RATE = 24000
WHISPER_RATE = 16000
SILENT_PEAK = 1e-3  # -60 dB of full scale: nothing anybody said

# Reason code -> what it means. The closed list of why a row is left out (rejects.jsonl).
REASONS = {
    "row_invalid": "the row does not have the ChatML form; the detail names the path inside",
    "audio_count": "not exactly one reference and one target audio, or the target is not in an assistant turn",
    "text_missing": "no reference text or no target text",
    "text_control_token": "a text contains <|...|>, which would become a control token",
    "audio_missing": "the file does not exist or is not a regular file",
    "audio_unreadable": "no decoder knows the file, or the file system does not give it",
    "audio_truncated": "the file ends before its header says",
    "audio_not_finite": "samples that are NaN or infinite",
    "audio_silent": "no sample reaches -60 dB of full scale",
    "audio_too_short": "shorter than preprocess.min_duration_s",
    "audio_too_long": "longer than preprocess.max_duration_s",
    "worker_died": "the process that read this row was killed twice",
}


class AudioFault(Exception):
    """A file that cannot be used; `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        assert reason in REASONS, reason
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class AudioFile:
    """A decoded file."""

    sha256: str  # of the file's bytes
    wave: np.ndarray  # [S] float32, mono, at the file's own rate
    sample_rate: int

    @property
    def duration_s(self) -> float:
        return len(self.wave) / self.sample_rate

    def at(self, sample_rate: int) -> np.ndarray:
        """The wave [S] float32 at another rate."""
        if sample_rate == self.sample_rate:
            return self.wave
        import torch
        from torchaudio.functional import resample

        return resample(torch.from_numpy(self.wave), self.sample_rate, sample_rate).numpy()


def read_bytes(path: str) -> bytes:
    """The file's bytes. Raises AudioFault."""
    file = Path(path)
    if not file.is_file():
        detail = "not a regular file" if file.exists() else "no such file"
        raise AudioFault("audio_missing", detail)
    try:
        return file.read_bytes()
    except OSError as error:
        raise AudioFault("audio_unreadable", str(error.strerror)) from None


def decode(data: bytes, min_duration_s: float, max_duration_s: float) -> AudioFile:
    """Decode and check a file's bytes. Raises AudioFault."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            declared, sample_rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)  # [S, channels]
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioFault("audio_unreadable", f"{len(data)} bytes: {error}") from None
    missing = _missing_riff_bytes(data)
    if missing:
        raise AudioFault("audio_truncated", f"{missing} bytes fewer than its RIFF header says")
    if 0 < declared < 1 << 40 and len(samples) != declared:
        raise AudioFault("audio_truncated", f"{len(samples)} of {declared} samples could be read")
    duration_s = len(samples) / sample_rate
    if duration_s < min_duration_s:
        raise AudioFault("audio_too_short", f"{duration_s:.3f} s, at least {min_duration_s:g} s")
    if duration_s > max_duration_s:
        raise AudioFault("audio_too_long", f"{duration_s:.3f} s, at most {max_duration_s:g} s")
    wave = samples.mean(axis=1)
    if not np.isfinite(wave).all():
        raise AudioFault("audio_not_finite", f"{int((~np.isfinite(wave)).sum())} samples are NaN or infinite")
    peak = float(np.abs(wave).max())
    if peak < SILENT_PEAK:
        raise AudioFault("audio_silent", f"peak {peak:.1e}, full scale is 1")
    return AudioFile(hashlib.sha256(data).hexdigest(), wave, sample_rate)


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
