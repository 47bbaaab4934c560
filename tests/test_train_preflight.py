"""The checks before the first step: silent on a sound run, and each of the original failure modes, put back, stops it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from misplaced_labels import MISPLACED, displaced

import shards.sequence as sequence_module
from shards.config import SequenceSection
from shards.delay_pattern import STREAM_EOS
from shards.errors import PipelineError
from shards.label_shift import IGNORE
from shards.sequence import SequenceBuilder
from train.config import LoraSection, LossSection
from train.model.batch import pack
from train.model.lora import add_lora, lora_parameters
from train.model.loss import LossCounts, step_losses
from train.model.weights import load_model
from train.preflight import check_after_first_step, check_before_training, check_vote, moved_labels


@pytest.fixture
def model(model_dir):
    model = load_model(model_dir, torch.float32)
    add_lora(model, LoraSection(rank=4, alpha=4), "base", seed=0)
    return model


@pytest.fixture(scope="module")
def learned(model_dir, tokenizer, make_sample):
    """(model, pack): a base that knows the pack by heart, so that it has a vote; no adapter."""
    torch.manual_seed(0)
    model = load_model(model_dir, torch.float32)
    model.config = dataclasses.replace(model.config, is_random=False)
    builder = SequenceBuilder(tokenizer, SequenceSection())
    batch = pack([builder.training(make_sample(seed, 5, 14)) for seed in range(3)], [0, 1, 2], ["a", "b", "c"])
    learning = [weight for name, weight in model.named_parameters() if "embed" not in name and "text" not in name]
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        step_losses(model(batch), LossCounts.of([batch]), LossSection(), ramp=1.0).total.backward()
        optimizer.step()
    return model.eval(), batch


@pytest.mark.parametrize("what", MISPLACED)
def test_the_base_votes_against_misplaced_labels(learned, what):
    model, batch = learned
    columns, said = MISPLACED[what]
    verdict = check_vote(model, displaced(batch, columns))
    assert not verdict.ok
    assert said in verdict.found
    if columns[0] == 0:
        assert "codebook 0" not in verdict.found


def test_the_base_votes_for_labels_in_their_place(learned):
    model, batch = learned
    verdict = check_vote(model, batch)
    assert verdict.ok, verdict.found
    assert "no vote" not in verdict.found
    for labels in moved_labels(batch).values():  # one and the same set of labels is asked about
        assert int((labels != IGNORE).sum()) == int((moved_labels(batch)[0] != IGNORE).sum()) > 0


def test_a_base_that_guesses_has_no_vote(learned, model_dir):
    _, batch = learned
    model = load_model(model_dir, torch.float32)
    assert "the base has random weights" in check_vote(model, batch).found
    pretrained(model)
    verdict = check_vote(model, displaced(batch, [1] * 8))
    assert verdict.ok, verdict.found
    assert "no vote in 8 codebooks" in verdict.found


@pytest.fixture(params=["clone", "as_written"])
def make_batch(request, tokenizer, make_sample):
    """A function without arguments, so that a test can break the builder first."""

    def make():
        builder = SequenceBuilder(tokenizer, SequenceSection(layout=request.param))
        return pack([builder.training(make_sample(seed, 5 + seed, 9)) for seed in range(3)], [0, 1, 2], ["a", "b", "c"])

    return make


def pretrained(model) -> None:
    """As if it were not marked random: losses as high as guessing are then a fault."""
    model.config = dataclasses.replace(model.config, is_random=False)


def test_a_sound_start_passes_and_leaves_no_trace(model, make_batch, caplog):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = [name for name, _ in lora_parameters(model)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model.train()
    with caplog.at_level("INFO", "train"):
        check_before_training(model, make_batch(), LossSection())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert [name for name, _ in lora_parameters(model)] == trainable
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("preflight ok") for line in lines) == 8
    assert [line for line in lines if line.startswith("preflight warn")] == [lines[0]]
    assert "the base has random weights" in lines[0]


def fails(model, batch, *what: str, section: LossSection | None = None) -> None:
    with pytest.raises(PipelineError) as caught:
        check_before_training(model, batch, section or LossSection())
    found = [part.split(":")[0] for part in str(caught.value).partition("trained: ")[2].split("; ")]
    assert set(what) <= set(found), caught.value


def test_unshifted_labels(model, make_batch, monkeypatch):
    def unshifted(codes):
        columns = sequence_module.delay(codes)
        return np.where(columns == 1024, IGNORE, columns)

    monkeypatch.setattr(sequence_module, "next_columns", unshifted)
    fails(model, make_batch(), "shift")


def test_unshifted_text(model, make_batch, monkeypatch):
    whole = sequence_module.assemble

    def unshifted(segments):
        sequence = whole(segments)
        shifted = np.append(np.int32(IGNORE), sequence.next_token[:-1])
        return dataclasses.replace(sequence, next_token=shifted)

    monkeypatch.setattr(sequence_module, "assemble", unshifted)
    fails(model, make_batch(), "shift")


def test_masked_end_of_speech(model, make_batch, monkeypatch):
    whole = sequence_module.next_columns
    monkeypatch.setattr(
        sequence_module, "next_columns", lambda codes: np.where(whole(codes) == STREAM_EOS, IGNORE, whole(codes))
    )
    fails(model, make_batch(), "end of speech")


def test_supervised_reference(model, make_batch, monkeypatch):
    audio = sequence_module.Audio
    monkeypatch.setattr(sequence_module, "Audio", lambda codes, is_target, whisper=None: audio(codes, True, whisper))
    fails(model, make_batch(), "end of speech")


def test_delay_pattern_off(model, make_batch, monkeypatch):
    def flat(codes):
        markers = [np.full((8, n), value, np.int16) for n, value in ((1, 1024), (8, 1025))]
        return np.concatenate([markers[0], codes.astype(np.int16), markers[1]], axis=1)

    monkeypatch.setattr(sequence_module, "delay", flat)
    fails(model, make_batch(), "delay pattern")


def test_labels_destroyed_on_second_use(model, make_batch):
    batch = make_batch()
    destroyed = dataclasses.replace(batch, audio_targets=torch.full_like(batch.audio_targets, IGNORE))
    fails(model, destroyed, "targets", "end of speech")


def test_packed_neighbours_attending_to_each_other(model, make_batch):
    batch = make_batch()
    num_rows = len(batch.positions)
    one = batch.documents._replace(bounds=torch.tensor([0, num_rows], dtype=torch.int32), longest=num_rows)
    fails(model, dataclasses.replace(batch, documents=one), "no leak")


def test_losses_as_high_as_guessing_on_a_pretrained_base(model, make_batch):
    pretrained(model)
    fails(model, make_batch(), "step-0 losses")
    with pytest.raises(
        PipelineError, match=r"near guessing, so the base was trained on something else: compare model\.base"
    ):
        check_before_training(model, make_batch(), LossSection())


def test_a_later_column_that_is_seen_early(model, make_batch, monkeypatch):
    """Attention without its causal mask."""
    import torch.nn.functional as F

    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, is_causal, **k: attend(*a, **k))
    fails(model, make_batch(), "no leak")


def test_codes_that_do_not_reach_the_model(model, make_batch):
    model.model.embed_audio_tokens.embed_audio_tokens.weight.data.zero_()
    fails(model, make_batch(), "no leak")


def test_a_group_without_gradient(model_dir, make_batch):
    model = load_model(model_dir, torch.float32)
    add_lora(model, LoraSection(rank=4, alpha=4, text_head=True), "base", seed=0)
    fails(model, make_batch(), "gradients", section=LossSection(text_loss_weight=0.0))
    check_before_training(model, make_batch(), LossSection())


def test_an_adapter_that_is_not_neutral_and_one_that_stays_so(model, make_batch):
    batch = make_batch()
    start = check_before_training(model, batch, LossSection())
    with pytest.raises(PipelineError, match="adapter after step 1: losses differ from those of the start by up to 0;"):
        check_after_first_step(model, batch, start)
    for name, parameter in lora_parameters(model):
        if ".lora_B." in name:
            parameter.data += 0.01
    check_after_first_step(model, batch, start)
    fails(model, batch, "adapter at start")


def test_a_first_step_too_small_for_bf16_is_no_fault(model_dir, make_batch, caplog):
    model = load_model(model_dir, torch.bfloat16)
    add_lora(model, LoraSection(rank=4, alpha=4), "base", seed=0)
    batch = make_batch()
    start = check_before_training(model, batch, LossSection())
    for name, parameter in lora_parameters(model):
        if ".lora_B." in name:
            parameter.data += 3e-8  # the first step of 3000 to a learning rate of 1e-4
    with caplog.at_level("INFO", "train"):
        check_after_first_step(model, batch, start)
    assert "preflight warn adapter after step 1" in caplog.messages[-1]
    assert "its weights have moved" in caplog.messages[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_starts_neutral(model_dir, make_batch, dtype):
    model = load_model(model_dir, dtype)
    add_lora(model, LoraSection(rank=4, alpha=4, use_dora=True), "base", seed=0)
    check_before_training(model, make_batch(), LossSection())


@pytest.mark.slow
def test_preflight_comes_first_and_can_be_skipped(run_command, make_dataset, make_sample, tiny_dir, tmp_path):
    """The same losses with and without; on a base that is not marked random the run stops before training."""
    dataset = make_dataset(tmp_path / "shards", [make_sample(seed) for seed in range(6)])
    options = ["--config", tiny_dir / "pipeline.toml"]
    for setting in ("train.max_steps=2", "train.listening_samples=0", "lora.dropout=0.1"):
        options += ["--set", setting]
    losses = []
    for name, flags in (("checked", ()), ("unchecked", ("--skip-preflight",))):
        result = run_command("train", dataset, tmp_path / name, *options, "--set", "train.log_every=1", *flags)
        assert result.returncode == 0, result.stderr
        assert ("preflight ok   end of speech" in result.stderr) == (name == "checked")
        assert ("preflight ok   adapter after step 1" in result.stderr) == (name == "checked")
        assert ("preflight skipped: --skip-preflight" in result.stderr) == (name == "unchecked")
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss/total_loss"] for line in lines])
    assert losses[0] == losses[1]

    base = tmp_path / "base"
    base.mkdir()
    for file in (tiny_dir / "model").iterdir():
        (base / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").unlink()
    (base / "config.json").write_text(json.dumps({**config, "random_weights": False}))
    result = run_command("train", dataset, tmp_path / "stopped", *options, "--set", f"model.base={base}")
    assert result.returncode == 1
    assert "preflight stopped the run before anything was trained: step-0 losses" in result.stderr
    assert "--skip-preflight" in result.stderr
    assert not (tmp_path / "stopped" / "metrics.jsonl").exists()
