"""Whose checkpoint: another base, codec, tokenizer, prompt or held-out set is refused; what may change is logged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save
from short_run import losses

from preprocess.sound_edits import AudioSection
from preprocess.text import TextSection
from shards.config import SECTIONS
from shards.errors import CheckpointError, PipelineError
from shards.manifest import Dataset, digest_of
from tools.checkpoints.merge import MovedTo, merge_checkpoint
from tools.speaker import SpeakConfig, load_speaker
from train.config import TrainConfig
from train.loop import RunOptions, train
from train.run_folder.identity import BY_CONTENT, MAY_CHANGE, MUST_BE_EQUAL, NO_EFFECT, config_values


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_dir, short_data) -> Path:
    """Two steps on a base and a codec of their own."""
    from shards.config import read_config

    folder = tmp_path_factory.mktemp("trained")
    for name in ("model", "codec"):
        shutil.copytree(tiny_dir / name, folder / name)
    overrides = ["batch_tokens=700", "packs_per_step=2", "max_steps=2", "num_workers=0", "listening_samples=0"]
    overrides = [f"train.{word}" for word in overrides]
    overrides += ["lora.rank=4", f"model.base={folder / 'model'}", f"model.codec={folder / 'codec'}"]
    train(read_config(TrainConfig, tiny_dir / "pipeline.toml", overrides), short_data, folder / "run", RunOptions())
    return folder


@pytest.fixture
def place(trained, tmp_path) -> Path:
    """model, codec and run of `trained`, to be changed; the checkpoint names the ones of `trained`."""
    for name in ("model", "codec"):  # weights are linked: who changes one makes a new file
        shutil.copytree(trained / name, tmp_path / "place" / name, copy_function=os.link)
    shutil.copytree(trained / "run", tmp_path / "place" / "run", symlinks=True)
    return tmp_path / "place"


def replaced(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


@pytest.fixture
def configure(short_config, place):
    """The configuration of `trained` with the copies of `place`, and overrides."""
    names = [f"model.base={place / 'model'}", f"model.codec={place / 'codec'}"]
    return lambda *overrides: short_config("train.max_steps=3", *names, *overrides)


def other_weights(place: Path) -> None:
    path = place / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.down_proj.weight"] += 0.01
    replaced(path, save(weights, metadata={"format": "pt"}))


def other_rope(place: Path) -> None:
    """The same tensors, computed with otherwise."""
    path = place / "model" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    replaced(path, json.dumps(config).encode())


def other_token(place: Path) -> None:
    path = place / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    first, second, *_ = words
    words[first], words[second] = words[second], words[first]
    replaced(path, json.dumps(tokenizer).encode())


def other_codec(place: Path) -> None:
    path = next((place / "codec").glob("*.safetensors"))
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = next(name for name, tensor in weights.items() if tensor.dtype == torch.float32)
    weights[name] += 0.01
    replaced(path, save(weights))


CHANGES = {"base of": other_weights, "the base of": other_rope, "tokenizer of": other_token, "codec of": other_codec}


@pytest.mark.parametrize("what", CHANGES)
def test_merge_refuses_another_model_than_trained_with(place, what):
    CHANGES[what](place)
    moved = MovedTo(str(place / "model"), str(place / "codec"))
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoint(place / "run", place / "merged", moved_to=moved)
    said = str(caught.value)
    part = what.removeprefix("the ")
    key = "model.codec" if "codec" in what else "model.base"
    assert f"checkpoint-2: trained with another model: {part} {key} = '{place}/" in said
    assert ", trained with " in said
    assert "; name those it was trained with: --base, --codec, --whisper" in said
    assert said.count(", trained with ") == 1, "the parts that are equal are not blamed"
    assert not (place / "merged").exists()


@pytest.mark.parametrize("what", CHANGES)
def test_speak_refuses_an_adapter_of_another_model(place, configure, what):
    CHANGES[what](place)
    asked = configure()
    config = SpeakConfig(
        model=asked.model, features=asked.features, sequence=asked.sequence, text=TextSection(), audio=AudioSection()
    )
    adapter = place / "run" / "checkpoints" / "checkpoint-2" / "adapter"
    with pytest.raises(CheckpointError, match=r"trained with another model.*give MODEL and model.codec that it was"):
        load_speaker(place / "model", adapter, config, "cpu")


@pytest.mark.parametrize("change", [other_weights, other_rope])
def test_resume_refuses_another_base_of_the_same_shape(place, configure, short_data, change):
    change(place)
    kept = (place / "run" / "plan.json").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2: belongs to another run: base \(model.base\): trained with"
    ):
        train(configure("train.seed=3"), short_data, place / "run", RunOptions())
    assert (place / "run" / "plan.json").read_bytes() == kept, "nothing of the run was touched"


@pytest.mark.parametrize("change", [other_token, other_codec])
def test_resume_refuses_another_tokenizer_or_codec(place, configure, short_data, change):
    """With shards that were made for it, or the shards would be refused first."""
    from shards.artifacts import codec_fingerprint, tokenizer_fingerprint

    change(place)
    data = shutil.copytree(short_data, place / "data")
    dataset = msgspec.json.decode((data / "dataset.json").read_bytes(), type=Dataset)
    prints = msgspec.structs.replace(
        dataset.fingerprints,
        codec=codec_fingerprint(place / "codec"),
        tokenizer=tokenizer_fingerprint(place / "model"),
    )
    dataset = msgspec.structs.replace(dataset, fingerprints=prints)
    dataset = msgspec.structs.replace(dataset, digest=digest_of(dataset))
    (data / "dataset.json").write_bytes(msgspec.json.encode(dataset))
    what = "tokenizer" if change is other_token else "codec"
    with pytest.raises(CheckpointError, match=rf"belongs to another run: {what} \(model\.\w+\): trained with \w+, now"):
        train(configure(), data, place / "run", RunOptions())


def test_a_moved_base_with_equal_content_is_accepted(place, configure, short_data):
    (place / "model").rename(place / "renamed base")
    (place / "codec").rename(place / "renamed codec")
    moved = MovedTo(str(place / "renamed base"), str(place / "renamed codec"))
    assert merge_checkpoint(place / "run", place / "merged", moved_to=moved).step == 2
    voice = json.loads((place / "merged" / "higgs_voice.json").read_text())
    assert (voice["base"], voice["codec"]) == (moved.base, moved.codec)
    config = configure(f"model.base={moved.base}", f"model.codec={moved.codec}")
    adapter = place / "run" / "checkpoints" / "checkpoint-2" / "adapter"
    speak = SpeakConfig(
        model=config.model, features=config.features, sequence=config.sequence, text=TextSection(), audio=AudioSection()
    )
    load_speaker(place / "renamed base", adapter, speak, "cpu")
    last = train(config, short_data, place / "run", RunOptions())
    assert last
    assert last.name == "checkpoint-3"
    said = (place / "run" / "logs" / "training.log").read_text()
    assert f"-> '{moved.base}'" in said
    assert "changed since checkpoint-2: model.base '" in said


def test_merge_needs_no_names_where_nothing_was_moved(place):
    assert merge_checkpoint(place / "run", place / "merged").step == 2


def test_an_adapter_without_its_checkpoint_is_logged(place, configure, caplog):
    import logging

    logging.getLogger("train").propagate = True
    asked = configure()
    config = SpeakConfig(
        model=asked.model, features=asked.features, sequence=asked.sequence, text=TextSection(), audio=AudioSection()
    )
    alone = shutil.copytree(place / "run" / "checkpoints" / "checkpoint-2" / "adapter", place / "alone")
    load_speaker(place / "model", alone, config, "cpu")
    assert f"{alone}: no identity.json beside it" in caplog.text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed=7", r"train\.seed: trained with 0, now 7"),
        ("lora.rank=8", r"lora\.rank: trained with 4, now 8"),
        ("sequence.system_prompt=another", r"sequence\.system_prompt: trained with 'Generate .*, now 'another'"),
        ("train.validation_fraction=0.4", r"train\.validation_fraction: trained with 0\.0, now 0\.4"),
        ("train.batch_tokens=900", r"train\.batch_tokens: trained with 700, now 900"),
    ],
)
def test_a_run_does_not_go_on_with_other_sequences(place, configure, short_data, override, message):
    with pytest.raises(
        PipelineError, match=rf"belongs to another run: {message}; restore those settings or give a new RUN"
    ):
        train(configure(override), short_data, place / "run", RunOptions())
    with pytest.raises(PipelineError, match="holds checkpoints of another run"):
        train(configure(), short_data, place / "run", RunOptions(resume="never"))


def test_a_run_does_not_go_on_with_other_held_out_data(place, configure, short_data, make_dataset, make_sample):
    held_out = make_dataset(place / "held-out", [make_sample(40 + seed, speaker=f"other-{seed}") for seed in range(3)])
    with pytest.raises(
        CheckpointError, match=r"another run: train\.validation_data: trained with no data set, now \w{16};"
    ):
        train(configure(f"train.validation_data={held_out}"), short_data, place / "run", RunOptions())


def test_what_may_change_is_logged_and_the_run_goes_on(place, configure, short_data):
    config = configure("train.learning_rate=3e-4", "loss.audio_loss_weight=2.0", "train.tensorboard=false")
    train(config, short_data, place / "run", RunOptions())
    assert list(losses(place / "run")) == [1, 2, 3]
    lines = (place / "run" / "logs" / "training.log").read_text().splitlines()
    changed = [line.partition("changed since checkpoint-2: ")[2] for line in lines if "changed since" in line]
    assert [line for line in changed if "model." not in line] == [
        "loss.audio_loss_weight 1.0 -> 2.0",
        "train.keep_checkpoints 3 -> 2",
        "train.learning_rate 0.003 -> 0.0003",
        "train.log_every 10 -> 1",
        "train.max_steps 2 -> 3",
        "train.save_every 50 -> 2",
    ]


def test_an_identity_that_is_not_readable_is_one_line(place, configure, short_data):
    path = place / "run" / "checkpoints" / "checkpoint-2" / "identity.json"
    sound = json.loads(path.read_text())
    for content, message in (
        (b"{", "not readable"),
        (b"[]", "not readable"),
        (b"[" * 100_000, "not readable"),
        (json.dumps({"dataset_digest": "x", "seed": 0}).encode(), "of another version, which kept less"),
        (json.dumps({**sound, "settings": {}}).encode(), "train.batch_tokens is None, expected a number"),
        (json.dumps({**sound, "settings": {"train.batch_tokens": True}}).encode(), "train.batch_tokens is True"),
    ):
        path.write_bytes(content)
        from train.run_folder.checkpoint_folders import digests

        (path.parent / "COMPLETE").write_text(json.dumps(digests(path.parent)))
        with pytest.raises(CheckpointError, match=message):
            merge_checkpoint(place / "run", place / "merged")
        with pytest.raises(CheckpointError, match=message):
            train(configure("train.batch_tokens=auto"), short_data, place / "run", RunOptions())


def test_every_key_that_train_reads_has_a_place(short_config):
    """A new key must say whether a run may go on with another value of it."""
    groups = (MUST_BE_EQUAL, BY_CONTENT, MAY_CHANGE, NO_EFFECT)
    keys = set(config_values(short_config()))
    assert {key.split(".")[0] for key in keys} <= set(SECTIONS)
    unplaced = {key: sum(key in group for group in groups) for key in keys}
    assert {key: count for key, count in unplaced.items() if count != 1} == {}, "see train/run_folder/identity.py"
    assert frozenset().union(*groups) - keys == frozenset(), "keys that nobody reads"
