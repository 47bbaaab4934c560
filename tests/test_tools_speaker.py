"""A loaded voice speaks with the settings that it was trained with."""

from __future__ import annotations

from shards.config import read_config
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
