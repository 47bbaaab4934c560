"""The codec in the boson environment: the same codes and the same waves as the native class gives.

Two environments take part, because boson-multimodal needs transformers 4.46 and the native class 5.3: `make test-boson`
lets the native one write codecs, waves and its answers into out/boson-oracle, and then runs this file in the other.
Three implementations are compared: transformers' class (the answers), boson's own tokenizer class, and ours from boson's
blocks. Same torch, same weights: codes and decoded waves are equal to the last bit (measured 2026-11-23, torch 2.11.0
on both sides); where weights went through weight_norm pairs, decoded waves differ by rounding.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from boson_layout import boson_state
from boson_oracle import BOSON_CONFIG, WAVES

from shards.encoders.codec import Codec, load_codec

ORACLE = Path(__file__).parent.parent / "out" / "boson-oracle"

pytest.importorskip("boson_multimodal", reason="the boson environment: make test-boson")


@pytest.fixture(scope="module")
def oracle() -> Path:
    if not (ORACLE / "codec.long.decoded.npy").is_file():
        pytest.skip("out/boson-oracle is written by the native environment: make test-boson")
    return ORACLE


@pytest.fixture(scope="module")
def theirs(oracle: Path):
    """boson's HiggsAudioTokenizer with our weights; its HuBERT is built here because the hub is out of reach."""
    from boson_multimodal.audio_processing import higgs_audio_tokenizer
    from transformers import HubertConfig, HubertModel

    class OfflineHubert:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> HubertModel:
            return HubertModel(HubertConfig(mask_time_prob=0.0, num_hidden_layers=2))

    higgs_audio_tokenizer.AutoModel = OfflineHubert
    config = {key: value for key, value in BOSON_CONFIG.items() if key != "semantic_config"}
    model = higgs_audio_tokenizer.HiggsAudioTokenizer(**config, device="cpu")
    state = torch.load(oracle / "codec" / "model.pth", weights_only=True)
    model.load_state_dict(state)  # strictly: every name of ours is a name of boson's
    return model.eval()


@pytest.fixture(scope="module")
def ours(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Codec]:
    """By layout: the large codec is kept in boson's, `tiny`'s in both."""
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("tiny-boson")
    native = json.loads((oracle / "tiny" / "codec" / "config.json").read_text())
    acoustic = native["acoustic_model_config"]
    config = {
        **BOSON_CONFIG,
        "D": acoustic["hidden_size"],
        "encoder_hidden_size": acoustic["encoder_hidden_size"],
        "decoder_hidden_size": acoustic["decoder_hidden_size"],
        "semantic_config": native["semantic_model_config"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(boson_state(load_file(oracle / "tiny" / "codec" / "model.safetensors")), folder / "model.pth")
    return {
        "codec, boson": load_codec(oracle / "codec"),
        "tiny, native": load_codec(oracle / "tiny" / "codec"),
        "tiny, boson": load_codec(folder),
    }


@pytest.mark.parametrize("name", WAVES)
@pytest.mark.parametrize("which", ["codec, boson", "tiny, native", "tiny, boson"])
def test_our_codec_of_bosons_blocks_equals_the_native_class(oracle, ours, which, name):
    codec = ours[which]
    assert type(codec._model).__name__ == "BosonCodec"
    wave = np.load(oracle / f"{name}.wave.npy")
    prefix = which.split(",")[0]
    expected = np.load(oracle / f"{prefix}.{name}.npy")
    assert expected.shape == (8, len(wave) // 960)
    assert all(len(np.unique(book)) > 10 for book in expected), "codes that do not vary would prove nothing"
    np.testing.assert_array_equal(codec.encode(wave), expected)
    # tiny's weights went through boson's pairs and came back as v * g / |v|: rounded, 2e-6 of decoded sound.
    tolerance = 1e-5 if which == "tiny, boson" else 0
    decoded = np.load(oracle / f"{prefix}.{name}.decoded.npy")
    np.testing.assert_allclose(codec.decode(expected), decoded, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", WAVES)
def test_bosons_own_class_gives_the_same_codes(oracle, theirs, name):
    wave = np.load(oracle / f"{name}.wave.npy")
    expected = np.load(oracle / f"codec.{name}.npy")
    np.testing.assert_array_equal(np.asarray(theirs.encode(wave, sr=24000)), expected)
    with torch.inference_mode():
        decoded = theirs.decode(torch.from_numpy(expected.astype(np.int64))[None])[0, 0]
    # Its weight_norm pairs are multiplied out in every call instead of once: rounding, nothing else.
    np.testing.assert_allclose(decoded, np.load(oracle / f"codec.{name}.decoded.npy"), rtol=0, atol=1e-5)


def test_tiny_writes_the_same_bytes_in_both_environments(oracle, tiny_dir):
    written = sorted(path.relative_to(oracle / "tiny") for path in (oracle / "tiny").rglob("*") if path.is_file())
    assert len(written) == 8
    for path in written:
        if path.name != "pipeline.toml":  # it names its own folder
            assert (oracle / "tiny" / path).read_bytes() == (tiny_dir / path).read_bytes(), path
