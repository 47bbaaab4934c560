"""Codec and mel: both layouts give equal codes, padding is to whole frames, mels rebuild bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from boson_layout import boson_state

from preprocess.audio import AudioLimits, decode
from preprocess.features import stored_mel
from shards.artifacts import WHISPER_FEATURES
from shards.encoders import codec_on_cpu
from shards.encoders.codec import Codec, codec_model, fill, load_codec
from shards.encoders.codec_on_cpu import Changes, ChannelsLastConv, TiledBlock, is_strided_block, quicken
from shards.errors import CheckpointError
from shards.mel import rebuild_mel


@pytest.fixture(scope="module")
def wave(repository: Path) -> np.ndarray:
    data = (repository / "tests/data/arabic-mini/spk_03_06.flac").read_bytes()
    return decode(data, AudioLimits()).wave


@pytest.fixture(scope="module")
def codec(tiny_dir: Path):
    return load_codec(tiny_dir / "codec")


def test_codes_have_the_released_shape_and_follow_the_sound(codec, wave):
    codes = codec.encode(wave)
    assert codes.dtype == np.uint16
    assert codes.shape == (8, -(-len(wave) // 960))
    assert codes.max() < 1024
    assert all(len(np.unique(book)) > 30 for book in codes)
    assert codec.decode(codes).shape == (codes.shape[1] * 960,)


def test_a_wave_is_padded_to_whole_frames(codec, wave):
    cut = wave[: 50 * 960 + 300]
    padded = np.pad(cut, (0, 960 - 300))
    np.testing.assert_array_equal(codec.encode(cut), codec.encode(padded))


@pytest.fixture(scope="module")
def boson_folder(tiny_dir: Path, tmp_path_factory) -> Path:
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("boson-codec")
    native_config = json.loads((tiny_dir / "codec" / "config.json").read_text())
    semantic = native_config["semantic_model_config"]
    config = {
        "n_filters": 8,
        "D": 16,
        "codebook_dim": 64,
        "target_bandwidths": [0.5, 1, 1.5, 2, 4],
        "ratios": [8, 5, 4, 2, 3],
        "sample_rate": 24000,
        "bins": 1024,
        "n_q": 8,
        "encoder_hidden_size": 8,
        "decoder_hidden_size": 32,
        "semantic_config": {
            key: semantic[key]
            for key in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "conv_dim",
                "num_conv_pos_embeddings",
                "num_conv_pos_embedding_groups",
            )
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(boson_state(load_file(tiny_dir / "codec" / "model.safetensors")), folder / "model.pth")
    return folder


def test_the_older_layout_gives_equal_codes(codec, boson_folder, wave):
    state = torch.load(boson_folder / "model.pth", weights_only=True)
    assert sum(name.endswith("weight_g") for name in state) == 74, "as many weight_norm pairs as the released codec"
    older = load_codec(boson_folder)
    np.testing.assert_array_equal(older.encode(wave), codec.encode(wave))


def test_a_codec_with_a_missing_tensor_is_refused(boson_folder, tmp_path):
    state = torch.load(boson_folder / "model.pth", weights_only=True)
    del state["fc_post1.bias"]
    del state["encoder.block.0.weight_v"]
    (tmp_path / "config.json").write_text((boson_folder / "config.json").read_text())
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"missing acoustic_encoder\.conv1\.weight; missing fc1\.bias"):
        load_codec(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_codec(tmp_path / "nowhere")


def test_a_config_that_lacks_a_size_is_refused(boson_folder, tmp_path):
    config = json.loads((boson_folder / "config.json").read_text())
    del config["ratios"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.pth").symlink_to(boson_folder / "model.pth")
    with pytest.raises(CheckpointError, match=r"config\.json: lacks 'ratios', which a boson codec's config has"):
        load_codec(tmp_path)


def test_without_an_implementation_one_line_says_what_to_install(tiny_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.50.0"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"^nothing here can run the codec: transformers 4\.50\.0 .*boson extra$"):
        load_codec(tiny_dir / "codec")


def test_tiny_codec_is_the_same_twice(tiny_dir, tmp_path):
    from tools.tiny.codec import write_codec

    write_codec(tmp_path, seed=0)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tiny_dir / "codec" / name).read_bytes()


@pytest.mark.parametrize("num_samples", [8000, 8001, 16000, 47999, 77777, 160000, 333333, 479999, 480000])
def test_mel_is_rebuilt_bit_for_bit(num_samples):
    from transformers import WhisperFeatureExtractor

    rng = np.random.default_rng(num_samples)
    envelope = np.abs(np.sin(np.arange(num_samples) / 9000))
    wave = (rng.standard_normal(num_samples) * 0.1 * envelope).astype(np.float32)
    expected = WhisperFeatureExtractor(**WHISPER_FEATURES)(  # pyright: ignore[reportArgumentType]
        wave, sampling_rate=16000, return_tensors="np", return_attention_mask=True
    )
    frames, floor = stored_mel(wave)
    features, mask = rebuild_mel(frames, floor, num_samples)
    np.testing.assert_array_equal(features, expected["input_features"][0])
    np.testing.assert_array_equal(mask, expected["attention_mask"][0].astype(bool))
    halved, _ = rebuild_mel(frames.astype(np.float16), floor, num_samples)
    kept = frames.shape[1]
    np.testing.assert_array_equal(halved[:, :kept], expected["input_features"][0].astype(np.float16)[:, :kept])


# --- the faster encoder on a CPU ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_dir: Path):
    """The codec as its implementation computes it."""
    return Codec(unchanged(tiny_dir / "codec"), "cpu")


def unchanged(folder: Path):
    from safetensors.torch import load_file

    model = codec_model(json.loads((folder / "config.json").read_text()))
    fill(model, load_file(folder / "model.safetensors"), folder)
    return model.eval()


def quickened(folder: Path, tile_bytes: int, changes: Changes):
    model = unchanged(folder)
    quicken(model, tile_bytes, changes)
    return model


@pytest.mark.parametrize(
    ("linears", "convolutions", "numpy_sine", "every"),
    [(True, True, True, 6), (True, False, False, 18), (False, True, False, 18), (False, False, True, 18)],
)
def test_the_faster_encoder_gives_the_same_codes(tiny_dir, plain, repository, linears, convolutions, numpy_sine, every):
    """Sample clips, and lengths from one frame on that end within, at and behind a tile; whatever processor this is."""
    other = Codec(quickened(tiny_dir / "codec", 1 << 15, Changes(linears, convolutions, numpy_sine)), "cpu")
    parts = list(other._model.modules())
    assert sum(isinstance(part, ChannelsLastConv) for part in parts) == (7 * codec_on_cpu.NUM_TILED + 1) * convolutions
    paths = sorted((repository / "tests/data/arabic-mini").glob("*.flac"))
    assert len(paths) == 72
    waves = [decode(path.read_bytes(), AudioLimits()).wave for path in paths[::every]]
    rng = np.random.default_rng(0)
    waves += [(0.1 * rng.standard_normal(n)).astype(np.float32) for n in (1, 959, 960, 961, 5000, 12 * 24000)]
    for wave in waves:
        np.testing.assert_array_equal(other.encode(wave), plain.encode(wave))


@pytest.mark.parametrize("num_samples", [960, 8 * 960, 8 * 960 + 40, 100 * 960])
def test_a_tile_sees_all_that_its_outputs_depend_on(tiny_dir, num_samples):
    """Tiles of a few outputs each: an edge cut too near would show in every one of them."""
    model: Any = unchanged(tiny_dir / "codec")
    block = next(block for block in model.acoustic_encoder.block if is_strided_block(block))
    channels = next(part.in_channels for part in block.modules() if isinstance(part, torch.nn.Conv1d))
    x = torch.randn(1, channels, num_samples, generator=torch.Generator().manual_seed(0))
    tiled = TiledBlock(block, tile_bytes=4 * channels * 8 * 5)
    assert tiled.halo == 39, "3 * (1 + 3 + 9)"
    with torch.inference_mode():
        torch.testing.assert_close(tiled(x), block(x), rtol=0, atol=1e-5)  # other lengths may sum in another order


def test_where_codes_would_differ_the_plain_encoder_is_kept(tiny_dir, plain, wave, monkeypatch, caplog):
    def inexact(model, changes=None) -> None:
        setattr(model, "fc" if hasattr(model, "fc") else "fc_prior", torch.nn.Identity())

    monkeypatch.setattr(codec_on_cpu, "quicken", inexact)
    codec = load_codec(tiny_dir / "codec")
    assert "gives other codes for noise; the plain one is used" in caplog.text
    np.testing.assert_array_equal(codec.encode(wave), plain.encode(wave))


@pytest.mark.parametrize(
    ("faults", "kept", "said"),
    [
        (set(), {"tiles", "linears", "convolutions", "sine"}, []),
        (
            {"linears"},
            {"tiles", "convolutions", "sine"},
            ["oneDNN's linear layers give other codes for noise; MKL's are used"],
        ),
        (
            {"convolutions"},
            {"tiles", "linears", "sine"},
            ["convolutions over channels side by side give other codes for noise"],
        ),
        ({"sine"}, {"tiles", "linears", "convolutions"}, ["numpy's sine gives other codes for noise; torch's is used"]),
        ({"linears", "convolutions"}, {"tiles", "sine"}, ["oneDNN's linear layers", "channels side by side"]),
        ({"linears", "convolutions", "sine"}, {"tiles"}, ["linear layers", "channels side by side", "numpy's sine"]),
        ({"tiles"}, set(), ["the plain one is used"]),
    ],
)
def test_what_is_inexact_here_is_left_out_and_logged(tiny_dir, plain, wave, monkeypatch, faults, kept, said):
    """A processor whose products, whose convolutions in another layout or whose sine over tiles are off by a percent."""
    monkeypatch.setattr(codec_on_cpu, "worthwhile", lambda: Changes(linears=True, convolutions=True, sine=True))
    sine = np.sin
    if "sine" in faults:
        monkeypatch.setattr(np, "sin", lambda x, **to: sine(1.01 * x, **to))
    if "linears" in faults:
        exact = codec_on_cpu.OneDnnLinear.forward
        monkeypatch.setattr(codec_on_cpu.OneDnnLinear, "forward", lambda layer, x: 1.01 * exact(layer, x))
    if "convolutions" in faults:
        convolved = ChannelsLastConv.convolved
        monkeypatch.setattr(ChannelsLastConv, "convolved", lambda conv, x, padding: 1.01 * convolved(conv, x, padding))
    if "tiles" in faults:
        snaked = codec_on_cpu.snaked
        monkeypatch.setattr(codec_on_cpu, "snaked", lambda x, snake: 1.01 * snaked(x, snake))
    messages: list[str] = []
    codec = load_codec(tiny_dir / "codec", tell=messages.append)
    assert len(messages) == len(said)
    assert all(part in line for part, line in zip(said, messages, strict=True)), messages
    kinds = {"tiles": TiledBlock, "linears": codec_on_cpu.OneDnnLinear, "convolutions": ChannelsLastConv}
    parts = list(codec._model.modules())
    found = {kind for kind, of in kinds.items() if any(isinstance(part, of) for part in parts)}
    assert found | {"sine" for part in parts if getattr(part, "uses_numpy", False)} == kept
    np.testing.assert_array_equal(codec.encode(wave), plain.encode(wave))


@pytest.mark.parametrize(
    "form", [(8, 12, 7, 1, 9, 27, 1), (8, 16, 16, 8, 1, 4, 1), (12, 12, 8, 1, 1, 4, 3), (4, 8, 1, 1, 1, 0, 1)]
)
@pytest.mark.parametrize("num_samples", [1, 63, 64, 500])
def test_convolutions_in_another_layout_are_the_same_sums(form, num_samples):
    channels, out, kernel, stride, dilation, padding, groups = form
    conv = torch.nn.Conv1d(channels, out, kernel, stride, padding, dilation, groups)
    other = codec_on_cpu.channels_last(conv)
    assert other is not None
    x = torch.randn(2, channels, max(num_samples, kernel), generator=torch.Generator().manual_seed(0))
    expected, found = conv(x), other(x)
    assert found.stride(1) == 1 or found.shape[2] == 1, "the next layer reads what this one wrote, without a copy"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    rows = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(other(rows), expected, rtol=0, atol=1e-5)


def test_a_convolution_whose_weight_is_made_anew_is_left_alone():
    conv = torch.nn.Conv1d(4, 4, 3, padding=1)
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(conv)
    assert codec_on_cpu.channels_last(conv) is None
    assert codec_on_cpu.channels_last(torch.nn.Conv1d(4, 4, 3, padding="same")) is None
    assert codec_on_cpu.channels_last(torch.nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect")) is None
    assert codec_on_cpu.channels_last(torch.nn.Linear(4, 4)) is None


def test_numpy_computes_the_sine_in_float32_alone(monkeypatch):
    """Anything else stays torch's: numpy knows no bfloat16 and no gradients."""
    calls: list[int] = []
    sine = np.sin
    monkeypatch.setattr(np, "sin", lambda x, out: (calls.append(x.size), sine(x, out=out)))
    alpha = torch.full((1, 6, 1), 2.0)
    theirs, numpys = (codec_on_cpu.Snake(SimpleNamespace(alpha=alpha), uses_numpy) for uses_numpy in (False, True))
    x = 30 * torch.randn(1, 6, 50, generator=torch.Generator().manual_seed(0))
    for rows in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.testing.assert_close(numpys(rows), theirs(rows), rtol=1e-6, atol=1e-6)
    assert calls == [300, 300]
    halves = [
        codec_on_cpu.Snake(SimpleNamespace(alpha=alpha.bfloat16()), uses_numpy)(x.bfloat16())
        for uses_numpy in (False, True)
    ]
    assert torch.equal(*halves)
    learned = x.clone().requires_grad_()
    numpys(learned).sum().backward()
    torch.testing.assert_close(learned.grad, 1 + (4 * x).sin(), rtol=1e-3, atol=1e-3)
    assert calls == [300, 300]


@pytest.mark.parametrize(("is_wide", "threads", "chosen"), [(True, 1, True), (True, 2, False), (False, 1, False)])
def test_the_sine_is_numpys_for_one_thread_with_avx512(monkeypatch, is_wide, threads, chosen):
    monkeypatch.setattr(codec_on_cpu, "has_avx512", lambda: is_wide)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert codec_on_cpu.worthwhile() == Changes(codec_on_cpu.is_amd(), convolutions=is_wide, sine=chosen)


def test_the_loaded_codec_is_the_faster_one(codec):
    assert sum(isinstance(part, TiledBlock) for part in codec._model.modules()) == codec_on_cpu.NUM_TILED
