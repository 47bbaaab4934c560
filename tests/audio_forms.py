"""Sound files of many forms, made in memory: what people's tools write, pipes included."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import soundfile

from preprocess import mpeg_frames

RATE = 24000


def voice(seconds: float = 3.0, rate: int = RATE) -> np.ndarray:
    """Something that swells and falls like speech, loudest at 0.3; no two stretches are equal."""
    time_s = np.arange(round(seconds * rate)) / rate
    swell = 0.6 + 0.4 * np.sin(2 * np.pi * 3 * time_s)
    tone = np.sin(2 * np.pi * (180 * time_s + 9 * np.sin(2 * np.pi * 0.7 * time_s)))
    noise = np.random.default_rng(3).normal(0, 0.05, len(time_s))
    return (0.28 * swell * (tone + noise)).clip(-0.9, 0.9).astype(np.float32)


def encoded(wave: np.ndarray, form: str = "WAV", subtype: str = "PCM_16", rate: int = RATE, **options) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(
        buffer, "w", rate, 1 if wave.ndim == 1 else wave.shape[1], subtype=subtype, format=form, **options
    ) as file:
        file.write(wave)
    return buffer.getvalue()


class Pipe(io.RawIOBase):
    """What a program writes to that cannot go back and fill in a length."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data) -> int:
        self.parts.append(bytes(data))
        return len(data)


def by_ffmpeg(wave: np.ndarray, container: str, codec: str, rate: int = RATE, piped: bool = False) -> bytes:
    """wave [S] or [S, channels] through FFmpeg's encoders."""
    import av

    wave = wave[:, None] if wave.ndim == 1 else wave
    layout = {1: "mono", 2: "stereo"}[wave.shape[1]]
    target = Pipe() if piped else io.BytesIO()
    if piped:
        target.seek = None  # pyright: ignore - PyAV asks for the attribute
    with av.open(target, "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=rate, layout=layout)
        if codec == "wmav2":
            stream.bit_rate = 64000
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.T), format="fltp", layout=layout)
        frame.sample_rate = rate
        size = stream.codec_context.frame_size or 1024
        fifo = av.AudioFifo()
        for part in resampler.resample(frame):
            part.pts = None
            fifo.write(part)
        while part := fifo.read(size, partial=True):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return b"".join(target.parts) if isinstance(target, Pipe) else target.getvalue()


