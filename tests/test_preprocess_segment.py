"""Segments: exactly the samples that a row names, each encoded once, and nothing that the file does not have."""

from __future__ import annotations

import io
import itertools

import msgspec
import numpy as np
import pytest
import soundfile

from preprocess.audio import AudioLimits, decode
from preprocess.reasons import AudioFault
from preprocess.segment import WHOLE, Segment
from preprocess.sources import find_pair
from shards.sample import ChatRow

RATE = 22050


def noise(seconds: float = 4.0) -> np.ndarray:
    wave = np.random.default_rng(5).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
    return np.clip(wave, -0.9, 0.9)


def encoded(wave: np.ndarray, form: str = "WAV", subtype: str = "PCM_16", rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, subtype=subtype)
    return buffer.getvalue()


FORMS = {
    "wav": ("WAV", "PCM_16"),
    "float wav": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "vorbis": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("segment", [Segment(1.2345, 0.7), Segment(0.0, 2.0), Segment(2.5), Segment(0.3331, 3.0)])
def test_a_segment_is_the_same_samples_of_the_whole(form: str, segment: Segment):
    data = encoded(noise(), *FORMS[form])
    whole = decode(data, AudioLimits()).wave
    part = decode(data, AudioLimits(), segment)
    end = len(whole) if segment.duration_s is None else round((segment.offset_s + segment.duration_s) * RATE)
    np.testing.assert_array_equal(part.wave, whole[round(segment.offset_s * RATE) : end])
    assert part.measures.duration_s == pytest.approx(len(part.wave) / RATE)


def test_touching_segments_share_no_sample_and_leave_none():
    data = encoded(noise(), "FLAC")
    cuts = [0.1 * n for n in range(41)]
    limits = AudioLimits(min_duration_s=0.05)
    parts = [decode(data, limits, Segment(a, b - a)).wave for a, b in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), decode(data, limits).wave)


@pytest.mark.parametrize("form", ["WAV", "MP3", "OGG"])
@pytest.mark.parametrize(
    "segment",
    [
        *(
            Segment(5.0),
            Segment(5.0, 1.0),
            Segment(3.0, 1.5),
            Segment(-1.0, 2.0),
            Segment(0.0, 0.0),
            Segment(1.0, -1.0),
        ),
        *(Segment(float("nan"), 1.0), Segment(float("inf")), Segment(1.0, float("inf")), Segment(1e300, 1e300)),
    ],
    ids=str,
)
def test_a_segment_outside_the_file_is_a_reject(form: str, segment: Segment):
    subtype = {"WAV": "PCM_16", "MP3": "MPEG_LAYER_III", "OGG": "VORBIS"}[form]
    with pytest.raises(AudioFault) as fault:
        decode(encoded(noise(), form, subtype), AudioLimits(), segment)
    assert fault.value.reason == "audio_segment"


def test_an_end_off_by_rounding_is_the_end():
    wave = noise(4.0)[: 4 * RATE - 40]  # 3.99819 s; a list of centiseconds says 4.00
    assert len(decode(encoded(wave), AudioLimits(), Segment(1.0, 3.0)).wave) == len(wave) - RATE


@pytest.mark.parametrize("form", ["WAV", "MP3", "FLAC"])
def test_a_segment_of_an_hour_long_file_is_read(form: str):
    quiet = np.zeros(3600 * 8000, np.float32)
    quiet[3000 * 8000 : 3002 * 8000] = np.sin(np.arange(16000) / 3) / 2
    subtype = "MPEG_LAYER_III" if form == "MP3" else "PCM_16"
    data = encoded(quiet, form, subtype, rate=8000)
    part = decode(data, AudioLimits(), Segment(3000.0, 2.0))
    assert len(part.wave) == 16000
    assert np.abs(part.wave).max() > 0.4
    with pytest.raises(AudioFault) as fault:
        decode(data, AudioLimits(), Segment(2900.0, 200.0))
    assert fault.value.reason == "audio_too_long"


def test_features_are_kept_by_file_and_segment():
    keys = {part.key("a" * 64) for part in (WHOLE, Segment(1.0), Segment(0.0, 1.0), Segment(1.0, 1.0))}
    assert len(keys) == 4
    assert WHOLE.key("a" * 64) == "a" * 64
    assert Segment(1.0).key("a" * 64) != Segment(1.0).key("b" * 64)


def test_reference_and_target_may_be_parts_of_one_file():
    assert WHOLE.shares_with(Segment(3.0, 1.0))
    assert Segment(0.0, 2.0).shares_with(Segment(1.5))
    assert not Segment(0.0, 2.0).shares_with(Segment(2.0, 2.0))
    assert not Segment(2.0).shares_with(Segment(0.0, 2.05))


def test_offset_and_duration_of_a_row_reach_its_pair():
    def audio(**part: float) -> dict:
        return {"type": "audio", "audio_url": "long.wav", **part}

    turns = [
        {"role": "user", "content": [{"type": "text", "text": "صباح الخير"}, audio(offset=1)]},
        {"role": "assistant", "content": [{"type": "text", "text": "مساء الخير"}, audio(offset=3, duration=2.5)]},
    ]
    pair = find_pair(msgspec.convert({"messages": turns}, ChatRow))
    assert (pair.reference_segment, pair.target_segment) == (Segment(1.0), Segment(3.0, 2.5))


@pytest.mark.parametrize("segment", [Segment(1e308), Segment(0.0, 1e308), Segment(1e300, 1.0)])
def test_seconds_beyond_all_recordings_are_named(segment: Segment):
    with pytest.raises(AudioFault, match=r"expected .*1e\+09") as fault:
        decode(encoded(noise()), AudioLimits(), segment)
    assert fault.value.reason == "audio_segment"


def test_a_segment_too_long_is_rejected_by_its_own_length():
    with pytest.raises(AudioFault, match=r"^40\.000 s, at most 30 s"):
        decode(encoded(np.tile(noise(3.0), 30)), AudioLimits(), Segment(10.0, 40.0))


@pytest.mark.parametrize("key", ["start", "end", "start_time", "endTime", "Offset", "DURATION", "start-sec"])
def test_a_part_named_in_other_words_is_no_whole_file(key):
    """The whole file beside the text of a part would be trained on; words of other kinds are no part."""
    from preprocess.audio_url import part_in_other_words

    def row(value: object) -> dict[str, object]:
        return {"messages": [{"role": "user", "content": [{"type": "audio", "audio_url": "a.wav", key: value}]}]}

    for value in (1.5, 0, 3):
        fault = part_in_other_words(row(value))
        assert fault
        assert "offset and duration" in fault
    for value in (None, "0:03", True):
        assert part_in_other_words(row(value)) is None
    assert (
        part_in_other_words(
            {"messages": [{"content": [{"audio_url": "a.wav", "offset": 1.0, "duration": 2, "end_note": 1}]}]}
        )
        is None
    )


def test_a_row_with_a_part_in_other_words_is_a_reject(tmp_path):
    from preprocess.sources import read_rows
    from shards.writer import Reject

    path = tmp_path / "list.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": [{"type": "audio", "audio_url": "a.wav", "start": 1.0}]}]}\n'
    )
    [found] = read_rows(path)
    assert isinstance(found, Reject)
    assert (found.reason, found.row) == ("audio_segment", 0)
