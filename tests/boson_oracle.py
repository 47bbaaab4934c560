"""Writes what boson's tokenizer class is compared with: a codec in boson's layout, waves, and our codes of them.

Run in the native environment by `make boson-oracle`. boson fixes the acoustic model's sizes and HuBERT's width, so those are
the released ones; HuBERT has two layers, and all weights are random, calibrated as `tiny`'s are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from boson_layout import boson_state

from preprocess.audio import AudioLimits, decode
from preprocess.codec import Codec
from tools.tiny_codec import _calibrate, speech_like

RATIOS = [8, 5, 4, 2, 3]
SPEECH = Path(__file__).parent / "data" / "arabic-mini" / "spk_03_06.flac"


def main(out: Path) -> None:
    from transformers import DacConfig, HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel, HubertConfig

    acoustic = DacConfig(
        encoder_hidden_size=64,
        decoder_hidden_size=1024,
        hidden_size=256,  # pyright: ignore[reportCallIssue] - declared at run time
        downsampling_ratios=RATIOS,
        upsampling_ratios=RATIOS,  # pyright: ignore[reportCallIssue]
    )
    config = HiggsAudioV2TokenizerConfig(
        target_bandwidths=[0.5, 1, 1.5, 2],
        acoustic_model_config=acoustic,
        semantic_model_config=HubertConfig(mask_time_prob=0.0, num_hidden_layers=2),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        model = HiggsAudioV2TokenizerModel(config).eval()
        generator = torch.Generator().manual_seed(0)
        _calibrate(model, speech_like(generator), generator)
    (out / "codec").mkdir(parents=True, exist_ok=True)
    torch.save(boson_state(model.state_dict()), out / "codec" / "model.pth")
    boson = {
        "n_filters": 32,
        "D": 256,
        "codebook_dim": 64,
        "target_bandwidths": [0.5, 1, 1.5, 2, 4],
        "ratios": RATIOS,
        "sample_rate": 24000,
        "bins": 1024,
        "n_q": 8,
        "semantic_techer": "hubert_base_general",
        "semantic_config": {"num_hidden_layers": 2},
    }
    (out / "codec" / "config.json").write_text(json.dumps(boson))
    codec = Codec(model, "cpu")
    speech = decode(SPEECH.read_bytes(), AudioLimits()).wave
    for name, wave in {
        "speech": speech[: 960 * 120],
        "short": speech[24000 : 24000 + 960 * 20],
        "long": np.tile(speech, 2),
    }.items():
        whole = wave[: len(wave) // 960 * 960]
        np.save(out / f"{name}.wave.npy", whole)
        np.save(out / f"{name}.codes.npy", codec.encode(whole))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
