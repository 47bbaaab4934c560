"""Whisper conditioning end to end: the tower in a pack, states stored by stage one, a base without a tower, end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from preprocess.features import WhisperEncoder, stored_mel
from shards.artifacts import whisper_fingerprint
from shards.config import FeaturesSection, SequenceSection
from shards.errors import ConfigError, ShardError
from shards.manifest import digest_of, open_dataset
from shards.sample import MelFacts, Sample, compress, write_npy
from shards.sequence import WHISPER, SequenceBuilder
from shards.writer import write_json
from tools.checkpoints.model_folder import merged_state
from train.config import LoraSection, LossSection, TrainSection
from train.data.planned_source import PlannedSource
from train.evaluation.held_out import Evaluation
from train.model.batch import pack
from train.model.conditioning import decide_conditioning, fit_to_shards
from train.model.generate import generate
from train.model.lora import add_lora, load_adapter, lora_parameters, save_adapter, trainable_table
from train.model.weights import load_model
from train.world import ALONE

WITH_WHISPER = SequenceSection(conditioning="whisper+codes")


@pytest.fixture(scope="module")
def features(whisper) -> FeaturesSection:
    return FeaturesSection(whisper_model=str(whisper), whisper_revision="")


@pytest.fixture(scope="module")
def decided(features, model_dir):
    return decide_conditioning(WITH_WHISPER, features, model_dir)


@pytest.fixture(scope="module")
def samples(make_sample) -> list[Sample]:
    """Three samples with mels of different lengths."""
    return [with_mel(make_sample(seed, frames, 9), frames) for seed, frames in enumerate((12, 30, 17))]


def with_mel(sample: Sample, num_frames: int) -> Sample:
    wave = (np.random.default_rng(num_frames).standard_normal(num_frames * 640 + 37) * 0.1).astype(np.float32)
    frames, floor = stored_mel(wave)
    facts = msgspec.structs.replace(sample.facts, mel=MelFacts(len(wave), floor))
    return dataclasses.replace(sample, facts=facts, reference_mel_zst=compress(write_npy(frames.astype(np.float16))))


def with_states(sample: Sample, encoder: WhisperEncoder) -> Sample:
    assert sample.facts.mel
    mel = sample.reference_mel()
    assert mel is not None
    states = encoder.encode(mel.astype(np.float32), sample.facts.mel.floor, sample.facts.mel.num_samples)
    return dataclasses.replace(sample, reference_mel_zst=None, reference_whisper_zst=compress(write_npy(states)))


def whisper_model(model_dir, decided):
    """A model whose projection says something."""
    model = load_model(model_dir, torch.float32, conditioning=decided)
    assert model.audio_encoder_proj is not None
    torch.manual_seed(0)
    torch.nn.init.normal_(model.audio_encoder_proj.linear.weight, std=0.3)
    return model


def test_whisper_rows_stand_before_the_reference_and_count(samples, tokenizer, make_dataset, tmp_path):
    for layout in ("clone", "as_written"):
        section = SequenceSection(layout=layout, conditioning="whisper+codes")
        plain = SequenceBuilder(tokenizer, SequenceSection(layout=layout))
        builder = SequenceBuilder(tokenizer, section)
        _, index = open_dataset(make_dataset(tmp_path / layout, samples))
        for sample, length in zip(samples, builder.lengths(index), strict=True):
            sequence, without = builder.training(sample), plain.training(sample)
            assert len(sequence) == length
            is_row = sequence.token_ids == WHISPER
            np.testing.assert_array_equal(sequence.token_ids[~is_row], without.token_ids)
            np.testing.assert_array_equal(sequence.next_codes, without.next_codes)
            places = np.flatnonzero(is_row)
            assert (
                len(places) == len(sequence.whisper_clips[0]) == without.codes.shape[1] - 9 - 9 - 9
            )  # 25 a second, as codes
            assert (np.diff(places) == 1).all()
            assert sequence.token_ids[places[-1] + 1] == 128016
            assert (sequence.next_token[places] == -100).all()


def test_clips_of_a_pack_do_not_reach_each_other(model_dir, decided, samples, tokenizer):
    model = whisper_model(model_dir, decided)
    sequences = [SequenceBuilder(tokenizer, WITH_WHISPER).training(sample) for sample in samples]
    with torch.no_grad():
        together = model(pack(sequences, [0, 1, 2], ["a", "b", "c"]))
        alone = [model(pack([sequence], [0], ["k"])) for sequence in sequences]
    torch.testing.assert_close(together.audio, torch.stack([sums.audio for sums in alone]).sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(together.text, torch.stack([sums.text for sums in alone]).sum(), rtol=1e-5, atol=0)


def test_the_reference_changes_the_losses(model_dir, decided, samples, tokenizer):
    model = whisper_model(model_dir, decided)
    builder = SequenceBuilder(tokenizer, WITH_WHISPER)
    other = dataclasses.replace(samples[0], reference_mel_zst=louder(samples[0]))
    with torch.no_grad():
        first, second = (model(pack([builder.training(s)], [0], ["k"])).audio.sum() for s in (samples[0], other))
    assert abs(first - second) > 1e-2


def louder(sample: Sample) -> bytes:
    mel = sample.reference_mel()
    assert mel is not None
    return compress(write_npy((mel + np.linspace(0, 1, mel.shape[1])).astype(np.float16)))


def test_stored_states_equal_the_tower(model_dir, decided, samples, tokenizer, whisper):
    encoder = WhisperEncoder(whisper, "cpu")
    model = whisper_model(model_dir, decided)
    without_tower = load_model(model_dir, torch.float32, conditioning=dataclasses.replace(decided, runs_tower=False))
    assert without_tower.audio_tower is None
    without_tower.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith("audio_tower.")})
    builder = SequenceBuilder(tokenizer, WITH_WHISPER)
    with torch.no_grad():
        from_mels = model(pack([builder.training(s) for s in samples], [0, 1, 2], ["k"] * 3))
        stored = [with_states(s, encoder) for s in samples]
        from_states = without_tower(pack([builder.training(s) for s in stored], [0, 1, 2], ["k"] * 3))
    # States are stored in float16.
    torch.testing.assert_close(from_states.audio, from_mels.audio, rtol=1e-3, atol=0)
    with pytest.raises(ShardError, match="some hold Whisper mels, some encoder states"):
        pack([builder.training(samples[0]), builder.training(stored[1])], [0, 1], ["a", "b"])


def test_a_filler_pack_still_uses_the_projection(model_dir, decided):
    """Sharded ranks must give gradients of the same weights, on zero rows if need be."""
    from train.data.stages import FILLER

    model = load_model(model_dir, torch.float32, conditioning=decided)
    add_lora(model, LoraSection(rank=4, alpha=4), "base", seed=0, conditioning=decided)
    sums = model(pack([FILLER], [0], []))
    (sums.text + sums.audio.sum() + sums.contrastive).backward()
    assert (sums.text, sums.audio.sum()) == (0, 0)
    for name, parameter in lora_parameters(model):
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_generation_reads_what_training_read(model_dir, decided, samples, tokenizer):
    """Greedy codes of the prompt must be the likeliest ones of the training pass over prompt + those codes."""
    model = whisper_model(model_dir, decided).eval()
    builder = SequenceBuilder(tokenizer, WITH_WHISPER)
    speech = generate(model, builder.prompt(samples[1]), 12)
    assert not speech.stopped
    whole = builder.training(dataclasses.replace(samples[1], target_codes=speech.codes))
    batch = pack([whole], [0], ["k"])
    start = whole.target_columns[0]
    with torch.no_grad():
        logits = model.audio_logits(model.hidden(batch)[len(batch.text_ids) :])[start:]
    best = logits.argmax(-1).numpy()  # [A, K]
    for k in range(8):
        np.testing.assert_array_equal(best[k : k + 12 - k, k], speech.codes[k, : 12 - k])


def test_a_base_without_a_tower_starts_as_if_nothing_were_said(model_dir, decided, samples, tokenizer, tmp_path):
    """The projection is zero, trained whole in fp32, and comes back from the adapter folder and into the merged model."""
    model = load_model(model_dir, torch.bfloat16, conditioning=decided)
    config = add_lora(model, LoraSection(rank=4, alpha=4), "base", seed=0, conditioning=decided)
    assert model.audio_encoder_proj is not None
    linear = model.audio_encoder_proj.linear
    assert linear.weight.dtype == torch.float32
    assert linear.weight.requires_grad
    assert not linear.weight.any()
    assert trainable_table(model)["audio_encoder_proj.linear (whole)"] == (1, 32 * 128 + 128)
    assert not any(name.startswith("audio_tower.") for name, _ in lora_parameters(model))

    batch = pack([SequenceBuilder(tokenizer, WITH_WHISPER).training(s) for s in samples], [0, 1, 2], ["k"] * 3)
    model(batch).audio.sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.abs().max() > 0
    with torch.no_grad():
        linear.weight.add_(0.1)
        linear.bias.add_(0.2)
    save_adapter(tmp_path / "adapter", dict(lora_parameters(model)), config)
    again = load_model(model_dir, torch.float32, conditioning=decided)
    load_adapter(again, tmp_path / "adapter")
    state = merged_state(again)
    torch.testing.assert_close(state["audio_encoder_proj.linear.weight"], linear.weight.detach())
    torch.testing.assert_close(state["audio_encoder_proj.linear.bias"], linear.bias.detach())


def test_what_does_not_fit_is_refused(features, decided, model_dir, make_dataset, make_sample, samples, tmp_path):
    dataset, index = open_dataset(make_dataset(tmp_path / "none", [make_sample(1)]))
    with pytest.raises(ConfigError, match=r"1 of 1 samples have no Whisper features"):
        fit_to_shards(decided, dataset, index)
    dataset, index = open_dataset(make_dataset(tmp_path / "some", samples))
    foreign = msgspec.structs.replace(
        dataset, fingerprints=msgspec.structs.replace(dataset.fingerprints, whisper="0" * 64)
    )
    with pytest.raises(ShardError, match="hold states of encoder 0000000000000000, this tower is"):
        fit_to_shards(decided, foreign, index)
    assert decide_conditioning(SequenceSection(), features, model_dir).name == "codes"
    section = LoraSection(mode="custom", targets=["audio_encoder_proj.linear"])
    model = load_model(model_dir, torch.float32, conditioning=decided)
    with pytest.raises(ConfigError, match=r"lora.targets: audio_encoder_proj\.linear is not in the base model"):
        add_lora(model, section, "b", 0, decided)


def test_held_out_shards_may_hold_mels_where_others_hold_states(
    whisper, decided, model_dir, make_dataset, samples, tokenizer, tmp_path
):
    encoder = WhisperEncoder(whisper, "cpu")
    folder = make_dataset(tmp_path / "states", [with_states(sample, encoder) for sample in samples])
    dataset, _ = open_dataset(folder)
    assert decided.tower_dir
    marked = msgspec.structs.replace(dataset.fingerprints, whisper=whisper_fingerprint(decided.tower_dir))
    dataset = msgspec.structs.replace(dataset, fingerprints=marked)
    write_json(folder / "dataset.json", msgspec.structs.replace(dataset, digest=digest_of(dataset)))
    held_out = make_dataset(tmp_path / "mels", samples)
    section = TrainSection(batch_tokens=700, packs_per_step=1, validation_data=str(held_out))
    source = PlannedSource(str(folder), section)
    model = load_model(model_dir, torch.float32, conditioning=source.check(marked, decided))
    source.prepare(SequenceBuilder(tokenizer, WITH_WHISPER))
    model(source.preflight_batch(3))
    held_out = source.held_out(ALONE)
    assert held_out
    assert Evaluation(held_out, ALONE).losses(model, LossSection())["eval/samples"] == 3


@pytest.mark.slow
def test_end_to_end_with_whisper(tmp_path: Path, tiny_dir, arabic_mini, whisper, run_command):
    """preprocess, train, merge, speak with whisper+codes on a base without a tower, from mels and from stored states."""
    models = (tiny_dir / "pipeline.toml").read_text().split("[lora]")[0]
    config = tmp_path / "pipeline.toml"
    config.write_text(
        models
        + f"""
