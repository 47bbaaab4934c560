"""Drawing codes, the delay pattern, and kernels per column. Greedy speech is held against the references elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shards.config import SequenceSection
from shards.delay_pattern import STREAM_BOS, STREAM_EOS
from shards.sequence import SequenceBuilder
from tools.tiny.cli import tiny_config
from train.config import LoraSection
from train.model.batch import pack
from train.model.decoder import HiggsAudio, RMSNorm
from train.model.generate import GREEDY, Sampling, generate
from train.model.generation.audio_path import AudioPath, ModulePath, norm_of
from train.model.generation.end_of_speech import NEVER, delay_pattern, until_end
from train.model.generation.key_value_cache import KeyValueCache
from train.model.generation.products import lay_together, lie_together
from train.model.generation.sampling import Rules, draw
from train.model.generation.slots import Slots
from train.model.lora import add_lora, lora_parameters
from train.model.weights import load_model

VOCAB, BOOKS = 1026, 8
NOTHING_BEFORE = torch.full((8, 1, BOOKS), STREAM_BOS)
MOST_KERNELS = 300  # of one column with eight layers


def rules_of(*samplings: Sampling) -> Rules:
    rules = Rules(len(samplings), VOCAB, torch.device("cpu"))
    for slot, sampling in enumerate(samplings):
        rules.set(slot, sampling)
    return rules


def columns_drawn(
    logits: torch.Tensor, sampling: Sampling, count: int = 400, recent: torch.Tensor = NOTHING_BEFORE
) -> torch.Tensor:
    """logits [K, V] -> [count, K], with the numbers of the seed."""
    rules = rules_of(*[sampling] * count)
    noise = torch.rand(count, 2, BOOKS, generator=torch.Generator().manual_seed(sampling.seed))
    return draw(logits.expand(count, BOOKS, VOCAB), recent.expand(-1, count, -1), noise, rules, rules.width)


def drawn(logits: torch.Tensor, sampling: Sampling, count: int = 400) -> set[int]:
    return set(columns_drawn(logits, sampling, count).flatten().tolist())


def ladder() -> torch.Tensor:
    """[K, V]: code 0 is the likeliest, every next one half as likely."""
    return (-torch.arange(VOCAB) * torch.log(torch.tensor(2.0))).expand(BOOKS, VOCAB).clone()


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_the_beginning_of_an_audio_is_never_drawn_within_it():
    logits = torch.full((BOOKS, VOCAB), -30.0)
    logits[:, STREAM_BOS], logits[:, STREAM_EOS], logits[:, 5] = 20.0, 1.0, 1.0
    assert drawn(logits, Sampling(ras_window=0)) == {5, STREAM_EOS}
    assert logits[0, STREAM_BOS] == 20.0, "the caller's logits are left alone"
    assert drawn(logits, GREEDY, count=1) == {STREAM_BOS}, "greedy is the references' argmax"


@pytest.mark.parametrize("top_k", [0, 50])
def test_top_k_and_top_p_leave_the_likeliest(top_k: int):
    assert drawn(ladder(), Sampling(top_k=3, top_p=1.0, ras_window=0)) == {0, 1, 2}
    # 1/2 + 1/4 + 1/8 = 0.875 is still below 0.9, so the fourth is in and the fifth is not.
    assert drawn(ladder(), Sampling(top_k=top_k, top_p=0.9, ras_window=0)) == {0, 1, 2, 3}
    assert len(drawn(ladder(), Sampling(top_k=top_k, top_p=1.0, ras_window=0))) > 6


def test_codes_come_as_often_as_their_probability_says():
    shares = columns_drawn(ladder(), Sampling(top_k=0, top_p=1.0, ras_window=0), 1000).flatten().bincount() / 8000
    expected = 0.5 ** torch.arange(1, 6)
    assert (shares[:5] - expected).abs().max() < 0.02


def test_temperature_flattens():
    cold = drawn(ladder(), Sampling(temperature=0.02, top_k=0, top_p=1.0, ras_window=0))
    assert cold == {0}
    assert len(drawn(ladder(), Sampling(temperature=4.0, top_k=0, top_p=1.0, ras_window=0))) > 20


@pytest.mark.parametrize("window", [7, 12])
def test_a_code_that_fills_the_window_is_drawn_again_from_all(window: int):
    """Top-k 1 allows code 0 only; with it twice in the window, others come. Elsewhere in the books nothing changes."""
    recent = torch.full((max(8, window), 1, BOOKS), 700)
    recent[-window : 2 - window, 0, 3] = 0
    columns = columns_drawn(ladder(), Sampling(top_k=1, ras_window=window), 200, recent)
    assert set(columns[:, 3].tolist()) > {0, 1, 2}
    others = columns[:, [book for book in range(BOOKS) if book != 3]]
    assert others.unique().tolist() == [0]
    recent[-window, 0, 3] = 700
    recent[: -window or None, 0, 3] = 0
    columns = columns_drawn(ladder(), Sampling(top_k=1, ras_window=window), 200, recent)
    assert columns.unique().tolist() == [0], "once within the window, and as often as may be before it"


def test_without_a_window_nothing_is_drawn_again():
    recent = torch.zeros(8, 1, BOOKS, dtype=torch.long)
    for sampling in (Sampling(top_k=1, ras_window=0), Sampling(top_k=1, ras_window=0, ras_max_repeats=0)):
        assert columns_drawn(ladder(), sampling, 200, recent).unique().tolist() == [0]


def test_the_largest_number_stays_inside_the_chances():
    """One behind the last candidate would be a marker or no code at all."""
    logits = torch.full((BOOKS, VOCAB), float("-inf"))
    logits[:, :3] = torch.tensor([1.0, 1.0, 1.0])
    rules = rules_of(Sampling(top_k=0, top_p=1.0, ras_window=0))
    numbers = torch.full((1, 2, BOOKS), 1 - 2**-24)
    assert draw(logits[None], NOTHING_BEFORE, numbers, rules, VOCAB).max() < 3


def test_each_slot_draws_by_its_own_rules():
    samplings = [GREEDY, Sampling(top_k=1), Sampling(temperature=4.0, top_k=0, top_p=1.0, ras_window=0), Sampling()]
    rules = rules_of(*samplings)
    logits = torch.randn(4, BOOKS, VOCAB, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(4, 2, BOOKS, generator=torch.Generator().manual_seed(1))
    together = draw(logits, torch.full((8, 4, BOOKS), STREAM_BOS), noise, rules, rules.width)
    for slot, sampling in enumerate(samplings):
        alone = rules_of(sampling)
        one = draw(logits[slot : slot + 1], NOTHING_BEFORE, noise[slot : slot + 1], alone, alone.width)
        assert one.tolist() == together[slot : slot + 1].tolist()


# --- delay pattern ----------------------------------------------------------------------------------------------------


def test_staircases_are_forced_at_both_ends():
    """As the sequence builder lays them: all BOS first; after an EOS in any book, book k follows k + 1 columns later."""
    books = torch.arange(BOOKS)
    first_eos = torch.full((2,), NEVER)
    columns = []
    for number in range(1, 24):
        codes = torch.full((2, BOOKS), 7)
        if number == 12:
            codes[0, 0] = STREAM_EOS
        if number == 10:
            codes[1, 5] = STREAM_EOS
        column, first_eos = delay_pattern(codes, books, torch.tensor([number, number]), first_eos)
        columns.append(column)
    said = torch.stack(columns, dim=1)  # [2, n, K], the first is column 1
    for book in range(BOOKS):
        assert (said[0, :book, book] == STREAM_BOS).all()
        assert (said[0, book : 11 + book, book] == 7).all()
        assert (said[0, 12 + book :, book] == STREAM_EOS).all()
    assert (said[1, 9 + BOOKS :] == STREAM_EOS).all()
    assert said[1, 9].tolist() == [7] * 5 + [STREAM_EOS] + [7] * 2


def test_nothing_is_kept_behind_the_column_that_ends_all_books():
    columns = np.full((6, BOOKS), 7)
    columns[2, :-1] = STREAM_EOS  # one book still speaks
    assert until_end(columns)[0] is columns
    assert not until_end(columns)[1]
    columns[3:5] = STREAM_EOS
    kept, ends = until_end(columns)
    assert (len(kept), ends) == (4, True)


# --- products and kernels ----------------------------------------------------------------------------------------------


class KernelCount(TorchDispatchMode):
    """Counts what reaches the backend and is no view: on a GPU each would be at least one launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and "empty" not in str(func) and str(func) != "aten.detach.default":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def eight_layers() -> HiggsAudio:
    torch.manual_seed(0)
    return HiggsAudio(tiny_config(64, 8)).eval()


