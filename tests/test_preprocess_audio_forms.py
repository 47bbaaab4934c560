"""Audio that nobody planned for: every form is read whole or rejected in words, and damaged bytes never raise."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from audio_forms import (
    RATE,
    by_ffmpeg,
    encoded,
    flac_of_unknown_length,
    mp3,
    sound_forms,
    two_tracks,
    video_only,
    voice,
    with_data_size,
    without_tag,
)

from preprocess import mpeg_frames
from preprocess.audio import AudioLimits, decode
from preprocess.reasons import AudioFault

pytest.importorskip("av")
FORMS = sound_forms()


def fault_of(data: bytes, limits: AudioLimits | None = None) -> AudioFault:
    with pytest.raises(AudioFault) as fault:
        decode(data, limits or AudioLimits())
    return fault.value


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_whole(name: str):
    audio = decode(FORMS[name], AudioLimits())
    assert audio.measures.duration_s == pytest.approx(3.0, abs=0.08)
    got, wanted = audio.at(8000), voice(3.0, 8000)[1000:13000]  # decoders may begin up to 1000 samples early or late
    shifts = [np.corrcoef(got[shift : shift + 12000], wanted)[0, 1] for shift in range(0, 2000, 2)]
    assert max(shifts) > 0.9, "other samples than were written"


CUT = ["wav", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "Vorbis", "Opus", "MP3", "m4a", "WMA", "WavPack", "AVI"]


@pytest.mark.parametrize(
    "name",
    [*CUT, "CAF of Apple Lossless", "NIST SPHERE", "Ogg FLAC", "MP3 from a pipe", "True Audio", "Flash video"],
)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_half_a_file_is_not_taken_for_a_whole_one(name: str, share: float):
    data = FORMS[name]
    assert fault_of(data[: int(share * len(data)) + 1]).reason in ("audio_truncated", "audio_unreadable")


@pytest.mark.parametrize("seconds", [1.0, 10.0])
@pytest.mark.parametrize("rate", [16000, 22050, 24000, 44100, 48000])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE", "AVERAGE"])
def test_piped_mp3_keeps_all_its_seconds(seconds: float, rate: int, mode: str):
    whole = mp3(voice(seconds, rate), rate, bitrate_mode=mode)
    assert decode(without_tag(whole), AudioLimits()).measures.duration_s == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize("size", [0, 0x7FFF0000, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFF00])
def test_a_wav_size_that_a_pipe_left_open_is_no_fact(size: int):
    wave = voice()
    data = with_data_size(encoded(np.stack([wave, wave], axis=1)), size)
    assert decode(data, AudioLimits()).measures.duration_s == 3.0
    assert len(decode(data, AudioLimits()).wave) == len(wave)


def test_an_empty_wav_with_a_chunk_behind_it_is_empty():
    data = encoded(voice()[:0])
    assert fault_of(data + b"LIST" + (4).to_bytes(4, "little") + b"INFO").reason == "audio_too_short"


@pytest.mark.parametrize("ends", [b"OggS", b"OggS\x00\x02", b"OggS" + bytes(22)])
def test_an_ogg_that_ends_in_a_page_header_is_truncated(ends: bytes):
    assert fault_of(FORMS["Opus"] + ends).reason == "audio_truncated"


NOT_AUDIO = {
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git lfs pull"),
    "HTML": (b"\n<!DOCTYPE html><html><body>404</body></html>", "failed download"),
    "macOS side file": (bytes.fromhex("00051607000200004d6163204f532058"), "AppleDouble"),
    "empty": (b"", "empty file"),
    "zeros": (bytes(100_000), "zero bytes only"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "unpack it"),
    "zip": (b"PK\x03\x04" + bytes(40), "unpack it"),
    "text": ("السلام عليكم".encode(), "text, which begins with"),
    "noise": (np.random.default_rng(0).bytes(5000), "no decoder knows"),
    "video": (video_only(), "without audio: it holds video"),
    "wav of an unknown codec": (encoded(voice())[:20] + b"\x99\x99" + encoded(voice())[22:], "convert it"),
}


@pytest.mark.parametrize("name", NOT_AUDIO)
def test_what_is_no_audio_is_named(name: str):
    data, words = NOT_AUDIO[name]
    fault = fault_of(data)
    assert fault.reason == "audio_unreadable"
    assert words in fault.detail


@pytest.mark.parametrize("name", ["m4a", "AAC (ADTS)", "WMA", "webm", "WavPack"])
def test_without_pyav_the_reject_says_what_to_do(name: str, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    fault = fault_of(FORMS[name])
    assert "pip install -e '.[av]'" in fault.detail
    assert "ffmpeg -i" in fault.detail


@pytest.mark.parametrize("right", [-0.999, -0.9, -0.75])
@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_channels_that_cancel_give_the_louder_one(right: float, offset: float):
    left = voice()
    audio = decode(encoded(np.stack([right * left, left + offset], axis=1), subtype="FLOAT"), AudioLimits())
    assert "channels_cancel" in audio.measures.warnings
    np.testing.assert_allclose(audio.wave, left + offset, atol=1e-6)


def test_a_voice_that_cancels_between_noises_is_kept():
    noise = np.random.default_rng(1).normal(0, 0.02, (2, 3 * RATE)).astype(np.float32)
    audio = decode(encoded((np.stack([voice(), -voice()]) + noise).T, subtype="FLOAT"), AudioLimits())
    assert audio.measures.warnings == ["channels_cancel", "noisy"]


@pytest.mark.parametrize("right", [1.0, 0.5, 0.0, -0.3])
def test_channels_that_do_not_cancel_are_mixed(right: float):
    left = voice()
    audio = decode(encoded(np.stack([left, right * left], axis=1), subtype="FLOAT"), AudioLimits())
    assert audio.measures.warnings == []
    np.testing.assert_allclose(audio.wave, left * (1 + right) / 2, atol=1e-6)


@pytest.mark.parametrize(("scale", "words"), [(32768, "divide them by 32768"), (2.0**31, "32-bit"), (1e30, "damaged")])
def test_integers_written_as_floats_are_refused(scale: float, words: str):
    fault = fault_of(encoded((voice() * scale).astype(np.float32), subtype="FLOAT"))
    assert fault.reason == "audio_scale"
    assert words in fault.detail


@pytest.mark.parametrize("channels", [17, 36, 200])
def test_channels_of_no_recording_are_rejected(channels: int):
    fault = fault_of(encoded(np.stack([voice(0.6)] * channels, axis=1)))
    assert fault.reason == "audio_unreadable"
    assert f"{channels} channels" in fault.detail


@pytest.mark.parametrize("form", ["FLAC of unknown length", "wav from a pipe", "MP3 from a pipe", "m4a"])
def test_ten_minutes_are_too_long_whatever_is_declared(form: str):
    wave = np.tile(voice(6.0, 8000), 100)
    data = {
        "FLAC of unknown length": lambda: flac_of_unknown_length(encoded(wave, "FLAC", rate=8000)),
        "wav from a pipe": lambda: with_data_size(encoded(wave, rate=8000), 0),
        "MP3 from a pipe": lambda: without_tag(mp3(wave, 8000)),
        "m4a": lambda: by_ffmpeg(wave, "mp4", "aac", 8000),
    }[form]()
    assert fault_of(data).reason == "audio_too_long"


JOINED = {
    "Vorbis": lambda: FORMS["Vorbis"] * 2,
    "Opus behind Vorbis": lambda: FORMS["Vorbis"] + FORMS["Opus"],
    "m4a": lambda: FORMS["m4a"] * 2,
    **{
        name: lambda name=name: FORMS[name] * 2
        for name in (
            "RF64",
            "W64",
            "AU",
            "CAF",
            "CAF of Apple Lossless",
            "NIST SPHERE",
            "True Audio",
            "AVI",
            "Flash video",
        )
    },
    "MP3 of another rate behind a tag": lambda: FORMS["MP3 with ID3v1 from a pipe"] + mp3(voice(3.0, 48000), 48000),
    "wav": lambda: FORMS["wav"] * 2,
    "a stale wav header": lambda: with_data_size(FORMS["wav"], 72000),
    "MP3 of another rate": lambda: without_tag(FORMS["MP3"]) + mp3(voice(3.0, 48000), 48000),
    "MP3 of another rate, with a count": lambda: FORMS["MP3"] + mp3(voice(3.0, 48000), 48000),
}


@pytest.mark.parametrize("name", JOINED)
def test_sound_that_no_decoder_would_read_is_a_reject(name: str):
    fault = fault_of(JOINED[name]())
    assert fault.reason == "audio_several"
    assert "ffmpeg -i" in fault.detail


APE_TAG = b"APETAGEX" + (2000).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(16 + 64)


@pytest.mark.parametrize("name", ["VOC", "PAF", "IRCAM", "SVX", "AVR", "XI", "PVF", "MPC2K"])
def test_forms_whose_length_nobody_checks_are_refused(name: str):
    """Half a file of these, or two with a header between them, would be read as if it were one."""
    fault = fault_of(encoded(voice(), name, "DPCM_16" if name == "XI" else "PCM_16"))
    assert fault.reason == "audio_unreadable"
    assert "whether it is complete; convert it" in fault.detail


@pytest.mark.parametrize("name", ["MP3", "MP3 from a pipe", "MP2"])
@pytest.mark.parametrize("side_file", ["._", ".AppleDouble"])
def test_a_macs_side_files_in_the_working_folder_change_nothing(name: str, side_file: str, tmp_path, monkeypatch):
    """libsndfile looks there before it takes bytes without a name for MPEG audio: no MP3 was readable on a netatalk share."""
    expected = decode(FORMS[name], AudioLimits()).wave
    (tmp_path / side_file).touch() if side_file == "._" else (tmp_path / side_file).mkdir()
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(decode(FORMS[name], AudioLimits()).wave, expected)


@pytest.mark.parametrize("tail", [b"TAG" + bytes(125), APE_TAG, APE_TAG + b"TAG" + bytes(125)])
def test_tags_between_joined_mp3s_hide_none_of_them(tail: bytes):
    one = FORMS["MP3 from a pipe"] + tail
    assert decode(one, AudioLimits()).measures.duration_s == pytest.approx(3.0, abs=0.1)
    assert decode(one * 2, AudioLimits()).measures.duration_s == pytest.approx(6.0, abs=0.15)


@pytest.mark.parametrize("second", ["MP3", "MP3 from a pipe", "MP3 with ID3 from a pipe"])
@pytest.mark.parametrize("first", ["MP3", "MP3 from a pipe"])
def test_joined_mp3s_of_one_kind_are_read_whole(first: str, second: str):
    assert decode(FORMS[first] + FORMS[second], AudioLimits()).measures.duration_s == pytest.approx(6.0, abs=0.15)


@pytest.mark.parametrize(
    "tail", [b"", bytes(9000), b"LIST\x04\0\0\0INFO", b"TAG" + bytes(125), b"ID3" + bytes(6000), b"x" * 3000]
)
def test_what_stands_behind_a_wav_is_often_nobodys_sound(tail: bytes):
    assert decode(FORMS["wav"] + tail, AudioLimits()).measures.duration_s == 3.0


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_which_of_two_tracks_is_meant_is_not_guessed(container: str):
    fault = fault_of(two_tracks(container))
    assert fault.reason == "audio_several"
    assert "2 audio tracks" in fault.detail


MARKED = b"Speex   \n"  # at byte 28: what makes a file an Ogg Speex at first sight
LISTS = {
    "concat": b"ffconcat version 1.0\n#xxxxxx" + MARKED + b"file inside.wav\n",
    "SDP": b"v=0\ns=xxxxxxxxxxxxxxxxxxxxxx" + MARKED + b"c=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_under_a_mark_of_audio_opens_nothing(name: str, tmp_path, monkeypatch):
    """FFmpeg, left to guess the form, reads the named file, or waits twenty seconds for a stranger's network packets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside.wav").write_bytes(FORMS["wav"])
    fault = fault_of(LISTS[name])
    assert fault.reason == "audio_unreadable"
    assert "timed out" not in fault.detail


