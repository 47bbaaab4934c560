"""Requests side by side in an engine: they join, leave and are cancelled, and nobody hears the neighbours."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.sequence import AUDIO_OUT_BOS, Audio, Text, assemble
from tools.tiny.cli import tiny_config
from train.model.decoder import HiggsAudio
from train.model.generation.engine import Engine
from train.model.generation.key_value_cache import KeyValueCache, bucket_of
from train.model.generation.request import GREEDY, Request, Sampling
from train.model.generation.slots import COLUMNS_PER_BLOCK


@pytest.fixture(scope="module")
def model() -> HiggsAudio:
    torch.manual_seed(0)
    return HiggsAudio(tiny_config(64, 2)).eval()


def ask(seed: int, max_frames: int, sampling: Sampling = GREEDY, reference_frames: int = 7) -> Request:
    """A request with a prompt of random text and a reference of random codes."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 128000, 20 + seed % 5).astype(np.int32)
    reference = rng.integers(0, 1024, (8, reference_frames)).astype(np.uint16)
    parts = [Text(text), Audio(reference, is_target=False), Text(np.append(text[:5], AUDIO_OUT_BOS).astype(np.int32))]
    return Request(assemble(parts), max_frames, sampling)


def spoken(engine: Engine, *requests: Request) -> list[np.ndarray]:
    for request in requests:
        engine.submit(request)
    assert {id(request) for request in engine.run()} == {id(request) for request in requests}
    assert engine.num_free_slots == engine._cache.num_slots
    return [request.speech().codes for request in requests]


def test_codes_do_not_depend_on_the_neighbours(model):
    """Alone, beside others of other lengths, in another slot, and after others have left: the same codes, bit for bit."""
    sampling = Sampling(seed=5)
    (alone,) = spoken(Engine(model, 4), ask(1, 9, sampling))
    beside = spoken(
        *(Engine(model, 4), ask(2, 3), ask(3, 11, Sampling(seed=1, top_k=0), 300), ask(1, 9, sampling), ask(4, 2))
    )
    later = spoken(Engine(model, 4), *(ask(seed, 2) for seed in range(5, 9)), ask(1, 9, sampling))
    np.testing.assert_array_equal(alone, beside[2])
    np.testing.assert_array_equal(alone, later[4])
    assert alone.shape == (8, 9)


def test_equal_requests_with_other_seeds_say_other_things(model):
    first, second, greedy = spoken(
        Engine(model, 4), ask(1, 6, Sampling(seed=1)), ask(1, 6, Sampling(seed=2)), ask(1, 6)
    )
    assert (first != second).any()
    assert (first != greedy).any()


def test_a_cancelled_request_frees_its_slot_for_the_next(model):
    engine = Engine(model, 1)
    first, second, third = (engine.submit(ask(seed, frames)) for seed, frames in ((1, 4000), (2, 500), (3, 3)))
    engine.advance()
    assert engine.num_free_slots == 0
    first.cancel()
    second.cancel()  # while it waits
    (done,) = engine.run()
    assert done is third
    assert engine.num_free_slots == 1
    assert first.num_columns == 1 + COLUMNS_PER_BLOCK
    assert not first.speech().stopped
    assert first.speech().codes.shape == (8, 1)
    assert second.num_columns == 1
    assert second.speech().codes.shape == (8, 0)
    (alone,) = spoken(Engine(model, 1), ask(3, 3))
    np.testing.assert_array_equal(third.speech().codes, alone)


def test_what_comes_behind_the_end_is_dropped():
    """A block runs on after an end within it; a limit within a block cuts it there."""
    request = ask(1, 40)
    block = np.full((8, 8), 9)
    request.append(block)
    request.append(np.concatenate([block[:2], np.full((1, 8), 1025), block[:5]]))
    assert request.is_done
    assert request.stopped
    assert request.num_columns == 1 + 8 + 3
    limited = ask(1, 2)
    limited.append(block)
    limited.append(block)
    assert limited.is_done
    assert not limited.stopped
    assert limited.num_columns == limited.max_columns == 11
    assert limited.speech().codes.shape == (8, 2)


def test_the_cache_grows_by_buckets_and_keeps_what_it_holds(model):
    assert [bucket_of(n) for n in (1, 256, 257, 1000)] == [256, 256, 512, 1024]
    cache = KeyValueCache(model.config, 2, torch.float32, torch.device("cpu"))
    assert cache.reserve(200)
    assert not cache.reserve(256)
    heads, size = cache.num_heads, model.config.head_dim
    rows = torch.randn(2, heads, size)
    cache.write(1, cache.places(torch.tensor([7, 255])), rows)
    assert cache.reserve(257)
    assert cache.capacity == 512
    held = cache._rows[1].transpose(1, 2).clone()  # [S, C, 2 G, E]
    assert torch.equal(held[0, 7], rows[0])
    assert torch.equal(held[1, 255], rows[1])
    held[0, 7] = held[1, 255] = 0
    assert not held.any()


@pytest.mark.slow
def test_memory_stays_flat_over_hundreds_of_requests(model):
    """Mixed lengths through four slots: after the longest has been there, nothing grows."""

    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 1e6

    engine = Engine(model, 4)
    spoken(engine, *(ask(seed, 1 + seed % 7, Sampling(seed=seed), 1 + 13 * (seed % 23)) for seed in range(46)))
    capacity, before = engine._cache.capacity, resident_mb()
    for start in range(0, 300, 50):
        spoken(
            engine,
            *(ask(seed, 1 + seed % 7, Sampling(seed=seed), 1 + 13 * (seed % 23)) for seed in range(start, start + 50)),
        )
    assert engine._cache.capacity == capacity
    assert resident_mb() - before < 20
