"""Compiled blocks: the same losses and gradients as eager ones, not zero, one graph for all layers and pack sizes.

torch 2.11 gives zero gradients without a word for some custom functions under compile, hence the second condition.
"""

from __future__ import annotations

import pytest
import torch

from shards.config import SequenceSection
from shards.sequence import SequenceBuilder
from train.config import LoraSection, LossSection
from train.data.stages import FILLER
from train.model.batch import pack
from train.model.build import prepare_blocks
from train.model.decoder import DecoderLayer, WhisperEmbeddings
from train.model.lora import add_lora, lora_parameters
from train.model.loss import LossCounts, step_losses
from train.model.weights import load_model


@pytest.fixture(scope="module")
def batches(tokenizer, make_sample):
    builder = SequenceBuilder(tokenizer, SequenceSection())
    sequences = [builder.training(make_sample(seed, 4 + 3 * seed, 9 + 2 * seed)) for seed in range(6)]
    groups = [sequences[:2], sequences[2:5], sequences[5:]]
    return [pack(group, list(range(len(group))), ["k"] * len(group)) for group in groups]


def gradients(model_dir, batches, recompute: bool, compiled: bool) -> dict[str, torch.Tensor]:
    model = load_model(model_dir, torch.float32)
    add_lora(model, LoraSection(rank=4, alpha=4), "base", seed=0)
    for name, parameter in lora_parameters(model):
        if ".lora_B." in name:  # else A would receive none
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.fuse_lora(compiled)  # as a run does; what it is compared with is peft's own way
    prepare_blocks(model.model.layers, recompute, "aot_eager" if compiled else None)
    model.train()
    for batch in batches:
        step_losses(model(batch), LossCounts.of(batches), LossSection(), ramp=1.0).total.backward()
    found = {name: parameter.grad for name, parameter in lora_parameters(model)}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())
    return found  # pyright: ignore[reportReturnType]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_gradients_equal_eager_ones(model_dir, batches, recompute):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected = gradients(model_dir, batches, recompute=False, compiled=False)
    found = gradients(model_dir, batches, recompute, compiled=True)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale, msg=name)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2, f"{graphs} graphs for 4 layers and 3 pack sizes"


def test_every_situation_of_a_run_has_its_graph(model_dir, batches):
    torch._dynamo.reset()
    model = load_model(model_dir, torch.float32)
    add_lora(model, LoraSection(rank=4), "base", seed=0)
    prepare_blocks(model.model.layers, False, "eager")
    packs = [batches[0], batches[2], pack([FILLER], [0], [])]  # several documents, one, none
    for recompute in (False, True):
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            layer.recomputes = recompute
        for batch in packs:
            step_losses(model.train()(batch), LossCounts.of([batch]), LossSection(), ramp=1.0).total.backward()
    with torch.no_grad():
        for batch in packs:
            model.eval()(batch)


def test_with_a_projection_the_first_layer_compiles_like_others(model_dir, batches):
    model = load_model(model_dir, torch.float32)
    add_lora(model, LoraSection(rank=4), "base", seed=0)
    embeddings = torch.zeros(1, model.config.hidden_size, requires_grad=True)
    found = []
    model.model.layers[0].register_forward_pre_hook(lambda _, given: found.extend(given[:2]))
    batch = batches[0]
    whisper = WhisperEmbeddings(torch.zeros(1, dtype=torch.long), embeddings)
    model.model.train()(
        batch.text_ids, batch.codes, batch.positions, batch.documents.padded(), whisper
    ).sum().backward()
    assert [rows.requires_grad for rows in found] == [True, True]
    assert embeddings.grad is not None
    assert embeddings.grad.abs().max() > 0


def test_recomputed_gradients_equal_kept_ones(model_dir, batches):
    expected = gradients(model_dir, batches, recompute=False, compiled=False)
    found = gradients(model_dir, batches, recompute=True, compiled=False)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0, msg=name)
