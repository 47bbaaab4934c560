"""Speech as the bytes of a container, whole or while it is spoken.

In: waves [S] float32 at 24 kHz. Out: bytes, and the media type that is true of them. libsndfile encodes everything; what it
would go back for at the end (FLAC's length, MP3's info frame) cannot be changed in what has been sent, so a streamed FLAC
states no length. MP3 has a constant bit rate and no info frame, streamed or not, because clients join several bodies into one
and players believe the first frame's count. The price: an MP3 is up to 0.1 s longer than its speech.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.sequence import SAMPLE_RATE
from tools.audio_output import BLOCK, encode_audio, pcm16, stream_header

MP3_LEVEL = 0.4  # of libsndfile's 0 to 1: 96 kbit/s at this rate


@dataclass(frozen=True)
class SoundFormat:
    media_type: str
    suffix: str
    kind: tuple[str, str] | None = None  # of libsndfile; None: written here


FORMATS = {
    "mp3": SoundFormat("audio/mpeg", "mp3", ("MP3", "MPEG_LAYER_III")),
    "wav": SoundFormat("audio/wav", "wav"),
    "flac": SoundFormat("audio/flac", "flac", ("FLAC", "PCM_16")),
    "opus": SoundFormat("audio/ogg", "opus", ("OGG", "OPUS")),
    "pcm": SoundFormat("audio/pcm", "pcm"),
}
NOT_MADE = {"aac": "aac is not made here: no encoder for it comes with the dependencies"}


class Encoder:
    """One body, piece by piece: `feed` the waves, then `finish`.

    A client may leave while a thread is encoding for it: `close` waits for that thread, because libsndfile does not survive a
    file that is closed under its writer. What is fed afterwards is dropped.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._sink = Sink()
        self._file = None
        self._begun = False
        self._lock = threading.Lock()
        if kind := FORMATS[name].kind:
            import soundfile

            level = {"compression_level": MP3_LEVEL, "bitrate_mode": "CONSTANT"} if name == "mp3" else {}
            sink: Any = self._sink  # a file object is one that reads and writes
            self._file = soundfile.SoundFile(sink, "w", SAMPLE_RATE, 1, kind[1], format=kind[0], **level)

    def feed(self, wave: np.ndarray) -> bytes:
        """[S] float32 -> what can be sent by now; often nothing."""
        if self._file is None:
            header = b"" if self._begun or self._name == "pcm" else stream_header(SAMPLE_RATE)
            self._begun = True
            return header + pcm16(wave)
        clipped = np.clip(wave, -1, 1)
        with self._lock:
            if self._file.closed:
                return b""
            for start in range(0, len(clipped), BLOCK):
                self._file.write(clipped[start : start + BLOCK])
            return self._sent(self._sink.take())

    def finish(self) -> bytes:
        """The rest: the container is closed."""
        if self._file is None:
            return self.feed(np.zeros(0, np.float32)) if not self._begun else b""
        with self._lock:
            self._file.close()
            return self._sent(self._sink.take())

    def close(self) -> None:
        """Give up; what libsndfile holds is released."""
        if self._file is not None:
            with self._lock:
                self._file.close()

    def _sent(self, data: bytes) -> bytes:
        """Without the frame that is kept for MP3's count: the first bytes of the first piece."""
        if self._name != "mp3" or self._begun or not data:
            return data
        self._begun = True
        return data[info_frame_size(data) :]


class Sink(io.RawIOBase):
    """Where libsndfile writes: what it goes back to change is kept off once it has been taken."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._taken = self._position = 0  # both of the whole

    def write(self, data: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        begin = self._position - self._taken
        self._position += len(data)
        if begin >= 0:
            self._data[begin : begin + len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._taken + len(self._data)}[whence]
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        return b""

    def take(self) -> bytes:
        data = bytes(self._data)
        self._taken += len(data)
        self._data.clear()
        return data


def info_frame_size(data: bytes) -> int:
    """Bytes of the MP3 frame at the beginning where it holds a count instead of sound; MPEG-2 layer III at 24 kHz."""
    rates = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xFE != 0xF2:
        return 0
    size = 72_000 * rates[data[2] >> 4] // SAMPLE_RATE + (data[2] >> 1 & 1)
    head = data[:size]
    # The place of the count: behind 4 bytes of header and 9 of side information. It is blank until the file is closed.
    is_count = head[13:17] in (b"Info", b"Xing") or not any(head[4:])
    return size if is_count else 0


def encoded(name: str, waves: Iterable[np.ndarray]) -> bytes:
    """A whole body, with true sizes."""
    wave = np.concatenate([np.zeros(0, np.float32), *waves])
    if name in ("wav", "pcm"):
        header = stream_header(SAMPLE_RATE, len(wave)) if name == "wav" else b""
        return header + pcm16(wave)
    if name == "mp3":
        encoder = Encoder(name)
        return encoder.feed(wave) + encoder.finish()
    kind = FORMATS[name].kind
    assert kind is not None
    return encode_audio(wave, SAMPLE_RATE, *kind)