def video_only() -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(10):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def two_tracks(container: str) -> bytes:
    """One second of two audio tracks, as films in two languages have them."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        streams: list[Any] = [file.add_stream("aac", rate=48000, layout="mono") for _ in range(2)]
        for stream in streams:
            frame = av.AudioFrame.from_ndarray(voice(1.0, 48000)[None, :47104], format="fltp", layout="mono")
            frame.sample_rate = 48000
            fifo = av.AudioFifo()
            fifo.write(frame)
            while part := fifo.read(1024):
                file.mux(stream.encode(part))
            file.mux(stream.encode(None))
    return buffer.getvalue()


def mp3(wave: np.ndarray, rate: int = RATE, **options) -> bytes:
    return encoded(wave, "MP3", "MPEG_LAYER_III", rate, **options)


def without_tag(data: bytes) -> bytes:
    """An MP3 as it comes out of a pipe: no ID3, no Xing frame."""
    frames = mpeg_frames.scan(data)
    assert frames
    return data[frames.begin : frames.end]


def with_data_size(data: bytes, size: int) -> bytes:
    """A wav with another size of its data chunk, and of the file, as writers into pipes leave both."""
    place = data.index(b"data") + 4
    data = data[:place] + size.to_bytes(4, "little") + data[place + 4 :]
    return data[:4] + min(size + 36, 0xFFFFFFFF).to_bytes(4, "little") + data[8:]


def flac_of_unknown_length(data: bytes) -> bytes:
    assert data[:4] == b"fLaC"
    return data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]


def rf64_from_a_pipe(wave: np.ndarray) -> bytes:
    """Its 64-bit size of the samples, which stands in the chunk ds64, was never filled in."""
    data = encoded(wave, "RF64")
    return data[:28] + bytes(8) + data[36:]


def sound_forms(seconds: float = 3.0) -> dict[str, bytes]:
    """One file of every form that is read, `seconds` long."""
    wave, at_8k, at_48k = voice(seconds), voice(seconds, 8000), voice(seconds, 48000)
    wav = encoded(wave)
    vbr = mp3(at_48k, 48000, bitrate_mode="VARIABLE", compression_level=0.3)
    flac = encoded(wave, "FLAC")
    return {
        "wav": wav,
        "wav of 24 bit": encoded(wave, subtype="PCM_24"),
        "float wav": encoded(wave, subtype="FLOAT"),
        "GSM wav": encoded(at_8k, subtype="GSM610", rate=8000),
        "ADPCM wav": encoded(wave, subtype="IMA_ADPCM"),
        "wav from a pipe (0)": with_data_size(wav, 0),
        "wav from a pipe (ffmpeg)": with_data_size(wav, 0xFFFFFFFF),
        "wav from a pipe (sox)": with_data_size(wav, 0x7FFFF000),
        "wav from a pipe (arecord)": with_data_size(wav, 0x80000000),
        "RF64": encoded(wave, "RF64"),
        "W64": encoded(wave, "W64"),
        "AIFF": encoded(wave, "AIFF"),
        "AU": encoded(wave, "AU"),
        "CAF": encoded(wave, "CAF"),
        "CAF of Apple Lossless": encoded(wave, "CAF", "ALAC_16"),
        "FLAC": flac,
        "FLAC of unknown length": flac_of_unknown_length(flac),
        "FLAC behind an ID3 tag": b"ID3\x03\x00\x00\x00\x00\x00\x0a" + bytes(10) + flac,
        "Vorbis": encoded(wave, "OGG", "VORBIS"),
        "Opus": encoded(wave, "OGG", "OPUS"),
        "MP3": mp3(wave),
        "MP3 of 48 kHz stereo": mp3(np.stack([at_48k, at_48k], axis=1), 48000),
        "MP3 of variable rate": vbr,
        "MP3 from a pipe": without_tag(mp3(wave)),
        "MP3 of variable rate from a pipe": without_tag(vbr),
        "MP3 with ID3 from a pipe": b"ID3\x04\x00\x00\x00\x00\x01\x00" + bytes(128) + without_tag(mp3(wave)),
        "MP3 with ID3v1 from a pipe": without_tag(mp3(wave)) + b"TAG" + bytes(125),
        "MP2": by_ffmpeg(at_48k, "mp2", "mp2", 48000),
        "m4a": by_ffmpeg(wave, "mp4", "aac"),
        "AAC (ADTS)": by_ffmpeg(wave, "adts", "aac"),
        "webm": by_ffmpeg(at_48k, "webm", "libopus", 48000),
        "webm from a pipe": by_ffmpeg(at_48k, "webm", "libopus", 48000, piped=True),
        "FLAC from a pipe (FFmpeg)": by_ffmpeg(wave, "flac", "flac", piped=True),
        "wav from a pipe (FFmpeg)": by_ffmpeg(wave, "wav", "pcm_s16le", piped=True),
        "MP3 from a pipe (FFmpeg)": by_ffmpeg(wave, "mp3", "libmp3lame", piped=True),
        "RF64 from a pipe": rf64_from_a_pipe(wave),
        "NIST SPHERE": encoded(wave, "NIST"),
        "Ogg FLAC": by_ffmpeg(at_48k, "ogg", "flac", 48000),
        "AVI": by_ffmpeg(at_48k, "avi", "pcm_s16le", 48000),
        "Flash video": by_ffmpeg(at_48k, "flv", "libmp3lame", 48000),
        "WMA": by_ffmpeg(at_48k, "asf", "wmav2", 48000),
        "WavPack": by_ffmpeg(wave, "wv", "wavpack"),
        "True Audio": by_ffmpeg(wave, "tta", "tta"),
    }
