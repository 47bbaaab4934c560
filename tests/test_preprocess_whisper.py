"""The Whisper tower and features.whisper = "encoder": equal to Whisper where it must be, masked where Higgs Audio masks."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from preprocess.features import WhisperEncoder, stored_mel
from shards.encoders.whisper_tower import load_whisper_tower, tower_features
from shards.errors import CheckpointError
from shards.manifest import open_dataset
from shards.mel import num_rows, rebuild_mel
from shards.reader import SampleReader


def wave_of(num_samples: int) -> np.ndarray:
    return (np.random.default_rng(num_samples).standard_normal(num_samples) * 0.1).astype(np.float32)


def test_a_full_window_equals_whisper_before_the_averaging(whisper):
    """30 s have no padding, so the only differences left are the averaging and where the last norm stands."""
    from transformers import WhisperModel

    reference = WhisperModel.from_pretrained(whisper).encoder.eval()
    frames, floor = stored_mel(wave_of(480000))
    features = torch.from_numpy(rebuild_mel(frames, floor, 480000)[0])
    features_30s = torch.from_numpy(tower_features(features.numpy(), 480000))
    tower = load_whisper_tower(whisper)
    with torch.no_grad():
        setattr(reference, "layer_norm", torch.nn.Identity())  # noqa: B010 - typed as a LayerNorm
        states = reference(features[None]).last_hidden_state
        pooled = F.avg_pool1d(states.transpose(1, 2), 2).transpose(1, 2)
        expected = tower.layer_norm(pooled)[0]
        ours = tower(features_30s[None])[0]
    assert ours.shape == (750, 32)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("num_samples", [6400, 16000, 80001, 333333])
def test_short_clips_equal_the_masked_30_s_computation(whisper, num_samples):
    """What Higgs Audio does: all 1500 positions, padding masked as keys. Ours computes the clip's own positions only."""
    from transformers import WhisperModel

    frames, floor = stored_mel(wave_of(num_samples))
    features, mask = rebuild_mel(frames, floor, num_samples)
    tower = load_whisper_tower(whisper)
    reference = WhisperModel.from_pretrained(whisper, attn_implementation="eager").encoder.eval()
    positions = (int(mask.sum()) - 1) // 2 + 1
    hidden_keys = torch.zeros(1, 1, 1500, 1500)
    hidden_keys[..., positions:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        x = F.gelu(reference.conv2(F.gelu(reference.conv1(torch.from_numpy(features)[None])))).transpose(1, 2)
        x = x + reference.embed_positions.weight
        for layer in reference.layers:
            # transformers 4 asks for a mask of heads by name, 5 no longer has it
            takes_heads = "layer_head_mask" in inspect.signature(layer.forward).parameters
            out = layer(x, hidden_keys, **({"layer_head_mask": None} if takes_heads else {}))
            x = out[0] if isinstance(out, tuple) else out
        pooled = F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)
        expected = tower.layer_norm(pooled)[0, : num_rows(num_samples)]
        ours = tower(torch.from_numpy(tower_features(features, num_samples))[None])[0, : num_rows(num_samples)]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("seconds", "rows"), [(0.4, 10), (1.0, 25), (5.0, 125), (30.0, 750)])
def test_row_counts_are_the_released_ones(seconds, rows):
    assert num_rows(int(seconds * 16000)) == rows


def test_a_checkpoint_that_does_not_fit_is_refused(whisper, tmp_path):
    import json
    import shutil

    with pytest.raises(CheckpointError, match="as the config of a Whisper checkpoint"):
        load_whisper_tower(tmp_path)
    other = shutil.copytree(whisper, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "encoder_layers": 4}))
    with pytest.raises(CheckpointError, match=r"missing layers\.3\."):
        load_whisper_tower(other)
    (other / "config.json").write_text(json.dumps({**config, "num_mel_bins": 80}))
    with pytest.raises(CheckpointError, match="80 mels, Higgs Audio needs 128"):
        load_whisper_tower(other)


def test_stage_one_stores_encoder_states(run_command, arabic_mini, tiny_dir, whisper, tmp_path, repository):
    options = ("--limit", 3, "--config", tiny_dir / "pipeline.toml", "--set", "features.whisper=encoder")
    result = run_command(
        "preprocess", arabic_mini, tmp_path / "out", *options, "--set", f"features.whisper_model={whisper}"
    )
    assert result.returncode == 0, result.stderr
    dataset, index = open_dataset(tmp_path / "out")
    assert dataset.fingerprints.whisper
    encoder = WhisperEncoder(whisper, "cpu")
    from preprocess.audio import AudioLimits, decode

    for sample in SampleReader(tmp_path / "out").read_all(index):
        assert sample.reference_mel() is None
        assert sample.facts.mel
        wave = decode((repository / sample.facts.reference.path).read_bytes(), AudioLimits()).at(16000)
        expected = encoder.encode(*stored_mel(wave), len(wave))
        np.testing.assert_array_equal(sample.reference_whisper(), expected)
        assert expected.shape == (num_rows(sample.facts.mel.num_samples), 32)
    shown = run_command("inspect-shards", "show", tmp_path / "out", "000000000000")
    assert "Whisper states: float16[" in shown.stdout
