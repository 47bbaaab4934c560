"""The recording of a voice: from what a caller has at hand to checked audio.

In: a path, a file's bytes, an open binary file, an array with its rate, or a list of these, all of one voice. Out: recordings
read and checked exactly as stage one does (`preprocess.audio`), and edited as it edited the clips of the model's training; an
array goes through the same checks as a wav file of it. Several recordings become one reference, one behind the other with a
short pause, because models are trained with one reference; together they may last as long as one.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.audio import AudioFile, AudioLimits, decode, read_bytes
from preprocess.audio_file import MAX_FILE_BYTES
from preprocess.reasons import ROLE_WARNINGS, AudioFault
from preprocess.sound_edits import AudioSection, edited
from shards.errors import DataError
from shards.sequence import SAMPLE_RATE

log = logging.getLogger("speak")
PAUSE_S = 0.2  # between recordings
MAX_CHANNELS = 16  # of an array: the shorter axis holds them
LIMITS = AudioLimits()


@dataclass(frozen=True, eq=False)
class Reference:
    """A voice as prompts take it."""

    codes: np.ndarray  # [8, T] uint16
    text: str | None  # what is said in it, cleaned; None: not known
    wave_16k: np.ndarray | None  # [n] float32 at 16 kHz, for models that hear it through Whisper


def read_recordings(source: Any, sample_rate: int | None = None) -> list[AudioFile]:
    """Read one recording or a list of them. Raises DataError saying which and why.

    source: path, bytes, binary file, array [S], [S, channels] or [channels, S] (floats within -1 to 1, or integers), a pair
    (array, rate) or (rate, array), {"array": ..., "sampling_rate": ...} as Hugging Face's datasets give it, an `AudioFile`, or a
    list of these. sample_rate: of arrays given without their own.
    """
    sources = source if isinstance(source, list) else [source]
    if not sources:
        raise DataError("reference: an empty list; give at least one recording of the voice")
    recordings = [_read(one, sample_rate, f"reference {_name(one, number)}") for number, one in enumerate(sources)]
    total_s = sum(one.measures.duration_s for one in recordings) + PAUSE_S * (len(recordings) - 1)
    if total_s > LIMITS.max_duration_s:
        raise DataError(
            f"reference: {len(recordings)} recordings of {total_s:.1f} s together, at most {LIMITS.max_duration_s:g} s; "
            "give fewer or shorter ones"
        )
    return recordings


def edited_recordings(recordings: list[AudioFile], edits: AudioSection) -> list[AudioFile]:
    """As stage one edited the clips that the voice was trained on: silence at the edges, loudness. Raises DataError."""
    try:
        return [edited(one, edits, LIMITS) for one in recordings]
    except AudioFault as fault:
        raise DataError(f"reference: {fault.detail}; give a recording with more speech in it") from None


def joined_wave(recordings: list[AudioFile], sample_rate: int) -> np.ndarray:
    """All recordings [S] float32 at a rate, with pauses between them."""
    pause = np.zeros(round(PAUSE_S * sample_rate), np.float32)
    waves = [piece for one in recordings for piece in (pause, one.at(sample_rate))]
    return np.concatenate(waves[1:])


def _read(source: Any, sample_rate: int | None, name: str) -> AudioFile:
    if isinstance(source, AudioFile):
        return source
    try:
        audio = decode(_bytes_of(source, sample_rate, name), LIMITS)
    except AudioFault as fault:
        raise DataError(f"{name}: {fault.detail}") from None
    for code in audio.measures.warnings:
        log.warning("%s: %s", name, ROLE_WARNINGS[code])
    return audio


def _bytes_of(source: Any, sample_rate: int | None, name: str) -> bytes:
    if isinstance(source, (str, Path)):
        return read_bytes(str(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if hasattr(source, "read"):
        try:
            data = source.read(MAX_FILE_BYTES + 1)
        except ValueError as error:  # of a closed file
            raise DataError(f"{name}: {str(error).rstrip('.')}; give an open file, or its path") from None
        if not isinstance(data, bytes):
            raise DataError(f"{name}: a file opened for text; open it with mode 'rb'")
        if len(data) > MAX_FILE_BYTES:
            raise DataError(f"{name}: more than {MAX_FILE_BYTES} bytes; cut out the clip of the voice")
        if not data:
            raise DataError(f"{name}: nothing left to read; is it at its end? seek(0) first")
        return data
    if isinstance(source, dict) and {"array", "sampling_rate"} <= source.keys():
        source = source["array"], source["sampling_rate"]
    if isinstance(source, tuple):
        source, sample_rate = _pair(source, name)
    return _wav_of(source, sample_rate, name)


def _pair(source: tuple, name: str) -> tuple[Any, int]:
    """(array, rate) and (rate, array) are both in use."""
    if len(source) == 2:
        for array, rate in (source, source[::-1]):
            if np.ndim(array) and isinstance(rate, (int, np.integer)):
                return array, int(rate)
            if np.ndim(array) and isinstance(rate, (float, np.floating)):
                raise DataError(f"{name}: sample rate {rate!r}: expected whole Hz, such as {SAMPLE_RATE}")
    raise DataError(f"{name}: a tuple must be (array, sample rate); several recordings are given as a list")


def _wav_of(array: Any, sample_rate: int | None, name: str) -> bytes:
    """An array as the bytes of a float wav file."""
    import soundfile

    try:
        if hasattr(array, "detach"):  # numpy knows no bfloat16, in which models speak
            array = array.detach().cpu()
            array = array.float() if array.is_floating_point() else array
        samples = np.asarray(array)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: not audio: {error}") from None
    if samples.dtype.kind not in "fiu" or samples.ndim not in (1, 2) or not samples.size:
        raise DataError(
            f"{name}: expected a path, bytes, a binary file or an array [S] or [S, channels] of numbers, got "
            f"{type(array).__name__} of {samples.dtype} {list(samples.shape)}"
        )
    if sample_rate is None:
        raise DataError(f"{name}: an array without its rate; give (array, sample rate)")
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1] and samples.shape[0] <= MAX_CHANNELS:
        samples = samples.T
    if not 0 < sample_rate < 1 << 31 or (samples.ndim == 2 and samples.shape[1] > MAX_CHANNELS):
        raise DataError(f"{name}: array {list(samples.shape)} at {sample_rate} Hz is no recording of speech")
    if samples.dtype.kind in "iu":
        zero = 0.0 if samples.dtype.kind == "i" else float(1 << (8 * samples.itemsize - 1))
        samples = (samples - zero) / float(1 << (8 * samples.itemsize - 1))
    file = io.BytesIO()
    with np.errstate(over="ignore"):
        soundfile.write(file, samples.astype(np.float32), sample_rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _name(source: Any, number: int) -> str:
    return str(source) if isinstance(source, (str, Path)) else f"number {number + 1}"
