"""What one spoken wave is, and whether it is a failure: nothing that failed may leave the denominator.

In: a wave file, how long it should be, whether the model ended by itself. Out: `WaveFacts` and the failure's name. A file that
is missing or unreadable has facts too: its error. Limits are those of stage one for silence and full scale.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np

from preprocess.audio import CODEC_RATE, FULL_SCALE, SILENCE_BELOW_PEAK, SILENT_PEAK
from preprocess.audio_file import read_bytes
from preprocess.reasons import AudioFault

RUNAWAY = 2.0  # times the expected length
MAX_CLIPPED_SHARE = 0.02  # of samples at full scale, as stage one refuses
MAX_SECONDS = 600.0
FAILURES = ("missing", "empty", "silent", "clipped", "runaway", "not ended")


class WaveFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Measured on the decoded file; everything but `error` is empty where it cannot be read."""

    sha256: str = ""
    duration_s: float = 0.0
    peak: float = 0.0
    clipped_share: float = 0.0
    leading_silence_s: float = 0.0
    trailing_silence_s: float = 0.0
    error: str = ""  # why there is no wave


def read_wave(path: Path) -> tuple[np.ndarray, WaveFacts]:
    """The wave [S] float32 at 24 kHz and its facts; an empty wave and the error where there is none. Never raises."""
    import io

    import soundfile
    import soxr

    from preprocess.audio_kinds import check_form
    from preprocess.mpeg_frames import marked

    nothing = np.zeros(0, np.float32)
    try:
        data = read_bytes(str(path))
    except AudioFault as fault:
        return nothing, WaveFacts(error=f"{path.name}: {fault.detail}")
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        with soundfile.SoundFile(io.BytesIO(marked(data) if data[:1] == b"\xff" else data)) as file:
            rate = file.samplerate
            check_form(file.channels, rate)
            samples = file.read(round(MAX_SECONDS * rate), dtype="float32", always_2d=True).mean(axis=1)
    except AudioFault as fault:
        return nothing, WaveFacts(sha256=sha256, error=f"{path.name}: {fault.detail}")
    except (soundfile.SoundFileError, RuntimeError, ValueError, MemoryError) as error:
        what = str(error).rpartition(": ")[2]  # before it stands where the bytes lay in memory
        return nothing, WaveFacts(sha256=sha256, error=f"{path.name}: not readable as audio: {what}")
    if not np.isfinite(samples).all():
        return nothing, WaveFacts(sha256=sha256, error=f"{path.name}: holds samples that are not finite")
    facts = measure(samples, rate, sha256)
    return (soxr.resample(samples, rate, CODEC_RATE, quality="HQ") if rate != CODEC_RATE else samples), facts


def measure(wave: np.ndarray, sample_rate: int, sha256: str = "") -> WaveFacts:
    """Facts of a wave [S] float32."""
    if not len(wave):
        return WaveFacts(sha256=sha256)
    loudness = np.abs(wave)
    peak = float(loudness.max())
    loud = np.flatnonzero(loudness > SILENCE_BELOW_PEAK * peak) if peak > 0 else np.zeros(0, int)
    return WaveFacts(
        sha256=sha256,
        duration_s=len(wave) / sample_rate,
        peak=peak,
        clipped_share=float((loudness >= FULL_SCALE).mean()),
        leading_silence_s=float(loud[0]) / sample_rate if len(loud) else len(wave) / sample_rate,
        trailing_silence_s=float(len(wave) - 1 - loud[-1]) / sample_rate if len(loud) else 0.0,
    )


def failure_of(facts: WaveFacts, ended: bool | None, expected_s: float | None) -> str:
    """One of FAILURES, the first that holds, or "". `ended` None: nobody knows, as of waves of other systems."""
    found = {
        "missing": bool(facts.error),
        "empty": facts.duration_s == 0,
        "silent": facts.peak < SILENT_PEAK,
        "clipped": facts.clipped_share > MAX_CLIPPED_SHARE,
        "runaway": expected_s is not None and facts.duration_s > RUNAWAY * expected_s,
        "not ended": ended is False,
    }
    return next((name for name in FAILURES if found[name]), "")


def longest_copy(codes: np.ndarray, prompt: np.ndarray) -> int:
    """Frames of the longest run of `codes` [8, T] that stands in `prompt` [8, P] as well, in all codebooks alike.

    A voice that repeats its prompt is like it without having said anything: 40 ms each.
    """
    longest = 0
    runs = np.zeros(prompt.shape[1] + 1, np.int64)
    for column in codes.T:
        is_equal = (prompt == column[:, None]).all(axis=0)
        runs[1:] = np.where(is_equal, runs[:-1] + 1, 0)
        longest = max(longest, int(runs.max()))
    return longest
