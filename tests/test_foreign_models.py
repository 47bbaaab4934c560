"""Model, codec and adapter folders of strangers, cut-off downloads: one line that names the file, whatever is in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shards.artifacts import load_tokenizer, weights_fingerprint
from shards.encoders.codec import load_codec
from shards.encoders.whisper_tower import load_whisper_tower
from shards.errors import CheckpointError
from train.model.conditioning import CODES
from train.model.config import read_model_config
from train.model.lora import load_adapter
from train.model.weights import empty_model, load_model, stored_dtype

NAN, DEEP = float("nan"), b"[" * 100_000
NO_OBJECT = [
    b"[]",
    b"7",
    b"null",
    b'"acoustic_model_config"',
    b"\xff\xfe{}",
    DEEP,
    b"<html>",
    b"",
    b'{"a": ' + b"9" * 5000,
]


def folder_like(model: Path, place: Path, name: str, data: bytes) -> Path:
    """A folder with one file of `model` replaced; the others are links, as in a hub's cache."""
    place.mkdir()
    for path in model.iterdir():
        if path.name != name:
            (place / path.name).symlink_to(path)
    (place / name).write_bytes(data)
    return place


def changed(config: Path, *keys: str, value: Any = None) -> bytes:
    """config.json with another value at a path of keys; None takes it out."""
    whole = json.loads(config.read_text())
    part = whole
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    if value is None:
        del part[keys[-1]]
    return json.dumps(whole).encode()


def refused(read: Callable[[], object], where: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read()
    said = str(caught.value)
    assert said.startswith(str(where))
    assert "\n" not in said
    assert len(said) < 600
    return said


@pytest.mark.parametrize("data", NO_OBJECT)
def test_settings_that_are_no_object_are_one_line(model_dir, tiny_dir, tmp_path, data):
    model = folder_like(model_dir, tmp_path / "m", "config.json", data)
    refused(lambda: read_model_config(model), model / "config.json")
    refused(lambda: load_whisper_tower(model), model / "config.json")
    codec = folder_like(tiny_dir / "codec", tmp_path / "c", "config.json", data)
    refused(lambda: load_codec(codec), codec / "config.json")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        *((("hidden_size",), value) for value in (None, NAN, -4, 0, "64", True, 10**30, 64.0, [64])),
        *((("num_hidden_layers",), value) for value in (None, 1.5, 10**7)),
        *((("num_attention_heads",), value) for value in (0, "4", 10**6)),
        (("num_key_value_heads",), 3),
        (("head_dim",), 15),
        (("codebook_size",), None),
        (("num_codebooks",), 0),
        (("vocab_size",), {}),
        (("rms_norm_eps",), -1),
        (("rms_norm_eps",), float("inf")),
        *((("rope_parameters",), value) for value in ([1], "x", 7)),
        (("rope_parameters", "rope_type"), ["llama3"]),
        (("rope_parameters", "rope_theta"), NAN),
        (("rope_parameters", "factor"), 0),
        (("rope_parameters", "low_freq_factor"), 99.0),
        (("model_type",), ["higgs_audio_v2"]),
        *((("audio_encoder_config",), value) for value in ("x", [1], {"num_mel_bins": 128, "d_model": "a"})),
    ],
)
def test_a_size_that_no_model_has_is_named(model_dir, tmp_path, keys, value):
    data = changed(model_dir / "config.json", *keys, value=value)
    model = folder_like(model_dir, tmp_path / "m", "config.json", data)
    said = refused(lambda: read_model_config(model), model / "config.json")
    assert keys[-1] in said or value in (3, 15) or "d_model" in said


