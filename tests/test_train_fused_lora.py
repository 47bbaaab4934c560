"""Fused LoRA: peft's values and gradients, whatever is adapted, kept or recomputed, sharded or not; and what backward keeps.

Tolerances are 1e-5 of a gradient's largest value: both ways add the same numbers in another order, on AMD processors by another
library, which fp32 rounds at 6e-8 of each partial sum. Compiled: tests/test_train_compile.py.
"""

from __future__ import annotations

import logging

import pytest
import torch
from peft.tuners.lora import Linear
from torch import nn

from shards.config import SequenceSection, read_config
from shards.errors import ConfigError
from shards.sequence import SequenceBuilder
from train.config import LoraSection, LossSection, TrainConfig
from train.model import products
from train.model.batch import pack
from train.model.build import fuses_lora, prepare_blocks
from train.model.decoder import FeedForward
from train.model.fsdp import apply_fsdp, full_tensor
from train.model.fused_lora import project
from train.model.lora import add_lora, lora_parameters
from train.model.loss import LossCounts, step_losses
from train.model.weights import load_model
from train.world import ALONE, World, join, leave

PLAIN = LoraSection(rank=4, alpha=12)


@pytest.fixture(scope="module")
def batches(tokenizer, make_sample):
    builder = SequenceBuilder(tokenizer, SequenceSection())
    sequences = [builder.training(make_sample(seed, 4 + 3 * seed, 9 + 2 * seed)) for seed in range(3)]
    return [pack(group, list(range(len(group))), ["k"] * len(group)) for group in (sequences[:2], sequences[2:])]


def learned(
    model_dir,
    batches,
    fused: bool,
    section: LoraSection = PLAIN,
    recompute: bool = False,
    world: World = ALONE,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """The loss and the gradient of every trainable weight; the adapter says something from the start."""
    model = load_model(model_dir, dtype)
    add_lora(model, section, "base", seed=0)
    for name, parameter in lora_parameters(model):
        if ".lora_B." in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.fuse_lora(fused)
    prepare_blocks(model.model.layers, recompute, None)
    apply_fsdp(model, model.model.layers, world, bf16=dtype == torch.bfloat16, shard_base=False)
    model.train()
    torch.manual_seed(1)  # of dropout
    total = 0.0
    for batch in batches:
        loss = step_losses(model(batch), LossCounts.of(batches), LossSection(), ramp=1.0).total
        loss.backward()
        total += loss.item()
    found = {name: full_tensor(p.grad) for name, p in lora_parameters(model) if p.grad is not None}
    assert len(found) == len(lora_parameters(model))
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    return {"loss": torch.tensor(total), **found}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=relative * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "section",
    [
        LoraSection(rank=4, alpha=12, text_head=True),
        LoraSection(mode="audio_focused", rank=4, alpha=12, use_rslora=True),  # k is not adapted
        LoraSection(mode="attention_only", rank=4, alpha=12),  # no feed-forward network is
        LoraSection(mode="custom", targets=["audio_mlp.up_proj", "mlp.gate_proj"], rank=3, alpha=5),
    ],
    ids=["all", "audio-focused-rslora", "attention-only", "one-of-two"],
)
def test_fused_layers_learn_as_pefts_do(model_dir, batches, section):
    same(learned(model_dir, batches, True, section), learned(model_dir, batches, False, section))


def test_fused_gradients_are_the_same_recomputed(model_dir, batches):
    same(learned(model_dir, batches, True, recompute=True), learned(model_dir, batches, True), relative=0)


@pytest.mark.parametrize("onednn", [False, True])
def test_both_libraries_multiply_alike(model_dir, batches, monkeypatch, onednn):
    """Whichever this processor's maker would choose."""
    expected = learned(model_dir, batches, False)
    monkeypatch.setattr(products, "takes_onednn", lambda: onednn)
    same(learned(model_dir, batches, True), expected)


