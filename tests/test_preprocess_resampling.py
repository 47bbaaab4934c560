"""Resampling, measured: what passes, what folds back, what an odd rate costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_preprocess_segment import encoded

from preprocess.audio import AudioFile, AudioLimits, AudioMeasures, decode
from preprocess.reasons import AudioFault
from preprocess.slicing.recording import open_recording
from shards import artifacts
from shards.errors import DataError
from tools.evaluate.waves import read_wave
from tools.reference import read_recordings

ODD_RATES = (4000, 8000, 11025, 12000, 22050, 44100, 44101, 48000, 47999, 96000, 192000, 384000)
CODE_OF_ODD_RATES = """
import resource, sys
from pathlib import Path
import numpy as np, soundfile, soxr
from preprocess.audio import AudioFile, AudioLimits, AudioMeasures, decode, read_bytes
from preprocess.slicing.recording import open_recording
from tools.evaluate.waves import read_wave
from tools.reference import joined_wave, read_recordings
place = Path(sys.argv[1])
for rate in map(int, sys.argv[2:]):
    wave = np.random.default_rng(0).normal(0, 0.1, 20 * rate).clip(-0.9, 0.9).astype(np.float32)
    soundfile.write(place / f"{rate}.wav", wave, rate, subtype="PCM_16")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for rate in map(int, sys.argv[2:]):
    path = place / f"{rate}.wav"
    audio = decode(read_bytes(str(path)), AudioLimits())  # `preprocess`, the recordings of `evaluate`, players of reports
    assert len(audio.at(24000)) == 20 * 24000 and len(audio.at(16000)) == 20 * 16000
    assert len(joined_wave(read_recordings(str(path)), 24000)) == 20 * 24000  # `speak`, and uploads to `serve`
    assert abs(len(read_wave(path)[0]) - 20 * 24000) < 2  # waves of other systems, in `evaluate`
    assert abs(sum(map(len, open_recording(path).mono_16k())) - 20 * 16000) < 2  # `preprocess slice`
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


def test_odd_rates_cost_little_memory_wherever_audio_comes_in(tmp_path: Path):
    """20 s of the highest rate are 31 MB, held a few times over; a kernel of torchaudio's for 44,101 Hz took 19.9 GB."""
    rates = ["44101", "47999", "192001", "383999"]
    command = [sys.executable, "-c", CODE_OF_ODD_RATES, str(tmp_path), *rates]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 400  # MB


@pytest.mark.parametrize("rate", [1, 10**9, 2**31 - 1])
def test_absurd_rates_are_refused_wherever_audio_comes_in(rate: int, tmp_path: Path):
    """A minute's samples at 1 Hz would be 24,000 minutes at the codec's rate: refused by the header, before any resampling."""
    path = tmp_path / "absurd.wav"
    soundfile.write(path, np.sin(np.arange(100_000) / 7) / 2, 24000, subtype="PCM_16")
    header = bytearray(path.read_bytes())
    header[24:28] = rate.to_bytes(4, "little")  # of a wav's fmt chunk
    path.write_bytes(header)
    for read in (lambda: decode(path.read_bytes(), AudioLimits()), lambda: open_recording(path)):
        with pytest.raises(AudioFault, match=f"{rate} Hz") as fault:
            read()
        assert fault.value.reason == "audio_sample_rate"
    for source in (str(path), (np.ones(1000, np.float32) / 2, rate)):
        with pytest.raises(DataError, match=f"{rate} Hz"):
            read_recordings(source)
    wave, facts = read_wave(path)
    assert len(wave) == 0
    assert f"{rate} Hz" in facts.error


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