@pytest.mark.parametrize("num_slots", [1, 4])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_k=0)])
def test_a_column_takes_few_kernels(eight_layers: HiggsAudio, num_slots: int, sampling: Sampling):
    cache = KeyValueCache(eight_layers.config, num_slots, torch.float32, torch.device("cpu"))
    cache.reserve(200)
    slots = Slots(num_slots, BOOKS, VOCAB, torch.device("cpu"))
    for slot in range(num_slots):
        slots.join(slot, 100, sampling)
    noise = torch.rand(2, num_slots, 2, BOOKS)
    path = AudioPath(eight_layers)
    with torch.no_grad():
        slots.block(path, cache, slots.state, noise[:1], [101])  # tables are made once
        with KernelCount() as one:
            slots.block(path, cache, slots.state, noise[:1], [101])
        with KernelCount() as two:
            slots.block(path, cache, slots.state, noise, [101, 102])
    per_column = len(two.names) - len(one.names)
    products = sum("mm" in name for name in two.names) - sum("mm" in name for name in one.names)
    print(f"{per_column} kernels per column, {products} of them products")
    assert products == 8 * 4 + 1, "q, k, v; out; gate, up; down; and the head: the text network is not run"
    assert per_column <= MOST_KERNELS


@pytest.mark.parametrize("by_columns", [True, False])
def test_joined_weights_are_the_same_weights_and_cost_no_copy(eight_layers: HiggsAudio, by_columns: bool):
    attention: Any = eight_layers.model.layers[3].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    before = [weight.detach().clone() for weight in weights]
    joined = lay_together(weights, by_columns)
    strides = (joined.stride(0), joined.stride(1))
    assert strides == ((1, len(joined)) if by_columns else (joined.shape[1], 1))
    assert torch.equal(joined, torch.cat(before))
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    assert lay_together(weights, by_columns).data_ptr() == joined.data_ptr(), "laid together once"
    with torch.no_grad():
        weights[1].add_(1.0)
    assert torch.equal(joined[len(weights[0]) :][: len(weights[1])], weights[1]), "one memory"
    weights[1].data = before[1].clone()  # as a load would replace it
    assert not lie_together(weights, strides)
    assert torch.equal(lay_together(weights, by_columns), torch.cat(before))


