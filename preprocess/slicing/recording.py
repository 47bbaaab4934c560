"""Reads a long recording from front to back in blocks, so that three hours need no more memory than a minute.

In: a path. Out: blocks [n, channels] float32 of the file as it is, or a mono stream at 16 kHz for the voice activity model. What
stage one would refuse of a clip is refused here of the recording: half a file, joined files, a form that nobody reads. What
libsndfile lacks (m4a, webm) comes by PyAV; the price: whether all of it is there shows only when it has been read to its end.
"""

from __future__ import annotations

import hashlib
import mmap
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from preprocess import audio_pyav
from preprocess.audio import mixed
from preprocess.audio_containers import missing, unread
from preprocess.audio_decoders import BLOCK, KNOWN_FORMS, SoundStream
from preprocess.audio_kinds import CONVERT, Kind, check_form, kind_of, unknown
from preprocess.clip_list import is_unicode
from preprocess.reasons import AudioFault

VAD_RATE = 16000
MAX_FLAC_CHANNELS = 8
HEAD_BYTES = 1 << 16
WIDE = frozenset({"PCM_24", "PCM_32", "FLOAT", "DOUBLE"})  # what 16 bits would round


@dataclass(frozen=True)
class Recording:
    """A file that can be read from front to back; `num_samples` by its header, 0 where it states none."""

    path: Path
    sample_rate: int
    num_channels: int
    num_samples: int
    is_wide: bool  # more than 16 bits a sample
    kind: Kind | None = None  # what PyAV reads

    def blocks(self) -> Iterator[np.ndarray]:
        """All samples in blocks [n, channels] float32. Raises AudioFault for what cannot be read or is not finite."""
        num_read = 0
        for block in self._pyav_blocks() if self.kind else self._blocks():
            if not np.isfinite(block).all():
                place_s = num_read / self.sample_rate
                raise AudioFault("audio_not_finite", f"NaN or infinite samples behind {place_s:.1f} s")
            num_read += len(block)
            yield block

    def _blocks(self) -> Iterator[np.ndarray]:
        num_read = 0
        try:
            with SoundStream(str(self.path)) as file:
                while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
                    num_read += len(block)
                    yield block
        except (soundfile.LibsndfileError, RuntimeError) as error:
            place_s = num_read / self.sample_rate
            raise AudioFault("audio_unreadable", f"behind {place_s:.1f} s: {error}") from None
        if num_read < self.num_samples and not is_mpeg(self.path):  # of MP3 the header's number may be a guess
            raise AudioFault("audio_truncated", f"{num_read} of {self.num_samples} samples could be read")

    def _pyav_blocks(self) -> Iterator[np.ndarray]:
        assert self.kind
        num_read = num_waiting = 0
        waiting: list[np.ndarray] = []
        try:
            with self.path.open("rb") as file, audio_pyav.opened(file, self.kind) as sound:
                for samples in sound.frames():
                    num_read += len(samples)
                    num_waiting += len(samples)
                    waiting.append(samples)
                    if num_waiting >= BLOCK:
                        yield np.concatenate(waiting)
                        waiting, num_waiting = [], 0
                if waiting:
                    yield np.concatenate(waiting)
                sound.check_length(num_read / self.sample_rate)
        except (ValueError, RuntimeError, OSError) as error:  # of damaged bytes, beside FFmpeg's own
            place_s = num_read / self.sample_rate
            raise AudioFault("audio_unreadable", f"{self.kind.name}, behind {place_s:.1f} s: {error}") from None

    def mono_16k(self) -> Iterator[np.ndarray]:
        """The mixed wave at 16 kHz in blocks [n] float32."""
        if self.sample_rate == VAD_RATE:
            for block in self.blocks():
                yield mixed(block)
            return
        import soxr

        stream = soxr.ResampleStream(self.sample_rate, VAD_RATE, 1, dtype="float32", quality="HQ")
        for block in self.blocks():
            yield stream.resample_chunk(mixed(block))
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def open_recording(path: Path) -> Recording:
    """Look at a file's form and whether all of it is there. Raises AudioFault."""
    if not is_unicode(str(path)):
        raise AudioFault("audio_missing", "its name is not valid Unicode, so no list can hold it; rename it")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise AudioFault("audio_missing", "not a regular file")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            kind = kind_of(head)
            if kind and kind.decoder != "pyav":
                raise AudioFault("audio_unreadable", f"{kind.name}; {kind.advice}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                data: Any = mapped  # read as bytes are, a page at a time
                if lacks := missing(data):
                    raise AudioFault("audio_truncated", lacks)
                if left := unread(data):
                    raise AudioFault("audio_several", left)
    except OSError as error:
        raise AudioFault("audio_missing", error.strerror or str(error)) from None
    if kind:
        return _opened_by_pyav(path, kind)
    try:
        with SoundStream(str(path)) as opened:
            if opened.format not in KNOWN_FORMS:
                raise AudioFault("audio_unreadable", f"{opened.format_info}; {CONVERT}")
            check_form(opened.channels, opened.samplerate, MAX_FLAC_CHANNELS)
            num_samples = opened.frames if 0 < opened.frames < 1 << 40 else 0
            return Recording(path, opened.samplerate, opened.channels, num_samples, opened.subtype in WIDE)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioFault("audio_unreadable", f"{str(error).rpartition(': ')[2]} {unknown(head)}") from None


def _opened_by_pyav(path: Path, kind: Kind) -> Recording:
    try:
        with path.open("rb") as file, audio_pyav.opened(file, kind) as sound:
            check_form(sound.num_channels, sound.sample_rate, MAX_FLAC_CHANNELS)
            return Recording(path, sound.sample_rate, sound.num_channels, 0, sound.is_wide, kind)
    except (ValueError, RuntimeError, OSError) as error:
        raise AudioFault("audio_unreadable", f"{kind.name}: {error}") from None


def is_mpeg(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(3)
    return head[:1] == b"\xff" or head == b"ID3"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
