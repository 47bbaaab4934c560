"""A loaded voice speaks with the settings that it was trained with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import msgspec
import numpy as np
import soundfile

from preprocess.audio import decode
from preprocess.sound_edits import AudioSection, edited
from shards.config import ModelSection, read_config
from shards.manifest import digest_of, open_dataset
from shards.writer import write_json
from train.loop import RunOptions, train


def test_an_adapter_is_spoken_with_its_training_layout(short_data, short_config, tiny_dir, tmp_path):
    from tools.speaker import SpeakConfig, load_speaker

    last = train(
        short_config("train.max_steps=1", "sequence.layout=as_written"), short_data, tmp_path / "run", RunOptions()
    )
    assert last
    asked = read_config(SpeakConfig, tiny_dir / "pipeline.toml")
    assert asked.sequence.layout == "clone"
    assert load_speaker(tiny_dir / "model", last / "adapter", asked, "cpu").builder.layout == "as_written"


def test_rules_of_the_shards_reach_the_voice(short_data, short_config, tiny_dir, tmp_path, repository):
    """Through the checkpoint's config.toml to an adapter, through higgs_voice.json to a merged model."""
    from tools.checkpoints.merge import merge_checkpoint
    from tools.reference import LIMITS, read_recordings
    from tools.serve.voice_store import codec_probe
    from tools.speaker import SpeakConfig, find_codec, load_speaker

    data = shutil.copytree(short_data, tmp_path / "data")
    made = {"text": {"normalize": ["tatweel"]}, "audio": {"max_edge_silence_s": 0.2, "target_rms_db": -30.0}}
    dataset = msgspec.structs.replace(open_dataset(data)[0], config=made)
    write_json(data / "dataset.json", msgspec.structs.replace(dataset, digest=digest_of(dataset)))
    last = train(short_config("train.max_steps=1"), data, tmp_path / "run", RunOptions())
    assert last
    asked = read_config(SpeakConfig, tiny_dir / "pipeline.toml", ['text.normalize=["digits"]'])
    merge_checkpoint(tmp_path / "run", tmp_path / "merged")
    asked = msgspec.structs.replace(asked, audio=AudioSection(target_rms_db=-6.0))  # a pipeline.toml of today
    clip = repository / "tests" / "data" / "arabic-mini" / "spk_00_04.flac"
    wave, rate = soundfile.read(clip)
    soundfile.write(tmp_path / "late.wav", np.concatenate([np.zeros(2 * rate), wave, np.zeros(rate)]), rate)
    for model, adapter in ((tiny_dir / "model", last / "adapter"), (tmp_path / "merged", None)):
        speaker = load_speaker(model, adapter, asked, "cpu")
        assert speaker.rules.normalize == ["tatweel"]
        assert msgspec.to_builtins(speaker.edits) == made["audio"]
        reference = speaker.reference(read_recordings(tmp_path / "late.wav"), None)
        as_stage_one = edited(decode((tmp_path / "late.wav").read_bytes(), LIMITS), speaker.edits, LIMITS)
        assert as_stage_one.measures.cut_start_s
        assert as_stage_one.measures.gain_db
        np.testing.assert_array_equal(reference.codes, speaker.codec.encode(as_stage_one.at(rate)))
    # Codes that a server keeps are those of one codec and of one way of editing.
    assert codec_probe(speaker) != codec_probe(dataclasses.replace(speaker, edits=AudioSection()))
    unset = msgspec.structs.replace(asked, model=ModelSection())
    assert find_codec(tmp_path / "merged", unset) == tiny_dir / "codec", "where none is named, the one of its training"


def test_shards_that_do_not_say_leave_the_rules_to_the_file(short_data, short_config, tiny_dir, tmp_path):
    from tools.speaker import SpeakConfig, load_speaker

    last = train(short_config("train.max_steps=1"), short_data, tmp_path / "run", RunOptions())
    assert last
    own = ['text.normalize=["digits"]', "audio.target_rms_db=-20.0"]
    asked = read_config(SpeakConfig, tiny_dir / "pipeline.toml", own)
    speaker = load_speaker(tiny_dir / "model", last / "adapter", asked, "cpu")
    assert speaker.rules.normalize == ["digits"]
    assert speaker.edits.target_rms_db == -20.0


def test_what_a_merged_model_remembers_is_found_from_home(short_data, short_config, tiny_dir, tmp_path, monkeypatch):
    """Through ~ too; and an adapter trained on it, named through a link, brings settings of its own."""
    from tools.checkpoints.merge import merge_checkpoint
    from tools.speaker import SpeakConfig, load_speaker

    layout = "sequence.layout=as_written"
    assert train(short_config("train.max_steps=1", layout), short_data, tmp_path / "run", RunOptions())
    merge_checkpoint(tmp_path / "run", tmp_path / "merged")
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = read_config(SpeakConfig, tiny_dir / "pipeline.toml")
    assert load_speaker(Path("~/merged"), None, asked, "cpu").builder.layout == "as_written"

    again = short_config("train.max_steps=1", f"model.base={tmp_path / 'merged'}", "sequence.layout=clone")
    last = train(again, short_data, tmp_path / "second", RunOptions(skip_preflight=True))  # two steps are no training
    assert last
    (tmp_path / "link").symlink_to(last / "adapter")
    assert load_speaker(tmp_path / "merged", tmp_path / "link", asked, "cpu").builder.layout == "clone"
