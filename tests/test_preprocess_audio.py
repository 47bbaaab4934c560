"""Broken audio: every way a file can lie gets its reason, and what only looks odd is accepted."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from preprocess.audio import AudioLimits, decode, read_bytes
from preprocess.reasons import REASONS, ROLE_WARNINGS, AudioFault

RATE = 24000


def speech(seconds: float = 3.0, rate: int = RATE) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * 180 * time) * np.sin(2 * np.pi * 3 * time)).astype(np.float32)


def encoded(wave: np.ndarray, rate: int = RATE, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def with_data_size(data: bytes, size: int) -> bytes:
    place = data.index(b"data") + 4
    return data[:place] + size.to_bytes(4, "little") + data[place + 4 :]


def with_values(values: dict[int, float]) -> np.ndarray:
    wave = speech()
    for index, value in values.items():
        wave[index] = value
    return wave


WAV, FLAC, MP3 = (
    encoded(speech()),
    encoded(speech(), form="FLAC"),
    encoded(speech(), form="MP3", subtype="MPEG_LAYER_III"),
)
OPUS = encoded(speech(), form="OGG", subtype="OPUS")


def m4a(wave: np.ndarray) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return buffer.getvalue()


M4A = m4a(speech())
BROKEN = {
    "empty file": (b"", "audio_unreadable"),
    "text": ("صوت".encode(), "audio_unreadable"),
    "cut in the header": (WAV[:30], "audio_unreadable"),
    "half a wav": (WAV[: len(WAV) // 2], "audio_truncated"),
    "half an mp3": (MP3[: len(MP3) // 3], "audio_truncated"),
    "half a flac": (FLAC[: len(FLAC) // 2], "audio_unreadable"),
    "no samples": (encoded(speech()[:0]), "audio_too_short"),
    "one sample": (encoded(speech()[:1]), "audio_too_short"),
    "not finite": (encoded(with_values({1000: np.nan, 2000: np.inf}), subtype="FLOAT"), "audio_not_finite"),
    "float over full scale": (encoded(5 * speech(), subtype="FLOAT"), "audio_clipped"),
    "clipped by 24 dB": (encoded(np.clip(16 * speech(), -1, 1)), "audio_clipped"),
    "rate 0 in the header": (WAV[:24] + bytes(4) + WAV[28:], "audio_unreadable"),
    "half an m4a": (M4A[: len(M4A) // 2], "audio_unreadable"),
    "cut after 1000 bytes": (WAV[:1000], "audio_truncated"),
    "half an opus": (OPUS[: len(OPUS) // 2], "audio_truncated"),
    "silence": (encoded(np.zeros(5 * RATE, np.float32)), "audio_silent"),
    "five minutes": (encoded(np.tile(speech(), 100)), "audio_too_long"),
}
ACCEPTED = {
    "wav": WAV,
    "flac": FLAC,
    "mp3": MP3,
    "ogg": encoded(speech(), form="OGG", subtype="VORBIS"),
    "24 bit": encoded(speech(), subtype="PCM_24"),
    "size unknown (streamed wav)": with_data_size(WAV, 0xFFFFFFFF),
    "last byte lost": WAV[:-1],
    "wav named mp3": WAV,
    "opus": OPUS,
    "m4a": M4A,
    "aiff": encoded(speech(), form="AIFF"),
    "mu-law": encoded(speech(), subtype="ULAW"),
    "quiet": encoded(0.005 * speech()),
    "dc offset": encoded(0.5 * speech() + 0.25),
    "8 kHz": encoded(speech(rate=8000), rate=8000),
    "44.1 kHz": encoded(speech(rate=44100), rate=44100),
    "48 kHz stereo": encoded(np.stack([speech(rate=48000)] * 2, axis=1), rate=48000),
    "eight channels": encoded(np.stack([speech()] * 8, axis=1)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_have_their_reason(name):
    data, reason = BROKEN[name]
    with pytest.raises(AudioFault) as fault:
        decode(data, AudioLimits())
    assert fault.value.reason == reason
    assert fault.value.detail


@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_but_sound_files_are_read(name):
    audio = decode(ACCEPTED[name], AudioLimits())
    assert audio.wave.ndim == 1
    assert audio.wave.dtype == np.float32
    assert audio.measures.duration_s == pytest.approx(3.0, abs=0.1)
    assert len(audio.at(24000)) == pytest.approx(3 * 24000, abs=2400)
    assert len(audio.at(16000)) == pytest.approx(3 * 16000, abs=1600)


def test_channels_are_mixed_down():
    left, right = speech(), np.zeros_like(speech())
    audio = decode(encoded(np.stack([left, right], axis=1), subtype="FLOAT"), AudioLimits())
    np.testing.assert_allclose(audio.wave, left / 2, atol=1e-6)


def test_missing_files_and_folders(tmp_path: Path):
    (tmp_path / "dangling.wav").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.wav").mkdir()
    for name in ("absent.wav", "dangling.wav", "folder.wav"):
        with pytest.raises(AudioFault) as fault:
            read_bytes(str(tmp_path / name))
        assert fault.value.reason == "audio_missing"
    arabic = tmp_path / "صوت أول.wav"
    arabic.write_bytes(WAV)
    assert read_bytes(str(arabic)) == WAV


def test_every_reason_is_explained():
    assert all(text for text in REASONS.values())
    assert {reason for _, reason in BROKEN.values()} <= set(REASONS)


@pytest.mark.parametrize(
    ("name", "wave", "rate"),
    [
        ("low_sample_rate", speech(rate=8000), 8000),
        ("quiet", 0.01 * speech(), RATE),
        ("dc_offset", 0.5 * speech() + 0.25, RATE),
        ("leading_silence", np.concatenate([np.zeros(2 * RATE, np.float32), speech()]), RATE),
        ("trailing_silence", np.concatenate([speech(), np.zeros(2 * RATE, np.float32)]), RATE),
    ],
)
def test_what_is_odd_is_measured_and_flagged(name, wave, rate):
    measures = decode(encoded(wave, rate), AudioLimits()).measures
    assert measures.warnings == [name]
    assert name in ROLE_WARNINGS
    if name.endswith("silence"):
        assert getattr(measures, f"{name}_s") == pytest.approx(2.0, abs=0.1)


def test_a_sound_file_has_no_warnings():
    assert decode(WAV, AudioLimits()).measures.warnings == []


def test_m4a_without_pyav_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioFault, match=r"pip install -e '\.\[av\]'"):
        decode(M4A, AudioLimits())
