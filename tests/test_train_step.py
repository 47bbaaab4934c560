"""One step: what it computes, what it moves, and when it stops before harm."""

from __future__ import annotations

import dataclasses
import gc

import msgspec
import pytest
import torch

from shards.config import SequenceSection, read_config
from shards.delay_pattern import NUM_CODEBOOKS, STREAM_BOS
from shards.errors import ConfigError, PipelineError
from shards.label_shift import IGNORE
from shards.sequence import SequenceBuilder
from train.config import LossSection, TrainConfig
from train.data.source import HeldOut
from train.data.stages import LoadedPack
from train.evaluation.held_out import Evaluation
from train.model.batch import pack
from train.model.lora import add_lora, lora_parameters
from train.model.loss import LossCounts
from train.model.weights import load_model
from train.optim import make_optimizer
from train.step import StepSettings, garbage_collection_paused, train_step
from train.world import ALONE


@pytest.fixture
def ready(tiny_dir, tokenizer, make_sample, short_config):
    """A model with LoRA, its optimizer and two packs."""
    config = short_config()
    model = load_model(tiny_dir / "model", torch.float32)
    add_lora(model, config.lora, "base", seed=0)
    optimizer = make_optimizer([parameter for _, parameter in lora_parameters(model)], config.train)
    builder = SequenceBuilder(tokenizer, SequenceSection())
    sequences = [builder.training(make_sample(i, 6, 7 + i)) for i in range(4)]
    batches = [pack(sequences[:1], [1], ["a"]), pack(sequences[1:], [1, 2, 3], ["b", "c", "d"])]
    return model, optimizer, batches, sequences


def test_a_step_does_not_depend_on_how_it_is_cut_into_packs(ready, tiny_dir, short_config):
    """Text and audio losses; the contrastive loss sees the pack by design, so its weight is 0 here."""
    model, optimizer, batches, sequences = ready
    section = LossSection(contrastive_loss_weight=0.0)
    two = train_step(model, optimizer, batches, StepSettings(0, 0.0, section))
    one = train_step(model, optimizer, [pack(sequences, [1, 1, 2, 3], list("abcd"))], StepSettings(0, 0.0, section))
    for name in ("total", "text", "codebooks", "grad_norm"):
        torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=1e-5, atol=1e-6)


def with_known_answers(model, batch, num_right: int):
    """The pack with the model's own likeliest codes as targets; in codebook k all but the first `num_right + k` are others."""
    with torch.no_grad():
        hidden = model.hidden(batch)[batch.text_ids.shape[0] :]
        likeliest = model.audio_logits(hidden[batch.audio_rows]).argmax(dim=-1)
    learned = batch.audio_targets != IGNORE
    rank = learned.cumsum(dim=0)  # of each target in its codebook, from 1
    wrong = rank > num_right + torch.arange(NUM_CODEBOOKS)
    targets = torch.where(wrong, (likeliest + 1) % STREAM_BOS, likeliest)
    return dataclasses.replace(batch, audio_targets=torch.where(learned, targets, IGNORE))


def test_accuracy_counts_over_all_packs_in_steps_and_held_out(ready):
    """Packs of unlike sizes: shares of packs averaged would be other numbers."""
    model, optimizer, batches, _ = ready
    known = [with_known_answers(model, batch, most) for batch, most in zip(batches, (1, 4), strict=True)]
    counts = LossCounts.of(batches).audio
    expected = [(5 + 2 * k) / int(counts[k]) for k in range(NUM_CODEBOOKS)]
    packs = [LoadedPack(batch, 0) for batch in known]
    held_out = Evaluation(HeldOut(lambda: iter(packs), 0.0), ALONE).losses(model, LossSection())
    assert [held_out[f"eval/accuracy_{k}"] for k in range(NUM_CODEBOOKS)] == pytest.approx(expected)
    assert held_out["eval/accuracy"] == pytest.approx(sum(expected) / NUM_CODEBOOKS)
    result = train_step(model, optimizer, known, StepSettings(0, 0.0, LossSection()))
    assert result
    values = result.values()
    assert [values[f"accuracy/codebook_{k}"] for k in range(NUM_CODEBOOKS)] == pytest.approx(expected)
    assert values["accuracy/audio"] == pytest.approx(sum(expected) / NUM_CODEBOOKS)


def test_the_collector_skips_what_the_imports_left():
    before = gc.get_freeze_count()
    inside = []

    def fail() -> None:
        with garbage_collection_paused():
            inside.append(gc.get_freeze_count())
            raise PipelineError("a step failed")

    with pytest.raises(PipelineError):
        fail()
    assert inside[0] > before + 10_000
    assert gc.get_freeze_count() == 0, "given back after a fault too"


