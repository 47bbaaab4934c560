"""Where speech goes: a sound file by its suffix, or a wav stream that has no end yet.

In: a wave at 24 kHz. Out: wav and flac with 16 bits, mp3, ogg (Vorbis), written under a temporary name, or a stream that players
read from a pipe. What is louder than full scale is clipped, and counted. Names are checked before a model is loaded.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np

from shards.errors import ConfigError
from shards.writer import write_bytes

FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".ogg": ("OGG", "VORBIS"),
}
BLOCK = 1 << 16  # samples; libsndfile's Vorbis encoder crashes on minutes at once
UNKNOWN_SIZE = 0xFFFFFFFF  # of a wav whose end is not known: what players expect of a pipe


def check_out(path: Path) -> None:
    """Raises ConfigError for a name whose suffix says no known kind of file."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out {path}: unknown kind {path.suffix!r}; known are {', '.join(FORMATS)}")


def write_audio(path: Path, wave: np.ndarray, sample_rate: int) -> int:
    """wave [S] float32 -> the file; returns how many samples were clipped to full scale."""
    write_bytes(path, encode_audio(wave, sample_rate, *FORMATS[path.suffix.lower()]))
    return int((np.abs(wave) > 1).sum())


def encode_audio(wave: np.ndarray, sample_rate: int, kind: str, subtype: str) -> bytes:
    """wave [S] float32, clipped to full scale -> the bytes of a closed file; kind and subtype are libsndfile's."""
    import soundfile

    buffer = io.BytesIO()
    clipped = np.clip(wave, -1, 1)
    with soundfile.SoundFile(buffer, "w", sample_rate, 1, subtype, format=kind) as file:
        for start in range(0, len(wave), BLOCK):
            file.write(clipped[start : start + BLOCK])
    return buffer.getvalue()


def stream_header(sample_rate: int, num_samples: int | None = None) -> bytes:
    """The first 44 bytes of a 16-bit mono wav; None: an endless one."""
    form = struct.pack("<HHIIHH", 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    size = UNKNOWN_SIZE if num_samples is None else 2 * num_samples
    whole = UNKNOWN_SIZE if num_samples is None else size + 36
    head = b"RIFF" + struct.pack("<I", whole) + b"WAVEfmt " + struct.pack("<I", len(form))
    return head + form + b"data" + struct.pack("<I", size)


def pcm16(wave: np.ndarray) -> bytes:
    """wave [S] float32 -> 16-bit samples."""
    return (np.clip(wave, -1, 1) * 32767).round().astype("<i2").tobytes()


def numbered(path: Path, number: int, count: int) -> Path:
    """speech-001.wav: of several texts, counted from 1; one text keeps the name."""
    return path if count == 1 else path.with_name(f"{path.stem}-{number:0{max(3, len(str(count)))}d}{path.suffix}")