def test_a_tag_before_a_wav_does_not_hide_that_it_is_cut():
    tag = b"ID3\x03\x00\x00\x00\x00\x00\x0a" + bytes(10)
    assert decode(tag + FORMS["wav"], AudioLimits()).measures.duration_s == 3.0
    assert fault_of(tag + FORMS["wav"][:-40_000]).reason == "audio_truncated"


def test_noise_between_mpeg_frames_is_not_searched_for_ever():
    fault = fault_of(FORMS["MP3 from a pipe"] + b"\xff" * (mpeg_frames.MAX_JUNK + 5000))
    assert fault.reason == "audio_unreadable"
    assert "are no sound" in fault.detail


# What an index or a field of our own parsers would raise; `read_samples` turns whatever is raised into a reject.
OWN_MISTAKE = re.compile(r"(Index|Key|Type|Attribute|Overflow|Assertion|Recursion|UnboundLocal)Error|struct.error")


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """One of seven kinds of damage: cut, header bytes, bytes anywhere, a hole, something put in, a length field, a tail."""
    changed = bytearray(data)
    place = int(random.integers(len(data)))
    kind = random.integers(7)
    if kind == 0:
        del changed[place:]
    elif kind == 1:
        for _ in range(random.integers(1, 20)):
            changed[random.integers(min(len(data), 200))] = random.integers(256)
    elif kind == 2:
        for _ in range(random.integers(1, 200)):
            changed[random.integers(len(data))] = random.integers(256)
    elif kind == 3:
        del changed[place : place + int(random.integers(1, 2000))]
    elif kind == 4:
        changed[place:place] = random.bytes(int(random.integers(1, 2000)))
    elif kind == 5:
        place = place % 400
        changed[place : place + 4] = (b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x24\x00\x00\x00")[
            random.integers(4)
        ]
    else:
        changed += (b"OggS", b"TAG" + bytes(125), bytes(1000), random.bytes(500))[random.integers(4)]
    return bytes(changed)


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_rejected(count: int):
    random = np.random.default_rng(count)
    forms = list(sound_forms(1.0).values())
    reasons, details = set(), []
    num_read = 0
    for number in range(count):
        try:
            audio = decode(mutated(forms[number % len(forms)], random), AudioLimits())
        except AudioFault as fault:
            reasons.add(fault.reason)
            details.append(fault.detail)
        else:
            num_read += 1
            assert np.isfinite(audio.wave).all()
            assert 0.5 <= audio.measures.duration_s <= 30.0
    assert {"audio_unreadable", "audio_truncated"} <= reasons
    assert [detail for detail in details if OWN_MISTAKE.search(detail)] == []
    assert 0.3 < num_read / count < 0.6, "damage that no decoder notices, and damage that ends a file, are both there"
