"""Blocks of columns that are recorded and replayed: the same codes as without. A CPU records by running the block again; what
only a CUDA graph can show is in test_gpu.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from shards.sequence import AUDIO_OUT_BOS, Audio, Text, assemble
from tools.tiny.cli import tiny_config
from train.model.decoder import HiggsAudio
from train.model.generation.engine import Engine
from train.model.generation.request import GREEDY, Request, Sampling

MANY = [(1, 40, GREEDY), (2, 9, Sampling(seed=3)), (3, 30, Sampling(seed=1, top_k=0, ras_window=20)), (4, 5, GREEDY)]


@pytest.fixture(scope="module")
def model() -> HiggsAudio:
    torch.manual_seed(0)
    return HiggsAudio(tiny_config(64, 2)).eval()


class Recorder:
    """Runs a block again for each replay, and keeps count of both."""

    def __init__(self) -> None:
        self.num_recordings = self.num_replays = 0

    def __call__(self, block: Callable[[], None]) -> Callable[[], None]:
        self.num_recordings += 1

        def replay() -> None:
            self.num_replays += 1
            block()

        return replay


def ask(seed: int, max_frames: int, sampling: Sampling) -> Request:
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 128000, 20 + seed % 5).astype(np.int32)
    reference = rng.integers(0, 1024, (8, 7)).astype(np.uint16)
    parts = [Text(text), Audio(reference, is_target=False), Text(np.append(text[:5], AUDIO_OUT_BOS).astype(np.int32))]
    return Request(assemble(parts), max_frames, sampling)


def codes_of(engine: Engine) -> list[np.ndarray]:
    requests = [engine.submit(ask(*one)) for one in MANY]
    for _ in engine.run():
        pass
    return [request.speech().codes for request in requests]


def test_replayed_blocks_give_the_same_codes(model):
    """Requests join and leave meanwhile, with rules of three widths and a window that grows."""
    recorder = Recorder()
    with torch.no_grad():
        expected, replayed = codes_of(Engine(model, 2)), codes_of(Engine(model, 2, record=recorder))
    for one, other in zip(expected, replayed, strict=True):
        np.testing.assert_array_equal(one, other)
    assert 1 < recorder.num_recordings < recorder.num_replays, "most blocks are replays of an older recording"


def test_a_block_is_recorded_anew_where_tensors_moved(model):
    recorder = Recorder()
    engine = Engine(model, 2, record=recorder)
    for max_frames, expected in (
        (20, 1),
        (20, 1),
        (400, 2),
    ):  # 400 frames do not fit into the first bucket of the cache
        request = engine.submit(ask(1, max_frames, GREEDY))
        engine.advance()
        request.cancel()
        assert recorder.num_recordings == expected


def test_what_is_recorded_stays_when_a_request_joins(model):
    """A request that joins changes the state in place; a replay must not see that twice, nor lose it."""
    recorder = Recorder()
    engine = Engine(model, 2, record=recorder)
    first = engine.submit(ask(1, 30, GREEDY))
    engine.advance()
    second = engine.submit(ask(5, 12, GREEDY))
    for _ in engine.run():
        pass
    plain = Engine(model, 2)
    alone = [plain.submit(ask(1, 30, GREEDY)), plain.submit(ask(5, 12, GREEDY))]
    for _ in plain.run():
        pass
    for one, other in zip((first, second), alone, strict=True):
        np.testing.assert_array_equal(one.speech().codes, other.speech().codes)
