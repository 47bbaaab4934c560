"""Loading checkpoints: both layouts give the same model; what does not fit is listed, never ignored."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.errors import CheckpointError
from train.model import config as model_config
from train.model.config import native_config, read_model_config
from train.model.rope import rope_frequencies
from train.model.weights import load_model, native_name, stored_dtype


@pytest.fixture(scope="module")
def native(tiny_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_dir / "model" / "model.safetensors")


def boson_name(name: str) -> str:
    """The inverse of the key map, written apart from it."""
    name = re.sub(r"^(audio|text)_lm_head", r"audio_decoder_proj.\1_lm_head", name)
    name = re.sub(r"^model\.embed_audio_tokens\.embed_audio_tokens", "audio_codebook_embeddings", name)
    return re.sub(r"^model\.", "", name)


def boson_config(folder: Path) -> dict:
    """config.json as boson-multimodal 0.1.1 writes it for these sizes; llama3 scaling 32/1/4/8192 equals the native one."""
    config = read_model_config(folder)
    return {
        "model_type": "higgs_audio",
        "audio_adapter_type": "dual_ffn_fast_forward",
        "audio_dual_ffn_layers": list(range(config.num_layers)),
        "audio_num_codebooks": 8,
        "audio_codebook_size": 1024,
        "skip_audio_tower": True,
        "text_config": {
            "model_type": "llama",
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
    }


@pytest.fixture
def boson_folder(tiny_dir: Path, native, tmp_path: Path) -> Path:
    """The tiny model in the older layout, in two files with an index, as the hub keeps it."""
    renamed = {boson_name(name): tensor for name, tensor in native.items()}
    names = sorted(renamed)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: renamed[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(boson_config(tiny_dir / "model")))
    return tmp_path


def test_the_older_layout_gives_the_same_model(tiny_dir, native, boson_folder):
    assert {native_name(boson_name(name)) for name in native} == set(native)
    model, older = (load_model(folder, torch.float32) for folder in (tiny_dir / "model", boson_folder))
    for (name, parameter), (other_name, other) in zip(model.named_parameters(), older.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(parameter, other)
    ids, codes = torch.tensor([128000, 5, 6]), torch.randint(0, 1026, (4, 8))
    positions = torch.tensor([0, 1, 2, 100, 1000, 5000, 9000])

    def alone(layer, q, k, v):
        return q + k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # rotation shows, attention does not

    assert torch.equal(model.model(ids, codes, positions, alone), older.model(ids, codes, positions, alone))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), "missing model.norm.weight"),
        (
            lambda state: state.update({"audio_tower.conv1.weight": torch.zeros(2)}),
            r"unexpected audio_tower\.conv1\.weight \[2\]",
        ),
        (
            lambda state: state.update({"model.norm.weight": torch.zeros(3)}),
            r"model\.norm\.weight has shape \[3\], config\.json says \[128\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed(tiny_dir, native, tmp_path, change, message):
    state = dict(native)
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_dir / "model" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, torch.float32)


def test_missing_files_and_foreign_models_are_explained(tiny_dir, boson_folder, tmp_path):
    (boson_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing weight file model-00002-of-00002\.safetensors"):
        load_model(boson_folder, torch.float32)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: not readable"):
        load_model(other, torch.float32)
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type is 'llama'; expected higgs_audio_v2"):
        load_model(other, torch.float32)


def test_sizes_survive_a_round_trip(tiny_dir, tmp_path):
    config = read_model_config(tiny_dir / "model")
    assert config.is_random
    (tmp_path / "config.json").write_text(json.dumps(native_config(config)))
    assert read_model_config(tmp_path) == config
    assert stored_dtype(tiny_dir / "model") == torch.float32


def test_weights_are_cast_on_the_way_in(tiny_dir):
    model = load_model(tiny_dir / "model", torch.bfloat16, text_head=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model, "text_lm_head")


def test_matrices_split_by_bosons_training_are_joined(boson_folder, tiny_dir, native):
    """Frozen rows first, in whichever file each half lies; a half alone is an error."""
    weight_map = json.loads((boson_folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = boson_name("text_lm_head.weight")
    path = boson_folder / weight_map[name]
    tensors = load_file(path)
    whole = tensors.pop(name)
    prefix = name.removesuffix(".weight")
    save_file({**tensors, f"{prefix}.linear_trainable.weight": whole[128000:].clone()}, path)
    with pytest.raises(CheckpointError, match="the other half is missing of trainable"):
        load_model(boson_folder, torch.float32)
    other = boson_folder / next(file for file in set(weight_map.values()) if file != weight_map[name])
    save_file({**load_file(other), f"{prefix}.linear_frozen.weight": whole[:128000].clone()}, other)
    model = load_model(boson_folder, torch.float32)
    assert torch.equal(model.text_lm_head.weight, native["text_lm_head.weight"])


@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3"])
def test_rope_of_every_kind_survives_both_layouts_and_back(tiny_dir, tmp_path, rope_type):
    changed = {"rope_type": rope_type, "rope_factor": 4.0, "rope_theta": 20000.0}
    config = dataclasses.replace(read_model_config(tiny_dir / "model"), **changed)
    wanted = rope_frequencies(config)
    plain = 1.0 / 20000.0 ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    if rope_type != "llama3":
        torch.testing.assert_close(wanted, plain if rope_type == "default" else plain / 4)
    for first, second in ((native_config, model_config.boson_config), (model_config.boson_config, native_config)):
        found = config
        for write in (first, second):
            (tmp_path / "config.json").write_text(json.dumps(write(found)))
            found = read_model_config(tmp_path)
            assert found.rope_type == rope_type
            assert torch.equal(rope_frequencies(found), wanted)


def test_rope_in_older_words_and_of_unknown_kinds(tiny_dir, tmp_path):
    written = model_config.boson_config(read_model_config(tiny_dir / "model"))
    for scaling, found in ((None, "default"), ({"type": "linear", "factor": 2.0}, "linear"), ({"type": "yarn"}, None)):
        written["text_config"]["rope_scaling"] = scaling
        (tmp_path / "config.json").write_text(json.dumps(written))
        if found:
            assert read_model_config(tmp_path).rope_type == found
        else:
            with pytest.raises(CheckpointError, match="rope_type 'yarn' is not known; expected one of llama3, linear"):
                read_model_config(tmp_path)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("layout", ["native", "boson"])
@pytest.mark.parametrize(
    ("rope", "found"),
    [
        ({"rope_scaling": LINEAR, "rope_theta": 10000.0}, ("linear", 2.0, 10000.0)),
        ({"rope_parameters": {**LINEAR, "rope_theta": 10000.0}}, ("linear", 2.0, 10000.0)),
        ({"rope_parameters": {**LINEAR, "type": "linear"}, "rope_scaling": LINEAR}, ("linear", 2.0, 500000.0)),
        ({"rope_parameters": LINEAR, "rope_scaling": {**LINEAR, "factor": 4.0}}, "differ in factor"),
        ({"rope_scaling": {**LINEAR, "type": "default"}}, "type 'default' differ"),
        ({"rope_scaling": {"factor": 2.0}}, "a rope factor without a rope_type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' without a factor"),
    ],
)
def test_rope_is_found_where_either_version_writes_it(tiny_dir, tmp_path, layout, rope, found):
    """transformers 4 writes rope_theta and rope_scaling, 5 rope_parameters; what was not looked at was another model."""
    config = read_model_config(tiny_dir / "model")
    written = native_config(config) if layout == "native" else model_config.boson_config(config)
    place = written if layout == "native" else written["text_config"]
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        place.pop(key, None)
    place.update(rope)
    (tmp_path / "config.json").write_text(json.dumps(written))
    if isinstance(found, str):
        with pytest.raises(CheckpointError, match=found):
            read_model_config(tmp_path)
        return
    read = read_model_config(tmp_path)
    assert (read.rope_type, read.rope_factor, read.rope_theta) == found
