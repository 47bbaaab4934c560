"""The ways to attend within documents. The kernel of one runs on CUDA only, so here stands in for it what torch's documentation
says that it computes, registered for the CPU under the same operator: everything around the kernel is real. The kernel
itself is compared by tests/test_gpu.py, and on the user's device before it is used.
"""

from __future__ import annotations

import logging
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from shards.config import SequenceSection
from shards.sequence import SequenceBuilder
from train.config import LoraSection, LossSection
from train.model import attention
from train.model.attention import AGREE_WITHIN, Documents, attend_separately, choose_attention, disagreement
from train.model.batch import PackedBatch, pack
from train.model.build import prepare_blocks
from train.model.lora import add_lora, lora_parameters
from train.model.loss import LossCounts, step_losses
from train.model.weights import load_model


class Kernel:
    """The operator by its formula, one document after another. Autograd is switched off in there, as in the real kernel."""

    def __init__(self) -> None:
        self.sees_all = False  # a fault: documents are one
        self.forgets_keys = False  # a fault: keys receive no gradient

    def documents(self, bounds: Tensor) -> list[slice]:
        assert bounds.dtype == torch.int32, "as the kernel demands"
        ends = bounds[[0, -1]] if self.sees_all else bounds
        return [slice(start, end) for start, end in pairwise(ends.tolist())]

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """q [n, H, E], k [n, G, E] -> [H, n, n], rows sum to 1."""
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("ihe,jhe->hij", q, k) / math.sqrt(q.shape[-1])
        later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        return scores.masked_fill(later, float("-inf")).softmax(dim=-1)

    def forward(self, q, k, v, bounds, _, longest, __, is_causal=False, scale=None, window_size=None):
        assert is_causal
        assert window_size == [-1, 0]
        assert scale is None
        assert int((bounds[1:] - bounds[:-1]).max()) == longest
        group = q.shape[1] // k.shape[1]
        out = torch.empty_like(q)
        for one in self.documents(bounds):
            weights = self.weights(q[one], k[one])
            out[one] = torch.einsum("hij,jhe->ihe", weights, v[one].repeat_interleave(group, dim=1))
        return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)

    def backward(self, grad, q, k, v, out, lse, bounds, *_, **__):
        group = q.shape[1] // k.shape[1]
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for one in self.documents(bounds):
            weights = self.weights(q[one], k[one])
            values, keys = (x[one].repeat_interleave(group, dim=1) for x in (v, k))
            of_weights = torch.einsum("ihe,jhe->hij", grad[one], values)
            of_scores = (
                weights * (of_weights - (of_weights * weights).sum(dim=-1, keepdim=True)) / math.sqrt(q.shape[-1])
            )
            dq[one] = torch.einsum("hij,jhe->ihe", of_scores, keys)
            dk[one] = torch.einsum("hij,ihe->jhe", of_scores, q[one]).unflatten(1, (-1, group)).sum(dim=2)
            dv[one] = torch.einsum("hij,ihe->jhe", weights, grad[one]).unflatten(1, (-1, group)).sum(dim=2)
        return dq, (torch.zeros_like(k) if self.forgets_keys else dk), dv


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """torch's operator on the CPU, in this process."""
    stand_in = Kernel()
    varlen._varlen_attn.register_kernel("cpu")(stand_in.forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(stand_in.backward)
    return stand_in


@pytest.fixture(scope="module")
def batches(tokenizer, make_sample) -> list[PackedBatch]:
    builder = SequenceBuilder(tokenizer, SequenceSection())
    sequences = [builder.training(make_sample(seed, 4 + 3 * seed, 9 + 2 * seed)) for seed in range(6)]
    groups = [sequences[:2], sequences[2:5], sequences[5:]]
    return [pack(group, list(range(len(group))), ["k"] * len(group)) for group in groups]


def test_the_grid_holds_every_row_at_its_place(batches):
    for batch in batches:
        documents = batch.documents
        grid = documents.padded()
        assert torch.equal(grid.to_padded.flatten()[grid.from_padded], torch.arange(len(batch.positions)))
        assert torch.equal(grid.from_padded % documents.longest, batch.positions)
        assert grid.to_padded.shape == (len(batch.keys), documents.longest)


def test_both_ways_agree_and_a_kernel_that_is_wrong_does_not(model_dir, kernel, monkeypatch):
    config = load_model(model_dir, torch.float32).config
    assert config.num_key_value_heads < config.num_heads
    assert disagreement(config, torch.device("cpu"), torch.float32) < 1e-5
    assert disagreement(config, torch.device("cpu"), torch.bfloat16) < AGREE_WITHIN

    for fault in ("sees_all", "forgets_keys"):
        with monkeypatch.context() as patch:
            patch.setattr(kernel, fault, True)
            assert disagreement(config, torch.device("cpu"), torch.float32) > 10 * AGREE_WITHIN


def losses_and_gradients(
    model_dir, batches, kind: attention.AttentionKind, backend: str | None = None, recompute: bool = False
):
    model = load_model(model_dir, torch.float32)
    model.attention = kind
    add_lora(model, LoraSection(rank=4, alpha=4), "base", seed=0)
    for name, parameter in lora_parameters(model):
        if ".lora_B." in name:  # else A would receive none
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    prepare_blocks(model.model.layers, recompute, backend)
    losses = []
    for batch in batches:
        total = step_losses(model.train()(batch), LossCounts.of(batches), LossSection(), ramp=1.0).total
        total.backward()
        losses.append(total.detach())
    return torch.stack(losses), {name: parameter.grad for name, parameter in lora_parameters(model)}


WAYS = [
    ("separate", None, False),
    ("separate", None, True),
    ("varlen", None, False),
    ("varlen", None, True),
    ("varlen", "aot_eager", False),
    ("varlen", "aot_eager", True),
]


@pytest.mark.parametrize(("kind", "backend", "recompute"), WAYS)
def test_a_model_learns_the_same_either_way(model_dir, batches, kernel, kind, backend, recompute):
    """Also as one compiled graph for all layers and pack sizes, and recomputed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected = losses_and_gradients(model_dir, batches, "padded")
    found = losses_and_gradients(model_dir, batches, kind, backend, recompute)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5 * expected[0].abs().max().item())
    for name, gradient in expected[1].items():
        assert gradient is not None
        scale = gradient.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-5 * scale, msg=name)
    if backend:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert 1 <= graphs <= 2, f"{graphs} graphs for 4 layers and 3 pack sizes"


def test_the_kernel_is_used_only_where_it_runs_and_agrees(model_dir, monkeypatch, caplog):
    config = load_model(model_dir, torch.float32).config
    cuda = torch.device("cuda")
    monkeypatch.setattr(attention.log, "propagate", True)
    assert choose_attention(config, torch.device("cpu"), torch.bfloat16, is_compiled=False) == "separate"
    assert choose_attention(config, torch.device("cpu"), torch.bfloat16, is_compiled=True) == "padded"
    assert choose_attention(config, cuda, torch.float32, is_compiled=True) == "padded", "it computes in 16 bits only"

    def fails(*_: object) -> float:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")

    for measure, kind, logged in (
        (lambda *_: 0.004, "varlen", None),
        (lambda *_: 0.3, "padded", "documents are padded, since varlen_attn is 0.3 apart"),
        (lambda *_: float("nan"), "padded", "documents are padded, since varlen_attn is nan apart"),
        (fails, "padded", "does not run here: FlashAttention only supports Ampere GPUs or newer."),
    ):
        caplog.clear()
        monkeypatch.setattr(attention, "disagreement", measure)
        with caplog.at_level(logging.WARNING, logger="train"):
            assert choose_attention(config, cuda, torch.bfloat16, is_compiled=True) == kind
        assert (logged in caplog.text) if logged else not caplog.text


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("lengths", [[1], [63, 64, 65], [2, 513], [300, 1, 129]], ids=str)
def test_documents_one_by_one_are_the_formula(heads, groups, lengths):
    """Values and gradients against softmax written out, in float64."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 8), (sum(lengths), groups, 8), (sum(lengths), groups, 8)]
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(sum(lengths), heads, 8, generator=draw, dtype=torch.float64)
    found = attend_separately(*inputs, lengths=lengths)
    expected = torch.cat([written_out(*document) for document in zip(*(x.split(lengths) for x in inputs), strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    gradients = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One document: q [n, H, E], k and v [n, G, E] -> [n, H, E]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[2] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hqk,khe->qhe", scores.softmax(dim=-1), v)


def test_gradients_of_many_chunks_are_not_rounded_one_by_one():
    """A key of a long document in bf16 is seen by 24 chunks of queries: no worse than the kernel called once."""
    draw = torch.Generator().manual_seed(0)
    exact = [torch.randn(1500, 4, 32, generator=draw).bfloat16().double().requires_grad_() for _ in range(3)]
    rough = [x.detach().bfloat16().requires_grad_() for x in exact]
    weight = torch.randn(1500, 4, 32, generator=draw).bfloat16()
    expected = torch.autograd.grad((attend_separately(*exact, lengths=[1500]) * weight.double()).sum(), exact)
    found = torch.autograd.grad((attend_separately(*rough, lengths=[1500]) * weight).sum(), rough)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        off = (ours.double() - theirs).norm() / theirs.norm()
        assert off < 0.006, "0.004-0.005 in float32 sums; 0.008 where each chunk is rounded to bf16"


def test_what_the_kernel_would_not_look_at_is_refused():
    q, k, v = (torch.randn(70, 4, 8) for _ in range(3))
    with pytest.raises(AssertionError, match="rows of no document"):
        attend_separately(q, k, v, [40])
    with pytest.raises(AssertionError, match="side by side"):
        attend_separately(torch.randn(70, 8, 4).transpose(1, 2), k, v, [70])
    with pytest.raises(Exception, match="without a word"):
        torch.compile(attend_separately, backend="eager", fullgraph=True)(q, k, v, [70])


def test_documents_go_to_a_device_whole(batches):
    moved = batches[0].to(torch.device("meta")).documents
    assert isinstance(moved, Documents)
    assert moved.order.is_meta
    assert moved.place.is_meta
    assert moved.bounds.is_meta
    assert moved.longest == batches[0].documents.longest
