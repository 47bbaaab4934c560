"""What only a CUDA device can show: its attention kernel, compiled bf16 steps against fp32 ones on the CPU, no hidden waiting for
the GPU, and the command itself. Skipped elsewhere; a session that has a GPU runs `pytest -m gpu`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.config import SequenceSection, read_config
from shards.sequence import SequenceBuilder
from train.config import LoraSection, LossSection, TrainConfig
from train.loop import RunOptions, train
from train.model.attention import AGREE_WITHIN, choose_attention, disagreement
from train.model.batch import PackedBatch, pack
from train.model.build import prepare_blocks
from train.model.config import ModelConfig
from train.model.decoder import HiggsAudio
from train.model.fsdp import apply_fsdp, full_tensor
from train.model.generate import generate
from train.model.lora import add_lora, lora_parameters
from train.model.loss import LossCounts, step_losses
from train.model.weights import load_model
from train.world import join, leave

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def batches(tokenizer, make_sample) -> list[PackedBatch]:
    builder = SequenceBuilder(tokenizer, SequenceSection())
    sequences = [builder.training(make_sample(seed, 20 + 3 * seed, 30 + 5 * seed)) for seed in range(8)]
    groups = [sequences[:3], sequences[3:7], sequences[7:]]
    return [pack(group, list(range(len(group))), ["k"] * len(group)) for group in groups]


@pytest.fixture
def world():
    yield join("cuda")
    leave()


def ready(model_dir: Path, device: torch.device, dtype: torch.dtype) -> HiggsAudio:
    """With an adapter that says something."""
    model = load_model(model_dir, dtype, device)
    model.attention = choose_attention(model.config, device, dtype, is_compiled=False)
    add_lora(model, LoraSection(rank=8, alpha=8), "base", seed=0)
    for name, parameter in lora_parameters(model):
        if ".lora_B." in name:
            start = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data.copy_(start)
    return model.train()


def learn(model: HiggsAudio, batches: list[PackedBatch], device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for batch in batches:
        loss = step_losses(model(batch.to(device)), LossCounts.of(batches), LossSection(), ramp=1.0).total
        loss.backward()
        total += loss.item()
    gradients = {name: full_tensor(p.grad).float().cpu() for name, p in lora_parameters(model) if p.grad is not None}
    return total, gradients


@pytest.mark.parametrize("heads", [(24, 8, 128), (8, 4, 64), (4, 4, 16)])
def test_the_kernel_agrees_with_the_padded_way(heads):
    num_heads, num_key_value_heads, head_dim = heads
    config = ModelConfig(64, 128, 2, num_heads, num_key_value_heads, head_dim, is_random=True)
    assert disagreement(config, DEVICE, torch.bfloat16) <= AGREE_WITHIN
    assert choose_attention(config, DEVICE, torch.bfloat16, is_compiled=True) == "varlen"


@pytest.mark.parametrize(("compiled", "recompute"), [(False, False), (True, False), (True, True)])
def test_bf16_steps_on_the_gpu_learn_as_fp32_on_the_cpu(model_dir, batches, world, compiled, recompute):
    """As `train.model.build` makes the model: sharded over one rank, so that LoRA computes in bf16 from fp32 masters."""
    torch._dynamo.reset()
    expected, expected_gradients = learn(
        ready(model_dir, torch.device("cpu"), torch.float32), batches, torch.device("cpu")
    )
    model = ready(model_dir, DEVICE, torch.bfloat16)
    assert model.attention == "varlen"
    prepare_blocks(model.model.layers, recompute, "inductor" if compiled else None)
    apply_fsdp(model, model.model.layers, world, bf16=True, shard_base=False)
    found, gradients = learn(model, batches, DEVICE)
    assert all(parameter.dtype == torch.float32 for _, parameter in lora_parameters(model))
    assert found == pytest.approx(expected, rel=0.02)  # bf16 has three digits, and rounds at every layer
    for name, gradient in expected_gradients.items():
        likeness = torch.cosine_similarity(gradients[name].flatten(), gradient.flatten(), dim=0).item()
        assert likeness > 0.98, f"{name}: {likeness}"


def test_forward_and_backward_never_wait_for_the_gpu(model_dir, batches):
    model = ready(model_dir, DEVICE, torch.bfloat16)
    counts = LossCounts.of(batches)
    counts = dataclasses.replace(counts, audio=counts.audio.to(DEVICE))  # as the feed does, before the step
    given = [batch.to(DEVICE) for batch in batches]
    for batch in given:  # the first steps allocate
        step_losses(model(batch), counts, LossSection(), ramp=1.0).total.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in given:
            step_losses(model(batch), counts, LossSection(), ramp=1.0).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_greedy_speech_is_the_same_on_both(model_dir, tokenizer, make_sample):
    prompt = SequenceBuilder(tokenizer, SequenceSection()).prompt(make_sample(3))
    here, there = (generate(load_model(model_dir, torch.float32, d), prompt, 40).codes for d in ("cpu", DEVICE))
    np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_say_what_plain_blocks_say(model_dir, tokenizer, make_sample, dtype):
    from train.model.generation.block_graph import record_cuda
    from train.model.generation.engine import Engine
    from train.model.generation.request import GREEDY, Request, Sampling

    model = load_model(model_dir, dtype, DEVICE)
    builder = SequenceBuilder(tokenizer, SequenceSection())
    samplings = [GREEDY, Sampling(seed=1), Sampling(seed=2, top_k=0), GREEDY, Sampling(seed=4)]
    said = []
    for record in (None, record_cuda):
        engine = Engine(model, 2, record=record)
        sizes = [(builder.prompt(make_sample(3 + n)), 40 + 200 * (n == 3), one) for n, one in enumerate(samplings)]
        requests = [engine.submit(Request(*size)) for size in sizes]
        for _ in engine.run():
            pass
        said.append([request.speech().codes for request in requests])
    for plain, recorded in zip(*said, strict=True):
        np.testing.assert_array_equal(plain, recorded)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_dataset, make_sample) -> Path:
    samples = [make_sample(seed, 10 + seed % 9, 12 + seed % 11) for seed in range(48)]
    return make_dataset(tmp_path_factory.mktemp("dataset"), samples)


def test_the_command_trains_goes_on_and_finds_its_budget(dataset, tiny_dir, tmp_path):
    settings = ["train.batch_tokens=auto", "train.packs_per_step=2", "train.max_steps=8", "train.save_every=4"]
    settings += ["train.log_every=1", "train.listening_samples=1", "train.eval_every=4", "lora.rank=4"]
    config = read_config(
        TrainConfig, tiny_dir / "pipeline.toml", [*settings, "train.device=cuda", "train.shard_base=true"]
    )
    run = tmp_path / "run"
    train(config, dataset, run, RunOptions())
    whole_run = losses(run)
    (run / "checkpoints/checkpoint-8/COMPLETE").unlink()
    train(config, dataset, run, RunOptions())
    assert list(losses(run)) == list(range(1, 9))
    # Sums on a GPU add in no fixed order, so a resumed run is near, not equal.
    np.testing.assert_allclose(list(losses(run).values()), list(whole_run.values()), rtol=5e-3)
    assert whole_run[8] < whole_run[1]
    log = (run / "logs" / "training.log").read_text()
    assert "was found: a step of the heaviest pack takes" in log
    assert len(list((run / "listening").glob("*/step-*.wav"))) == 3


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total_loss"] for line in lines}
