"""Edge silence and loudness: off they change nothing, on they do what they say, record it and belong to the job's identity."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile

from preprocess.audio import AudioFile, AudioLimits, decode
from preprocess.cache import recipe_digest
from preprocess.config import PreprocessConfig, deciding_keys
from preprocess.reasons import AudioFault
from preprocess.segment import Segment
from preprocess.sound_edits import AudioSection, as_encoded, edited, segment_of
from shards.config import read_config
from shards.errors import ConfigError
from shards.manifest import Fingerprints
from shards.sample import AudioFacts

RATE = 24000
LIMITS = AudioLimits()


def clip(before_s: float = 2.0, behind_s: float = 1.5, level: float = 0.05, said_s: float = 3.0) -> AudioFile:
    time = np.arange(round(said_s * RATE)) / RATE
    voice = level * np.sin(2 * np.pi * 150 * time) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time))
    wave = np.concatenate([np.zeros(round(before_s * RATE)), voice, np.zeros(round(behind_s * RATE))])
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="WAV", subtype="FLOAT")
    return decode(buffer.getvalue(), LIMITS)


def test_off_changes_nothing():
    audio = clip()
    assert edited(audio, AudioSection(), LIMITS) is audio


def test_edge_silence_is_cut_and_the_cut_recorded():
    audio = clip()
    assert {"leading_silence", "trailing_silence"} <= set(audio.measures.warnings)
    short = edited(audio, AudioSection(max_edge_silence_s=0.3), LIMITS)
    assert short.measures.duration_s == pytest.approx(3.6, abs=0.01)
    assert short.measures.cut_start_s == pytest.approx(1.7, abs=0.01)
    assert short.measures.cut_end_s == pytest.approx(1.2, abs=0.01)
    first = round((short.measures.cut_start_s or 0) * RATE)
    np.testing.assert_array_equal(short.wave, audio.wave[first : first + len(short.wave)])
    assert not {"leading_silence", "trailing_silence"} & set(short.measures.warnings)
    assert np.abs(audio.wave[:first]).max() < 0.02 * np.abs(audio.wave).max(), "no sound was cut"


def test_less_silence_than_allowed_stays():
    audio = clip(0.2, 0.1)
    same = edited(audio, AudioSection(max_edge_silence_s=0.5), LIMITS)
    np.testing.assert_array_equal(same.wave, audio.wave)
    assert (same.measures.cut_start_s, same.measures.cut_end_s, same.measures.gain_db) == (0.0, 0.0, None)


def test_what_is_left_must_be_long_enough():
    with pytest.raises(AudioFault, match="without the silence"):
        edited(clip(said_s=0.3), AudioSection(max_edge_silence_s=0.05), LIMITS)


@pytest.mark.parametrize("level", [0.004, 0.05, 0.9])
def test_loudness_is_set_from_the_speech(level: float):
    audio = clip(level=level)
    loud = edited(audio, AudioSection(target_rms_db=-26.0), LIMITS)
    said = loud.wave[2 * RATE : 5 * RATE]
    assert 20 * np.log10(np.sqrt((said**2).mean())) == pytest.approx(-26.0, abs=1.0)
    assert loud.measures.gain_db == pytest.approx(-26.0 - audio.measures.sound.level_db, abs=0.01)
    assert loud.wave.dtype == np.float32


def test_a_gain_never_clips():
    loud = edited(clip(level=0.5), AudioSection(target_rms_db=-1.0), LIMITS)
    assert np.abs(loud.wave).max() == pytest.approx(0.99, abs=1e-3)


def test_both_belong_to_the_identity_of_a_job():
    prints = Fingerprints(codec="c", tokenizer="t", mel=None)
    off = read_config(PreprocessConfig, None)
    assert "audio" not in deciding_keys(off), "jobs of before go on"
    seen = {recipe_digest(off, prints)}
    for key in ("audio.max_edge_silence_s=0.3", "audio.target_rms_db=-23.0"):
        config = read_config(PreprocessConfig, None, [key])
        assert deciding_keys(config)["audio"] == msgspec.to_builtins(config.audio)
        seen.add(recipe_digest(config, prints))
    assert len(seen) == 3
    for wrong in ("max_edge_silence_s=inf", "max_edge_silence_s=nan", "max_edge_silence_s=-1", "target_rms_db=10"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            read_config(PreprocessConfig, None, [f"audio.{wrong}"])


def test_samples_keep_what_was_done(run_command, arabic_mini: Path, tiny_dir: Path, tmp_path: Path):
    from shards.manifest import open_dataset
    from shards.reader import SampleReader
    from tools.inspect_shards.players import recording

    options = ("--config", tiny_dir / "pipeline.toml", "--limit", 2, "--set", "preprocess.workers=1")
    on = ("--set", "audio.max_edge_silence_s=0.05", "--set", "audio.target_rms_db=-30.0")
    for name, more in (("off", ()), ("on", on)):
        result = run_command("preprocess", arabic_mini, tmp_path / name, *options, *more)
        assert result.returncode == 0, result.stderr
    for name in ("off", "on"):
        _, index = open_dataset(tmp_path / name)
        for sample in SampleReader(tmp_path / name).read_all(index):
            facts = sample.facts.target
            is_known = [part is not msgspec.UNSET for part in (facts.cut_start_s, facts.cut_end_s, facts.gain_db)]
            assert is_known == [name == "on"] * 3
            # The player of the recording plays what was encoded, not the uncut file.
            whole = decode(Path(facts.path).read_bytes(), LIMITS)
            section = AudioSection(max_edge_silence_s=0.05, target_rms_db=-30.0) if name == "on" else AudioSection()
            np.testing.assert_allclose(recording(facts), edited(whole, section, LIMITS).at(24000), atol=1e-5)
            assert (len(recording(facts)) < len(whole.at(24000))) == (name == "on")
    refused = run_command("preprocess", arabic_mini, tmp_path / "off", *options, *on)
    assert refused.returncode == 1
    assert "holds another job: audio.max_edge_silence_s" in refused.stderr


def test_what_was_edited_once_is_not_edited_again():
    section = AudioSection(max_edge_silence_s=0.3, target_rms_db=-26.0)
    once = edited(clip(), section, LIMITS)
    assert edited(once, section, LIMITS) is once


def test_a_stored_segment_is_found_again_with_its_silence():
    facts = AudioFacts("x", "", 2.0, RATE, 50, offset_s=7.0, cut_start_s=0.75, cut_end_s=0.25, gain_db=6.0206)
    assert segment_of(facts) == Segment(7.0, 3.0)
    assert segment_of(AudioFacts("x", "", 2.0, RATE, 50, cut_start_s=0.5)).is_whole
    part = clip()
    again = as_encoded(part, facts)
    np.testing.assert_allclose(again.wave, 2 * part.wave[round(0.75 * RATE) : -round(0.25 * RATE)], rtol=1e-4)