def test_only_lora_moves(ready):
    model, optimizer, batches, _ = ready
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, _ in lora_parameters(model)}
    assert trainable == {name for name in before if ".lora_" in name}
    in_optimizer = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert in_optimizer == {id(parameter) for _, parameter in lora_parameters(model)}
    for step in range(2):
        train_step(model, optimizer, batches, StepSettings(step, 1e-2, LossSection()))
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name in trainable), name
        if name in trainable:
            assert parameter.dtype == torch.float32


def test_a_weight_changes_its_term_and_contrastive_reaches_lora(ready):
    model, optimizer, batches, _ = ready
    results = {}
    for name, section in {
        "all": LossSection(),
        "contrastive": LossSection(text_loss_weight=0.0, audio_loss_weight=0.0, contrastive_loss_weight=0.5),
    }.items():
        results[name] = train_step(model, optimizer, batches, StepSettings(0, 0.0, section))
    both = results["all"]
    expected = both.text + both.codebooks.mean() + 0.1 * both.contrastive
    torch.testing.assert_close(both.total, expected)
    torch.testing.assert_close(results["contrastive"].total, 0.5 * both.contrastive)
    assert results["contrastive"].grad_norm > 0
    assert LossCounts.of(batches).contrastive == 3  # the sample alone in its pack has no negative


@pytest.mark.parametrize("changed", ["text", "audio", "contrastive"])
def test_changing_one_weight_changes_that_term_alone(ready, changed):
    model, optimizer, batches, _ = ready
    before = LossSection()
    name = f"{changed}_loss_weight"
    after = msgspec.structs.replace(before, **{name: getattr(before, name) + 2.0})
    one, other = (train_step(model, optimizer, batches, StepSettings(0, 0.0, section)) for section in (before, after))
    assert one is not None
    assert other is not None
    for term in ("text", "codebooks", "contrastive"):
        torch.testing.assert_close(getattr(other, term), getattr(one, term))
    grown = {"text": one.text, "audio": one.codebooks.mean(), "contrastive": one.contrastive}[changed]
    assert grown > 0.1
    torch.testing.assert_close(
        other.total - one.total, 2.0 * grown, rtol=1e-4, atol=0
    )  # a difference of two sums in fp32
    assert other.grad_norm != one.grad_norm


def test_a_number_that_is_not_finite_stops_before_the_update(ready):
    model, optimizer, batches, _ = ready
    _, parameter = lora_parameters(model)[0]
    with torch.no_grad():
        parameter[0, 0] = float("nan")
    other = lora_parameters(model)[5][1]
    before = other.detach().clone()
    with pytest.raises(PipelineError, match=r"step 4: loss nan.*samples a, b, c, d"):
        train_step(model, optimizer, batches, StepSettings(3, 1e-2, LossSection()))
    assert torch.equal(other, before)


def test_curriculum_ramp_has_the_stated_values():
    from train.model.loss import curriculum_factor

    assert curriculum_factor(0, 100, True) == pytest.approx(0.1)
    assert curriculum_factor(50, 100, True) == pytest.approx(0.55)
    assert curriculum_factor(100, 100, True) == 1.0
    assert curriculum_factor(0, 100, False) == 1.0


def test_lora_start_does_not_change_the_model(tiny_dir, short_config, ready):
    _, _, batches, _ = ready
    model = load_model(tiny_dir / "model", torch.float32)
    with torch.no_grad():
        before = model.hidden(batches[0])
        add_lora(model, short_config().lora, "base", seed=0)
        after = model.hidden(batches[0])
    assert torch.equal(before, after)


def test_codebooks_count_by_their_weights(ready):
    """The total is their weighted mean, the reported codebooks are as before, and equal weights change no bit."""
    model, optimizer, batches, _ = ready
    weights = [4.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]

    def result(codebook_weights: list[float]):
        section = LossSection(text_loss_weight=0.0, contrastive_loss_weight=0.0, codebook_weights=codebook_weights)
        found = train_step(model, optimizer, batches, StepSettings(0, 0.0, section))
        assert found is not None
        return found

    plain, equal, weighted = result([1.0] * 8), result([3.0] * 8), result(weights)
    assert torch.equal(plain.total, equal.total)
    assert torch.equal(plain.codebooks, weighted.codebooks)
    torch.testing.assert_close(weighted.total, (plain.codebooks * torch.tensor(weights)).sum() / sum(weights))
    assert abs(weighted.total - plain.total) > 1e-4
    assert weighted.grad_norm != plain.grad_norm


@pytest.mark.parametrize("weights", ["[1, 1]", "[1, 1, 1, 1, 1, 1, 1, 0]", "[1, 1, 1, 1, 1, 1, 1, -1]", "2"])
def test_eight_weights_above_zero_are_asked_for(weights: str):
    with pytest.raises(ConfigError, match=r"loss\.codebook_weights = "):
        read_config(TrainConfig, None, [f"loss.codebook_weights={weights}"])
    read_config(TrainConfig, None, ["loss.codebook_weights=[8, 4, 2, 1, 1, 1, 1, 1]"])