@pytest.mark.parametrize(
    "weight_map",
    [
        None, [], {}, [1], NAN, "x", {"a": 3}, {"a": None}, {"a": "nope.safetensors"}, {"a": "config.json"}, {"a": "."},
        {"a": "../m.safetensors"}, {"a": "/etc/m.safetensors"}, {"a": "a\0.safetensors"}, {"a": "x" * 5000 + ".safetensors"},
    ],
)  # fmt: skip
def test_an_index_of_weights_names_files_of_its_folder(model_dir, tmp_path, weight_map):
    """One outside would be loaded without being in the model's fingerprint."""
    (tmp_path / "m.safetensors").symlink_to(model_dir / "model.safetensors")
    data = json.dumps({"weight_map": weight_map}).encode()
    model = folder_like(model_dir, tmp_path / "m", "model.safetensors.index.json", data)
    refused(lambda: load_model(model, torch.float32), model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-100],
        lambda data: data[:50],
        lambda data: b"<html>",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        lambda data: data[:8] + b"x" * int.from_bytes(data[:8], "little") + data[8 + int.from_bytes(data[:8], "little") :],
    ],
)  # fmt: skip
def test_weights_that_are_cut_off_or_none_are_named(model_dir, tiny_dir, tmp_path, damage):
    data = damage((tiny_dir / "codec" / "model.safetensors").read_bytes())  # the smaller one
    model = folder_like(model_dir, tmp_path / "m", "model.safetensors", data)
    refused(lambda: load_model(model, torch.float32), model / "model.safetensors")
    refused(lambda: weights_fingerprint(model), model / "model.safetensors")
    codec = folder_like(tiny_dir / "codec", tmp_path / "c", "model.safetensors", data)
    refused(lambda: load_codec(codec), codec / "model.safetensors")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"1", b"\xff\xfe{}", DEEP])
def test_a_tokenizer_that_is_none_is_named(model_dir, tmp_path, data):
    model = folder_like(model_dir, tmp_path / "m", "tokenizer.json", data)
    refused(lambda: load_tokenizer(model), model / "tokenizer.json")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        *((("acoustic_model_config",), value) for value in ("x", [], 7)),
        *((("target_bandwidths",), value) for value in ("x", [], [NAN])),
        *((("codebook_size",), value) for value in ("x", -1)),
        (("sample_rate",), 0),
        (("codebook_dim",), 10**12),
        (("semantic_model_config",), {"model_type": "nope"}),
    ],
)
def test_a_codec_that_cannot_be_built_is_named(tiny_dir, tmp_path, keys, value):
    data = changed(tiny_dir / "codec" / "config.json", *keys, value=value)
    codec = folder_like(tiny_dir / "codec", tmp_path / "c", "config.json", data)
    refused(lambda: load_codec(codec), codec)


@pytest.mark.parametrize("data", [b"", b"<html>", b"PK\x03\x04", b"\x80\x02cos\nsystem\nq\x00."])
def test_a_pickle_that_is_none_is_named(tmp_path, data):
    (tmp_path / "config.json").write_text('{"n_q": 8}')
    (tmp_path / "model.pth").write_bytes(data)
    refused(lambda: load_codec(tmp_path), tmp_path / "model.pth")


LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "settings",
    [
        *({"r": value} for value in (0, -1, 10**12, True, "4", 1.5)),
        {"lora_alpha": "x"},
        *({"target_modules": value} for value in ("q_proj", [], ["nope"], ["(.*"], ["norm"], ["model"], [7])),
        *({"lora_dropout": value} for value in (2, -1)),
        *({"rank_pattern": {name: value}} for name, value in (("(", 4), ("q_proj", 0), ("q_proj", 10**12))),
        {"alpha_pattern": {"(": 4}},
        {"modules_to_save": ["nope"]},
        {"exclude_modules": ["q_proj"]},
    ],
)
def test_settings_of_an_adapter_that_cannot_be_are_one_line(model_dir, tmp_path, settings):
    (tmp_path / "adapter_config.json").write_text(json.dumps({**LORA, **settings}))
    save_file({"base_model.model.a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    refused(lambda: load_adapter(empty_model(model_dir, CODES), tmp_path), tmp_path)


@pytest.mark.parametrize("data", [*NO_OBJECT, b'{"lora_alpha": NaN}'])
def test_an_adapters_settings_that_are_no_object_are_one_line(model_dir, tmp_path, data):
    (tmp_path / "adapter_config.json").write_bytes(data)
    save_file({"base_model.model.a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    refused(lambda: load_adapter(empty_model(model_dir, CODES), tmp_path), tmp_path / "adapter_config.json")


def test_an_adapter_file_that_is_none_is_named(model_dir, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"<html>")
    refused(lambda: load_adapter(empty_model(model_dir, CODES), tmp_path), tmp_path / "adapter_model.safetensors")


def test_weights_without_any_or_of_whole_numbers_are_refused(tmp_path):
    for tensors in ({}, {"embed_tokens.weight": torch.zeros(2, 2, dtype=torch.int8)}):
        save_file(tensors, tmp_path / "model.safetensors")
        refused(lambda: stored_dtype(tmp_path), tmp_path)