@pytest.fixture
def one_rank(monkeypatch, unused_port):
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(unused_port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield join("cpu")
    leave()


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_fused_layers_learn_as_pefts_do_sharded_over_one_rank(model_dir, batches, one_rank):
    """In bf16 too, where sharding casts LoRA: its three digits are rounded at every layer, in another place each way."""
    same(learned(model_dir, batches, True, world=one_rank), learned(model_dir, batches, False))
    both = [learned(model_dir, batches, fused, world=one_rank, dtype=torch.bfloat16) for fused in (True, False)]
    assert both[0].pop("loss").item() == pytest.approx(both[1].pop("loss").item(), rel=0.01)
    for name, gradient in both[1].items():
        assert gradient.dtype == torch.float32
        likeness = torch.cosine_similarity(both[0][name].flatten(), gradient.flatten(), dim=0).item()
        assert likeness > 0.99, f"{name}: {likeness}"


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"use_dora": True}])
def test_what_only_peft_does_is_left_to_it(model_dir, batches, options):
    """Asked to fuse, a layer with dropout or DoRA is peft's: bit by bit the same. Frozen heads may still sum otherwise."""
    section = LoraSection(rank=4, alpha=12, text_head=True, **options)
    same(learned(model_dir, batches, True, section), learned(model_dir, batches, False, section))
    model = load_model(model_dir, torch.float32)
    add_lora(model, section, "base", seed=0)
    layer, x = model.audio_lm_head, torch.randn(3, model.config.hidden_size)
    torch.manual_seed(0)
    (fused,) = project(x, (layer,), fused=True)
    torch.manual_seed(0)
    assert torch.equal(fused, layer(x))


def test_adapters_switched_off_leave_the_base(model_dir):
    model = load_model(model_dir, torch.float32)
    add_lora(model, LoraSection(rank=4), "base", seed=0)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    layer, x = model.audio_lm_head, torch.randn(3, model.config.hidden_size)
    assert isinstance(layer, Linear)
    layer.enable_adapters(False)
    (off,) = project(x, (layer,), fused=True)
    layer.enable_adapters(True)
    (on,) = project(x, (layer,), fused=True)
    assert torch.equal(off, layer.base_layer(x))
    assert (on - off).abs().max() > 1e-2


def test_the_key_refuses_in_words_or_says_what_it_did(tiny_dir, caplog):
    def decide(*settings: str, bf16: bool = False) -> bool:
        return fuses_lora(read_config(TrainConfig, tiny_dir / "pipeline.toml", settings), bf16, ALONE)

    assert decide()
    assert not decide("train.fused_lora=off")
    with pytest.raises(ConfigError, match=r'fused_lora = "on": lora\.dropout draws .*; lora\.use_dora scales'):
        decide("train.fused_lora=on", "lora.dropout=0.1", "lora.use_dora=true")
    with caplog.at_level(logging.INFO, "train"):
        assert not decide("lora.dropout=0.1")
        assert not decide(bf16=True)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "LoRA is computed layer by layer: lora.dropout draws for each layer by itself"
    assert "fp32 LoRA on a bf16 base" in second


def test_a_feed_forward_network_keeps_what_backward_needs(model_dir):
    """Rows, their products with A, gate and up: no activation, no product of the two, no second copy of the rows."""
    model = load_model(model_dir, torch.float32)
    add_lora(model, LoraSection(rank=4), "base", seed=0)
    network, num_rows, rank = model.model.layers[0].audio_mlp, 7, 4
    assert isinstance(network, FeedForward)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[bool, int] = {}
    for fused in (False, True):
        network.fuses_lora = fused
        storages: dict[int, int] = {}

        def note(x: torch.Tensor, found: dict[int, int] = storages) -> torch.Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = network(torch.randn(num_rows, model.config.hidden_size, requires_grad=True))
        kept[fused] = sum(size for place, size in storages.items() if place not in weights)
        del out
    width, inner = model.config.hidden_size, model.config.intermediate_size
    assert kept[True] == 4 * num_rows * (width + 2 * rank + 2 * inner + rank)
    assert kept[False] >= 4 * num_rows * (width + 3 * rank + 4 * inner)


def test_no_rows_are_no_rows(model_dir):
    model = load_model(model_dir, torch.float32)
    add_lora(model, LoraSection(rank=4), "base", seed=0)
    network = model.model.layers[0].mlp
    assert isinstance(network, FeedForward)
    network.fuses_lora = True
    x = torch.zeros(0, model.config.hidden_size, requires_grad=True)
    network(x).sum().backward()
    found = [p.grad for p in network.parameters() if p.requires_grad]
    assert len(found) == 6
    assert all(gradient is not None and not gradient.any() for gradient in found), (
        "every rank must reduce every gradient"
    )


def test_a_layer_with_bias_is_called_as_it_is():
    layer, x = nn.Linear(4, 3).requires_grad_(False), torch.randn(2, 4)
    assert torch.equal(project(x, (layer,), fused=True)[0], layer(x))