def adapted(model: HiggsAudio) -> HiggsAudio:
    add_lora(model, LoraSection(rank=4, alpha=8), "base", seed=0)
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(lora_parameters(model)):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def test_a_norm_of_four_kernels_is_the_formula():
    norm = RMSNorm(128, 1e-5)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.3)
    row = torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(norm_of(norm, may_round=False)(row), norm(row)), "a model in training: the module's own bits"
    for scale in (1e-4, 1.0, 1e3):  # the smallest is below the floor that eps makes
        x = scale * torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
        exact = x.double() / (x.double().square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
        said = norm_of(norm, may_round=True)(x)
        torch.testing.assert_close(
            said.double(), exact.detach(), rtol=5e-7, atol=0
        )  # four roundings of 6e-8 and a sum's


@pytest.mark.parametrize("change", [lambda model: model, adapted], ids=["plain", "adapter"])
def test_the_audio_path_says_what_the_modules_say(
    model_dir, tokenizer, make_sample, change: Callable[[HiggsAudio], HiggsAudio]
):
    """Step by step through both, on the same columns."""
    model = change(load_model(model_dir, torch.float32))
    prompt = SequenceBuilder(tokenizer, SequenceSection()).prompt(make_sample(2))
    batch = pack([prompt], [0], ["p"])
    columns = torch.randint(0, 1024, (10, 1, BOOKS), generator=torch.Generator().manual_seed(0))
    said = []
    with torch.no_grad():
        for path in (AudioPath(model), ModulePath(model)):
            cache = KeyValueCache(model.config, 1, torch.float32, torch.device("cpu"))
            cache.reserve(len(prompt) + 10)
            attend = cache.prompt(0, batch.documents.order)
            model.next_logits(batch.text_ids, batch.codes, batch.positions, attend)
            positions = len(prompt) + torch.arange(10)
            said.append([path(columns[i], positions[i : i + 1], cache, len(prompt) + i + 1) for i in range(10)])
    for ours, modules in zip(*said, strict=True):
        # Sums in another order: 1e-5 of the largest logit apart with AVX-512 and this adapter, which makes rows far from small.
        torch.testing.assert_close(ours, modules, rtol=0, atol=2e-5 * modules.abs().max().item())


def test_weights_in_training_stay_where_they_are(model_dir):
    model = adapted(load_model(model_dir, torch.float32))
    places = [parameter.data_ptr() for parameter in model.parameters()]
    AudioPath(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_a_seed_fixes_what_is_said(model_dir, tokenizer, make_sample):
    model = load_model(model_dir, torch.float32)
    prompt = SequenceBuilder(tokenizer, SequenceSection()).prompt(make_sample(1))

    def said(seed: int) -> list[int]:
        return generate(model, prompt, 5, Sampling(seed=seed)).codes.flatten().tolist()

    assert said(3) == said(3)
    assert said(3) != said(4)
    longer = generate(model, prompt, 12, Sampling(seed=3)).codes
    np.testing.assert_array_equal(longer[:, :5].flatten(), said(3))
