"""What libsndfile lacks (m4a, webm, WMA, AMR, ...), by PyAV, frame by frame.

In: an open file and its kind. Out: a `PyavSound`: its form, and its samples as frames. FFmpeg is told the container's form and
never guesses it. Channels and rate are looked at before anything is decoded (PyAV 18 crashes on 36 channels), and again at the
first frame, because HE-AAC tells its rate only there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from preprocess.audio_kinds import ADTS, CONVERT, Kind, check_form
from preprocess.reasons import AudioFault

MAX_PYAV_CHANNELS = 8  # planes of an FFmpeg frame
PYAV_SHORTAGE_S = 0.2  # a container's duration is rounded to packets
INTEGER_SCALES = {"u8": 128, "s16": 1 << 15, "s32": 1 << 31, "s64": 1 << 63}  # FFmpeg's sample formats, full scale
WIDE_CODECS = frozenset(
    {"wavpack", "ape", "flac", "alac", "tta"}
)  # of s32 frames; a lossy codec's are no wider than 16 bits


class PyavSound:
    """An open file of one audio track."""

    def __init__(self, container: Any, kind: Kind) -> None:
        self._container, self._kind = container, kind
        if not container.streams.audio:
            others = "video" if container.streams.video else "no stream that is known"
            raise AudioFault("audio_unreadable", f"{kind.name} without audio: it holds {others}")
        num_tracks = len(container.streams.audio)
        if num_tracks > 1:
            tracks = f"{kind.name} with {num_tracks} audio tracks"
            raise AudioFault("audio_several", f"{tracks}; keep one: ffmpeg -i FILE -map 0:a:0 FILE.flac")
        self._stream = container.streams.audio[0]
        context: Any = self._stream.codec_context
        if context is None:
            raise AudioFault("audio_unreadable", f"{kind.name} of an unknown codec; {CONVERT}")
        check_form(context.layout.nb_channels, context.sample_rate, MAX_PYAV_CHANNELS)
        self._frames = container.decode(self._stream)
        self._first = next(self._frames, None)
        form = self._first or context
        self.num_channels, self.sample_rate = int((form.layout).nb_channels), int(form.sample_rate)
        check_form(self.num_channels, self.sample_rate, MAX_PYAV_CHANNELS)
        wide = self._first is not None and self._first.format.name.startswith("s32")
        self.is_wide = wide and context.name in WIDE_CODECS

    def frames(self) -> Iterator[np.ndarray]:
        """All samples, once, in blocks [n, channels] float32. Raises AudioFault where their form changes."""
        frame = self._first
        while frame is not None:
            if (frame.layout.nb_channels, frame.sample_rate) != (self.num_channels, self.sample_rate):
                raise AudioFault("audio_unreadable", "channels or rate change inside the file")
            yield frame_samples(frame)
            frame = next(self._frames, None)

    def check_length(self, read_s: float) -> None:
        """Raises AudioFault for less audio than the container states. Streams of packets (ADTS, AMR) state nothing."""
        if self._kind is ADTS or self._kind.name == "AMR":
            return
        stated_s = 0.0
        if self._stream.duration:
            stated_s = float(self._stream.duration * self._stream.time_base)
        elif self._container.duration and not self._container.streams.video:
            stated_s = self._container.duration / 1_000_000
        if stated_s - read_s > PYAV_SHORTAGE_S:
            raise AudioFault("audio_truncated", f"{read_s:.3f} of {stated_s:.3f} s could be read")


@contextmanager
def opened(file: BinaryIO, kind: Kind) -> Iterator[PyavSound]:
    """Raises AudioFault, also for what FFmpeg raises while its frames are read."""
    try:
        import av
    except ImportError:
        detail = f"{kind.name} needs PyAV: pip install -e '.[av]', or {CONVERT}"
        raise AudioFault("audio_unreadable", detail) from None
    try:
        with av.open(file, "r", format=kind.container) as container:
            yield PyavSound(container, kind)
    except av.FFmpegError as error:
        raise AudioFault("audio_unreadable", f"{kind.name}: {error}") from None


def frame_samples(frame: Any) -> np.ndarray:
    """A PyAV frame -> [n, channels] float32."""
    name = frame.format.name.removesuffix("p")
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
    if name == "u8":
        values = values.astype(np.float32) - 128
    return (values / INTEGER_SCALES[name] if name in INTEGER_SCALES else values).astype(np.float32)