[features]
whisper_model = {json.dumps(str(whisper))}
whisper_revision = ""
[sequence]
conditioning = "whisper+codes"
[train]
batch_tokens = 2048
packs_per_step = 1
max_steps = 6
learning_rate = 3e-3
log_every = 1
listening_samples = 0
"""
    )
    losses = {}
    for kind in ("mel", "encoder"):
        out = tmp_path / kind
        options = ("--config", config, "--set", f"features.whisper={kind}")
        for name, *arguments in (
            ("preprocess", arabic_mini, out / "shards", "--limit", 4),
            ("train", out / "shards", out / "run"),
        ):
            result = run_command(name, *arguments, *options)
            assert result.returncode == 0, result.stderr
        assert "conditioning whisper+codes (tower of" in result.stderr
        assert ("the shards hold its states" in result.stderr) == (kind == "encoder")
        lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
        losses[kind] = [line["loss/audio_loss"] for line in lines]
    np.testing.assert_allclose(losses["encoder"], losses["mel"], rtol=2e-3)  # states are stored in float16
    assert losses["mel"][-1] < losses["mel"][0]

    result = run_command("checkpoints", "merge", tmp_path / "encoder" / "run", tmp_path / "merged")
    assert result.returncode == 0, result.stderr
    spoken = run_command(
        "speak",
        tmp_path / "merged",
        *("--reference", "tests/data/arabic-mini/spk_03_06.flac", "--reference-text", "نص", "--text", "نص آخر"),
        *("--greedy", "--max-seconds", 0.4, "--out", tmp_path / "speech.wav", "--config", config, "--json"),
    )
    assert spoken.returncode == 0, spoken.stderr
    assert json.loads(spoken.stdout)["frames"] == 10
    # The tower is part of the merged model: the Whisper checkpoint is no longer needed.
    elsewhere = run_command("checkpoints", "convert", tmp_path / "merged", tmp_path / "older", "--layout", "boson")
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert json.loads((tmp_path / "older" / "config.json").read_text())["encode_whisper_embed"] is True


@pytest.mark.slow
def test_two_ranks_read_what_one_reads(tmp_path, tiny_dir, samples, make_dataset, whisper, run_command):
    """Three packs in steps of two: in the second step one rank has an empty pack, and still takes part in every gather."""
    dataset = make_dataset(tmp_path / "shards", samples)
    settings = [
        "sequence.conditioning=whisper+codes",
        f"features.whisper_model={whisper}",
        "features.whisper_revision=",
    ]
    settings += ["train.max_references=1", "train.packs_per_step=2", "train.max_steps=4", "train.batch_tokens=1000"]
    settings += [
        "train.log_every=1",
        "train.num_workers=0",
        "train.listening_samples=1",
        "train.device=cpu",
        "lora.rank=4",
    ]
    found = {}
    for name, gpus, more in (("alone", 1, []), ("two", 2, []), ("sharded", 2, ["train.shard_base=true"])):
        options = [part for setting in [*settings, *more] for part in ("--set", setting)]
        run = tmp_path / name
        result = run_command(
            *(
                "train",
                dataset,
                run,
                "--config",
                tiny_dir / "pipeline.toml",
                "--gpus",
                gpus,
                "--skip-preflight",
                *options,
            )
        )
        assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[name] = [(line["loss/total_loss"], line["metrics/grad_norm"]) for line in lines]
        assert [line["metrics/filler_packs"] for line in lines] == [0, 1, 1, 2]
    # The first norm is 213: float32 has no five decimals there, hence the relative part.
    np.testing.assert_allclose(found["two"], found["alone"], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(found["sharded"], found["alone"], rtol=1e-6, atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_with_a_tower_uses_it_by_itself(tmp_path, tiny_dir, samples, make_dataset, tokenizer):
    """conditioning "auto": its own tower, LoRA on its projection, and codes alone where they are asked for."""
    from shards.config import read_config
    from shards.encoders.whisper_tower import WhisperSizes
    from tools.tiny.cli import tiny_config, write_model, write_tokenizer
    from train.config import TrainConfig
    from train.loop import RunOptions, train
    from train.run_folder.checkpoint_folders import complete_checkpoints

    base = tmp_path / "base"
    base.mkdir()
    sizes = WhisperSizes(width=32, num_layers=2, num_heads=4, inner=64)
    write_model(base, dataclasses.replace(tiny_config(), whisper=sizes), seed=2)
    write_tokenizer(base)
    decided = decide_conditioning(SequenceSection(), FeaturesSection(), base)
    assert (decided.name, decided.tower_dir, decided.has_projector) == ("whisper+codes", base, True)
    assert decide_conditioning(SequenceSection(conditioning="codes"), FeaturesSection(), base).tower_dir is None

    dataset = make_dataset(tmp_path / "shards", samples)
    quick = ["train.batch_tokens=2000", "train.packs_per_step=1", "train.max_steps=2", "train.num_workers=0"]
    quick += ["train.listening_samples=1"]
    losses = {}
    for conditioning in ("auto", "codes"):
        settings = [*quick, f"model.base={base}", f"sequence.conditioning={conditioning}", "lora.rank=4"]
        config = read_config(TrainConfig, tiny_dir / "pipeline.toml", settings)
        run = tmp_path / conditioning
        train(config, dataset, run, RunOptions())
        names = load_file(complete_checkpoints(run)[-1] / "adapter" / "adapter_model.safetensors").keys()
        assert any("audio_encoder_proj.linear.lora_A" in name for name in names) == (conditioning == "auto")
        assert not any("audio_tower" in name for name in names)
        losses[conditioning] = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss/audio_loss"]
    assert losses["auto"] != losses["codes"]

    without_mels = make_dataset(tmp_path / "without", [dataclasses.replace(s, reference_mel_zst=None) for s in samples])
    config = read_config(TrainConfig, tiny_dir / "pipeline.toml", [*quick, f"model.base={base}"])
    with pytest.raises((ConfigError, ShardError), match="no Whisper features"):
        train(config, without_mels, tmp_path / "never", RunOptions())
