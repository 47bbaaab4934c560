"""Bandwidth, level and noise of a decoded file, and the columns that a data set keeps of them."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from audio_forms import encoded

from preprocess.audio import AudioLimits, decode
from preprocess.audio_quality import bandwidth, levels, measure_sound
from preprocess.join import join_columns, missing_part
from shards.columns import COLUMNS_DTYPE, columns_of, columns_row, comparable, read_columns, text_hash
from shards.errors import ShardError
from shards.reader import verify
from shards.writer import shard_path, write_shard

CLIPS = sorted((Path(__file__).parent / "data" / "arabic-mini").glob("*.flac"))[::9]


@cache
def clip(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0]


def brought_up(wave: np.ndarray, low: int, high: int, quality: str = "HQ") -> np.ndarray:
    """24 kHz -> low -> high, in 16 bits: what a file holds that was recorded at `low`."""
    return soxr.resample(soxr.resample(wave, 24000, low, quality=quality), low, high, quality=quality)


@pytest.mark.parametrize(
    ("low", "high"), [(8000, 16000), (8000, 24000), (8000, 48000), (16000, 24000), (16000, 44100), (16000, 48000)]
)
@pytest.mark.parametrize("quality", ["HQ", "LQ"])
def test_a_file_that_was_brought_up_is_found(low: int, high: int, quality: str):
    for path in CLIPS:
        measures = decode(encoded(brought_up(clip(path), low, high, quality), rate=high), AudioLimits()).measures
        assert "narrow_band" in measures.warnings, path
        assert 0.7 * low / 2 < measures.sound.bandwidth_hz <= low / 2


@pytest.mark.parametrize("rate", [16000, 24000, 44100, 48000])
@pytest.mark.parametrize("gain", [1.0, 0.1])
def test_a_file_that_fills_its_rate_is_not(rate: int, gain: float):
    for path in CLIPS:
        wave = gain * soxr.resample(clip(path), 24000, rate)
        assert "narrow_band" not in decode(encoded(wave, rate=rate), AudioLimits()).measures.warnings, path


def test_lossy_packing_at_usual_rates_is_not_narrow():
    for form, subtype, rate in (("MP3", "MPEG_LAYER_III", 24000), ("OGG", "OPUS", 48000), ("OGG", "VORBIS", 24000)):
        file = io.BytesIO()
        soundfile.write(file, soxr.resample(clip(CLIPS[0]), 24000, rate), rate, format=form, subtype=subtype)
        assert "narrow_band" not in decode(file.getvalue(), AudioLimits()).measures.warnings, form


@pytest.mark.parametrize("snr_db", [5, 10, 20, 30])
@pytest.mark.parametrize("colour", ["white", "low"])
def test_the_noise_under_speech_is_measured(snr_db: int, colour: str):
    rng = np.random.default_rng(snr_db)
    for path in CLIPS:
        wave = clip(path)
        noise = rng.normal(0, 1, len(wave))
        if colour == "low":
            noise = np.convolve(noise, np.ones(20) / np.sqrt(20), "same")
        noise *= 10 ** ((levels(wave, 24000)[0] - snr_db) / 20) / noise.std()
        level_db, noise_db = levels((wave + noise).astype(np.float32), 24000)
        assert level_db - noise_db == pytest.approx(snr_db, abs=3.5)


def test_a_noisy_file_warns_and_a_quiet_room_does_not():
    wave = clip(CLIPS[0])
    noise = np.random.default_rng(0).normal(0, 1, len(wave)) * 10 ** (levels(wave, 24000)[0] / 20)
    assert "noisy" in decode(encoded(wave + 0.5 * noise), AudioLimits()).measures.warnings
    assert "noisy" not in decode(encoded(wave + 0.03 * noise), AudioLimits()).measures.warnings


@pytest.mark.parametrize("samples", [1, 479, 1023, 1025, 30 * 24000])
@pytest.mark.parametrize("rate", [4000, 24000, 384000])
def test_any_length_and_rate_can_be_measured(samples: int, rate: int):
    wave = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    sound = measure_sound(wave, rate)
    assert np.isfinite([sound.bandwidth_hz, sound.level_db, sound.noise_db]).all()
    assert bandwidth(np.zeros(samples, np.float32), rate) == rate / 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ذَهَبَ الوَلَدُ", "ذهب الولد"),
        ("إلى المدرســة!", "الي المدرسه"),
        ("عام ١٩٩٠،", "عام 1990"),
        ("Hello  World.", "hello world"),
        ("ﻣﺮﺣﺒﺎ", "مرحبا"),
    ],
)
def test_texts_that_sound_alike_have_one_hash(one: str, other: str):
    assert text_hash(one) == text_hash(other) != text_hash(other + " ثم")
    assert comparable(one) == comparable(other)


def test_a_text_without_a_word_has_no_hash():
    assert text_hash("؟! ...") == text_hash("") == 0


def test_columns_say_what_the_sample_says(make_sample):
    facts = make_sample(3).facts
    row = columns_of([columns_row(facts)])[0]
    text = facts.texts[facts.target_text]
    assert (row["num_chars"], row["num_arabic"]) == (len(text), len(text.replace(" ", "")))
    assert row["target_s"] == pytest.approx(facts.target.duration_s)
    assert np.isnan(row["target_bandwidth_hz"])
    assert row["target_audio"] == 0  # no file is known


@pytest.fixture
def out(tmp_path: Path, make_sample):
    """Two shards with columns."""
    done = []
    for shard in range(2):
        samples = [make_sample(10 * shard + seed) for seed in range(3)]
        columns = columns_of([columns_row(sample.facts) for sample in samples])
        done.append(write_shard(tmp_path, shard, samples, [], columns))
    return tmp_path, done


def test_columns_change_no_byte_of_tar_and_index(out, tmp_path: Path, make_sample):
    folder, done = out
    bare = write_shard(tmp_path / "bare", 0, [make_sample(seed) for seed in range(3)], [])
    assert (bare.sha256, bare.index_sha256) == (done[0].sha256, done[0].index_sha256)
    assert b"columns" not in shard_path(tmp_path / "bare", 0, ".done.json").read_bytes()
    assert missing_part(folder, 0) is None


def test_lost_or_damaged_columns_are_found(out):
    folder, done = out
    assert not list(verify(folder, done[1]))
    path = shard_path(folder, 1, ".columns.npy")
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    assert "columns.npy: sha256" in next(iter(verify(folder, done[1])))
    path.unlink()
    assert "columns.npy" in next(iter(verify(folder, done[1])))
    assert "columns.npy" in str(missing_part(folder, 1))


def test_columns_are_joined_only_where_every_shard_has_them(out, make_sample):
    folder, done = out
    join_columns(folder, done)
    joined = read_columns(folder, 6)
    assert joined is not None
    assert joined.dtype == COLUMNS_DTYPE
    assert joined["num_chars"].tolist()[:3] == [len(s.facts.texts[3]) for s in (make_sample(n) for n in range(3))]
    with pytest.raises(ShardError, match=r"6 rows, the data set has 7 samples"):
        read_columns(folder, 7)
    join_columns(folder, [*done, write_shard(folder, 2, [make_sample(9)], [])])
    assert read_columns(folder, 6) is None


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04junk"])
def test_foreign_columns_are_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "columns.npy").write_bytes(content)
    with pytest.raises(ShardError, match=r"columns.npy: unreadable columns"):
        read_columns(tmp_path, 1)
    np.save(tmp_path / "columns.npy", np.zeros(1))
    with pytest.raises(ShardError, match=r"other columns"):
        read_columns(tmp_path, 1)
