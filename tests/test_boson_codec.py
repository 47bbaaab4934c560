"""boson's own tokenizer class as the oracle of our codec: equal weights give equal codes.

Two environments take part, because boson-multimodal needs transformers 4.46 and the native class 5.3: `make
boson-oracle` lets the native one write a codec in boson's layout, a wave and our codes into out/boson-oracle, and then
runs this file in the other. Without these files, or without boson-multimodal, there is nothing to compare.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

ORACLE = Path(__file__).parent.parent / "out" / "boson-oracle"

pytest.importorskip("boson_multimodal", reason="the boson environment: make boson-oracle")


@pytest.fixture(scope="module")
def codec():
    """boson's HiggsAudioTokenizer with our weights; its HuBERT is built here because the hub is out of reach."""
    import json

    import torch
    from boson_multimodal.audio_processing import higgs_audio_tokenizer
    from transformers import HubertConfig, HubertModel

    class OfflineHubert:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> HubertModel:
            return HubertModel(HubertConfig(mask_time_prob=0.0, num_hidden_layers=2))

    higgs_audio_tokenizer.AutoModel = OfflineHubert
    config = json.loads((ORACLE / "codec" / "config.json").read_text())
    config.pop("semantic_config")  # ours, for sizes boson takes from the hub's HuBERT
    model = higgs_audio_tokenizer.HiggsAudioTokenizer(**config, device="cpu")
    state = torch.load(ORACLE / "codec" / "model.pth", weights_only=True)
    model.load_state_dict(state)  # strictly: every name of ours is a name of boson's
    return model.eval()


@pytest.mark.parametrize("name", ["speech", "short", "long"])
def test_boson_gives_the_same_codes(codec, name):
    wave = np.load(ORACLE / f"{name}.wave.npy")
    assert len(wave) % 960 == 0
    expected = np.load(ORACLE / f"{name}.codes.npy")
    codes = np.asarray(codec.encode(wave, sr=24000))
    assert expected.shape == codes.shape
    assert all(len(np.unique(book)) > 10 for book in expected), "codes that do not vary would prove nothing"
    # Same torch, same weights: equal to the last code (measured 2026-11-23, torch 2.11.0 on both sides).
    assert (codes == expected).mean() == 1.0
