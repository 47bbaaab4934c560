"""The formula of `metrics/mfu` against torch's own counter of operations, on a real forward and backward pass."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from shards.config import SequenceSection
from shards.sequence import SequenceBuilder
from train.config import LoraSection, LossSection
from train.model.batch import pack
from train.model.flops import lora_sizes_of, matmul_rate, step_flops
from train.model.lora import add_lora
from train.model.loss import LossCounts, step_losses
from train.model.weights import load_model


def test_the_formula_counts_what_the_products_cost(model_dir, tokenizer, make_sample):
    model = load_model(model_dir, torch.float32)
    add_lora(model, LoraSection(rank=4, alpha=4), "base", seed=0)
    model.train()
    builder = SequenceBuilder(tokenizer, SequenceSection())
    batch = pack([builder.training(make_sample(seed, 30, 40)) for seed in range(3)], [0, 1, 2], ["a", "b", "c"])
    section = LossSection(contrastive_loss_weight=0.0)
    with FlopCounterMode(display=False) as counter:
        step_losses(model(batch), LossCounts.of([batch]), section, ramp=1.0).total.backward()
    formula = step_flops(model.config, lora_sizes_of(model), [batch])
    # The counter does not know the CPU's fused attention; the products around it are exact.
    attention = 3.5 * 4 * model.config.num_layers * model.config.num_heads * model.config.head_dim * batch.num_attended
    products = counter.get_total_flops()
    assert 0 < attention < formula
    assert abs(formula - attention - products) / products < 0.02, (formula - attention) / products


def test_the_rate_is_that_of_a_machine():
    rate = matmul_rate(torch.device("cpu"))
    assert 1e8 < rate < 1e14
