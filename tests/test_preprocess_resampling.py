"""Resampling, measured: what passes, what folds back, what an odd rate costs."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from test_preprocess_segment import encoded

from preprocess.audio import AudioFile, AudioLimits, AudioMeasures, decode
from preprocess.reasons import AudioFault
from shards import artifacts

ODD_RATES = (4000, 8000, 11025, 12000, 22050, 44100, 44101, 48000, 47999, 96000, 192000, 384000)
CODE_OF_ODD_RATE = """
import resource
import numpy as np
from preprocess.audio import AudioFile, AudioMeasures
wave = np.random.default_rng(0).normal(0, 0.1, 30 * {rate}).astype(np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
audio = AudioFile(wave, AudioMeasures(30.0, {rate}, 1, 0.0, 0.0, 0.0, []))
assert len(audio.at(24000)) == 30 * 24000 and len(audio.at(16000)) == 30 * 16000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def level_db(frequency: float, from_rate: int, to_rate: int) -> float:
    """Level in dB that a tone of 2 s has after resampling, whatever its frequency there; the ends do not count."""
    tone = np.sin(2 * np.pi * frequency * np.arange(2 * from_rate) / from_rate).astype(np.float32)
    wave = AudioFile(tone, AudioMeasures(2.0, from_rate, 1, 0.0, 0.0, 0.0, [])).at(to_rate)
    middle = wave[to_rate // 2 : -to_rate // 2].astype(np.float64)
    return 10 * np.log10(2 * np.mean(middle**2) + 1e-20)


@pytest.mark.parametrize("from_rate", [44100, 48000, 44101, 96000])
def test_speech_passes_and_nothing_folds_back(from_rate: int):
    assert all(abs(level_db(frequency, from_rate, 24000)) < 0.1 for frequency in range(100, 10501, 400))
    assert all(level_db(frequency, from_rate, 24000) < -80 for frequency in range(13000, 22001, 500))


@pytest.mark.parametrize("from_rate", [24000, 48000])
def test_the_band_of_whisper_passes_and_nothing_folds_back(from_rate: int):
    assert all(abs(level_db(frequency, from_rate, 16000)) < 0.1 for frequency in range(100, 7001, 300))
    assert all(level_db(frequency, from_rate, 16000) < -80 for frequency in range(8700, 12000, 300))


@pytest.mark.parametrize("rate", ODD_RATES)
@pytest.mark.parametrize("to_rate", [24000, 16000])
def test_every_rate_gives_its_exact_length_in_place(rate: int, to_rate: int):
    time_s = np.arange(round(1.2345 * rate)) / rate
    wave = np.exp(-(((time_s - 0.6) / 0.01) ** 2)).astype(np.float32)  # a bump at 0.6 s, without high tones
    audio = AudioFile(wave, AudioMeasures(1.2345, rate, 1, 0.0, 0.0, 0.0, []))
    resampled = audio.at(to_rate)
    assert resampled.dtype == np.float32
    assert len(resampled) == -(-len(wave) * to_rate // rate)
    assert np.argmax(resampled) / to_rate == pytest.approx(0.6, abs=1e-3)
    assert resampled.max() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("rate", [44101, 383999])
def test_an_odd_rate_costs_little_memory(rate: int):
    code = CODE_OF_ODD_RATE.format(rate=rate)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 100  # MB


@pytest.mark.parametrize("rate", [1000, 3999, 384001, 1_000_000])
def test_rates_of_no_recording_are_rejected(rate: int):
    with pytest.raises(AudioFault) as fault:
        decode(encoded(np.sin(np.arange(rate) / 7).astype(np.float32) / 2, rate=rate), AudioLimits())
    assert fault.value.reason == "audio_sample_rate"
    assert f"{rate} Hz" in fault.value.detail


def test_another_resampler_is_another_fingerprint(tiny_dir, monkeypatch):
    before = (artifacts.codec_fingerprint(tiny_dir / "codec"), artifacts.mel_fingerprint())
    monkeypatch.setattr(artifacts, "RESAMPLER", "another")
    after = (artifacts.codec_fingerprint(tiny_dir / "codec"), artifacts.mel_fingerprint())
    assert before[0] != after[0]
    assert before[1] != after[1]
