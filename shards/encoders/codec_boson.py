"""The codec where transformers has no class for it: put together from boson-multimodal's building blocks.

In: a codec's config in the native form. Out: a module with the native class's `encode` and `decode`, and boson's tensor
names with weight_norm already folded. boson's own HiggsAudioTokenizer is not used: it fixes the released sizes, fetches
HuBERT from the hub and ignores tensors that do not fit. The price is that the order of operations stands here once more.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel

from shards.sequence import SAMPLE_RATE

SEMANTIC_RATE = 16000  # what HuBERT reads
SEMANTIC_HOP = 320  # samples at 16 kHz per HuBERT frame: 50 frames a second
SEMANTIC_PAD = 160  # samples on each side: 50 frames a second exactly, not one less
SEMANTIC_BLOCKS = ("channel_ratios", "strides", "kernel_size", "block_dilations", "unit_kernel_size")


class BosonCodec(nn.Module):
    """n waves, S samples at 24 kHz (a multiple of 960), T = S / 960 frames, K codebooks."""

    def __init__(self, config: dict[str, Any]) -> None:
        from boson_multimodal.audio_processing import semantic_module
        from boson_multimodal.audio_processing.descriptaudiocodec.dac.model import dac
        from boson_multimodal.audio_processing.quantization.vq import ResidualVectorQuantizer

        super().__init__()
        acoustic = config["acoustic_model_config"]
        hubert = HubertConfig(**config["semantic_model_config"])
        ratios, width = acoustic["downsampling_ratios"], acoustic["hidden_size"]
        hop = math.prod(ratios)
        self.sample_rate: int = config.get("sample_rate", SAMPLE_RATE)
        self.semantic_stride = hop * SEMANTIC_RATE // (self.sample_rate * SEMANTIC_HOP)
        # A codebook of 1024 entries says 10 bit per frame; the largest bandwidth (kbit/s) says how many there are.
        bits_per_second = math.ceil(self.sample_rate / hop) * math.ceil(math.log2(config["codebook_size"]))
        num_codebooks = int(1000 * config["target_bandwidths"][-1] // bits_per_second)
        joint = width + hubert.hidden_size
        blocks = {key: config[key] for key in SEMANTIC_BLOCKS if key in config}

        with warnings.catch_warnings():  # torch's news for boson's authors, not for whoever runs this
            warnings.filterwarnings("ignore", message=".*weight_norm.* is deprecated", category=FutureWarning)
            self.encoder = dac.Encoder(acoustic["encoder_hidden_size"], ratios, width)
            self.decoder_2 = dac.Decoder(width, acoustic["decoder_hidden_size"], acoustic["upsampling_ratios"])
        self.semantic_model = HubertModel(hubert)
        self.encoder_semantic = semantic_module.Encoder(hubert.hidden_size, hubert.hidden_size, **blocks)
        self.decoder_semantic = semantic_module.Decoder(
            hubert.hidden_size, hubert.hidden_size, hubert.hidden_size, **blocks
        )
        self.quantizer = ResidualVectorQuantizer(
            dimension=joint, codebook_dim=config["codebook_dim"], n_q=num_codebooks, bins=config["codebook_size"]
        )
        self.fc_prior = nn.Linear(joint, joint)
        self.fc_post1 = nn.Linear(joint, hubert.hidden_size)
        self.fc_post2 = nn.Linear(joint, width)
        for module in list(self.modules()):
            if hasattr(module, "weight_g"):
                nn.utils.remove_weight_norm(module)

    def encode(self, waves: Tensor, return_dict: bool = False) -> Tensor:
        """waves [n, 1, S] float32 -> codes [n, K, T] int64."""
        assert not return_dict, "this implementation gives tensors only"
        semantic = self.encoder_semantic(self._extract_semantic_features(waves).transpose(1, 2))
        joint = torch.cat([self.encoder(waves), semantic], dim=1)
        joint = self.fc_prior(joint.transpose(1, 2)).transpose(1, 2)
        return self.quantizer.vq.encode(joint).transpose(0, 1)

    def decode(self, codes: Tensor, return_dict: bool = False) -> Tensor:
        """codes [n, K, T] int64 -> waves [n, 1, S] float32."""
        assert not return_dict, "this implementation gives tensors only"
        joint = self.quantizer.vq.decode(codes.transpose(0, 1))
        return self.decoder_2(self.fc_post2(joint.transpose(1, 2)).transpose(1, 2))

    @property
    def acoustic_encoder(self) -> nn.Module:
        """The native class's name for it: `bench preprocess` times the parts of either implementation."""
        return self.encoder

    def _extract_semantic_features(self, waves: Tensor) -> Tensor:
        """waves [n, 1, S] -> mean over HuBERT's layers, every second frame [n, T, d]."""
        semantic_waves = torchaudio.functional.resample(waves[:, 0], self.sample_rate, SEMANTIC_RATE)
        semantic_waves = F.pad(semantic_waves, (SEMANTIC_PAD, SEMANTIC_PAD))
        layers = self.semantic_model(semantic_waves, output_hidden_states=True).hidden_states
        return torch.stack(layers, dim=1).mean(dim=1)[:, :: self.semantic_stride]
