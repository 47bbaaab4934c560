"""Streaming decode against the whole, on the released decoder's blocks, kernels and strides with narrow random layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shards.encoders.codec import HOP, Codec, codec_model
from shards.encoders.codec_stream import CONTEXT, FADE, CodecStream
from shards.errors import ConfigError

LARGEST_DIFFERENCE = 1e-5


@pytest.fixture(scope="module")
def codec() -> Codec:
    import torch

    config = {
        "sample_rate": 24000,
        "target_bandwidths": [0.5, 1, 1.5, 2],
        "codebook_dim": 64,
        "codebook_size": 1024,
        "acoustic_model_config": {
            "model_type": "dac",
            "encoder_hidden_size": 8,
            "decoder_hidden_size": 64,
            "hidden_size": 32,
            "downsampling_ratios": [8, 5, 4, 2, 3],
            "upsampling_ratios": [8, 5, 4, 2, 3],
        },
        "semantic_model_config": {
            "model_type": "hubert",
            "mask_time_prob": 0.0,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "conv_dim": [16] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    }
    model = codec_model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.dim() > 1:
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
    return Codec(model, "cpu")


def random_codes(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1024, (8, num_frames)).astype(np.uint16)


def pieces(stream: CodecStream, codes: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    out, start = [], 0
    for size in sizes:
        out.append(stream.feed(codes[:, start : start + size]))
        start += size
    assert start == codes.shape[1]
    return [*out, stream.finish()]


@pytest.mark.parametrize(
    "sizes",
    [[8] * 20, [1] * 40, [100], [33, 1, 65, 7], [3], [0, 5, 0], [32], [64, 64]],
    ids=lambda sizes: f"{sizes[:4]}",
)
def test_the_joined_stream_equals_the_whole_decode(codec: Codec, sizes: list[int]):
    codes = random_codes(sum(sizes))
    whole = codec.decode(codes)
    joined = np.concatenate(pieces(CodecStream(codec), codes, sizes))
    assert joined.shape == whole.shape
    assert np.abs(whole).max() > 0.05, "silence would prove nothing"
    assert np.abs(joined - whole).max() <= LARGEST_DIFFERENCE * max(1.0, np.abs(whole).max())


def test_the_decoder_reaches_no_further_than_the_context(codec: Codec):
    """Change one frame's codes: what sounds otherwise shows how far the decoder sees to each side."""
    codes = random_codes(2 * CONTEXT + 41)
    changed = codes.copy()
    middle = CONTEXT + 20
    changed[:, middle] = (changed[:, middle] + 511) % 1024
    difference = np.abs(codec.decode(codes) - codec.decode(changed)).reshape(-1, HOP).max(axis=1)
    changed = np.flatnonzero(difference > 1e-7)
    before, after = middle - changed[0], changed[-1] - middle
    print(f"the decoder reaches {before} frames ahead and {after} back")
    assert 1 <= before < CONTEXT
    assert 1 <= after < CONTEXT


def test_sound_comes_as_early_as_it_is_certain(codec: Codec):
    stream = CodecStream(codec)
    assert len(stream.feed(random_codes(CONTEXT))) == 0
    assert len(stream.feed(random_codes(8))) == 8 * HOP
    assert len(stream.finish()) == CONTEXT * HOP


@pytest.mark.parametrize("first_chunk", [2, 8, 24])
def test_an_early_start_differs_only_near_its_seam(codec: Codec, first_chunk: int):
    codes = random_codes(80)
    whole = codec.decode(codes)
    parts = pieces(CodecStream(codec, first_chunk), codes, [8] * 10)
    joined = np.concatenate(parts)
    begins = -(-first_chunk // 8) * 8  # codes come by eights
    assert [len(part) for part in parts[: begins // 8]] == [0] * (begins // 8 - 1) + [(begins - 1) * HOP]
    assert joined.shape == whole.shape
    assert np.abs(joined - whole)[begins * HOP :].max() <= LARGEST_DIFFERENCE * max(1.0, np.abs(whole).max())
    # It begins as the early decode and ends as the exact one; the steps at both ends are no larger than the sound's own.
    early, seam = codec.decode(codes[:, :begins]), (begins - 1) * HOP
    np.testing.assert_allclose(joined[: seam + 1], early[: seam + 1], atol=1e-6)
    assert abs(joined[seam + FADE] - joined[seam + FADE - 1]) <= np.abs(np.diff(whole)).max() + 1e-6


def test_a_stream_shorter_than_its_first_chunk_is_whole(codec: Codec):
    codes = random_codes(5)
    joined = np.concatenate(pieces(CodecStream(codec, 24), codes, [5]))
    np.testing.assert_allclose(joined, codec.decode(codes), atol=1e-6)
    assert len(CodecStream(codec).finish()) == 0


def test_codes_that_no_frame_sees_any_more_are_forgotten(codec: Codec):
    stream = CodecStream(codec)
    for seed in range(30):
        stream.feed(random_codes(8, seed))
        assert stream._codes is not None
        assert stream._codes.shape[1] <= 2 * CONTEXT + 8


@pytest.mark.parametrize("wrong", [1, -3, 2.5, "4"])
def test_a_first_chunk_of_less_than_two_whole_frames_is_refused(codec: Codec, wrong: Any):
    with pytest.raises(ConfigError, match="whole number, at least 2"):
        CodecStream(codec, wrong)
