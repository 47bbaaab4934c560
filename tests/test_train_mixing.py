"""Mixed data sets: shares of an epoch as asked, the same packs everywhere, and one data set planned as it always was."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError
from shards.index import INDEX_DTYPE
from train.data.mixing import Mixing
from train.data.plan import Planner, PlanSettings

# sha256 of three epochs' packs of `recorded_index`, as they were before data sets could be mixed.
RECORDED = {
    "random": "804f7db064a863dccfeca70fde877a72769bc8009dd9878a6ec6b5afe288b3c8",
    "short_to_long": "4f7d0988eee598832d1408dd8f3072c46961f8eae35fab456fc7fbd7e90b0fa3",
}


def lengths_of(rows: np.ndarray) -> np.ndarray:
    return rows["num_target_text_tokens"].astype(np.int64) + rows["target_frames"]


def recorded_index() -> np.ndarray:
    """The same 3000 rows on every machine: Philox is specified, its distributions' streams are not, so bits are used."""
    bits = np.random.Philox(key=[1, 2]).random_raw(3000)
    index = np.zeros(3000, INDEX_DTYPE)
    index["num_target_text_tokens"] = 20 + bits % 90
    index["target_frames"] = 20 + (bits >> np.uint64(10)) % 300
    index["speaker"] = (bits >> np.uint64(20)) % 7
    index["shard"] = np.arange(3000) // 64
    return index


@pytest.mark.parametrize("order", ["random", "short_to_long"])
def test_one_data_set_is_planned_as_it_always_was(order):
    asked = PlanSettings(5, 1000, 4, max_supervised_tokens=800, window_samples=700, order=order)
    planner = Planner(recorded_index(), lengths_of, asked, lambda rows: rows["speaker"] != 3)
    digest = hashlib.sha256()
    for epoch, packs in itertools.islice(planner.steps_from(0), planner.total_steps(3)):
        digest.update(repr((epoch, [pack.tolist() for pack in packs])).encode())
    assert digest.hexdigest() == RECORDED[order]


# --- several sets in one plan ---------------------------------------------------------------------------------------


def joined_index(sets: list[list[tuple[int, int]]], rows_per_shard: int = 8) -> tuple[np.ndarray, tuple[int, ...]]:
    """An index of sets of (frames, speaker) and where each set begins in it."""
    sizes = [len(rows) for rows in sets]
    index = np.zeros(sum(sizes), INDEX_DTYPE)
    index["num_target_text_tokens"] = 20
    index["target_frames"] = [frames for rows in sets for frames, _ in rows]
    index["speaker"] = [speaker for rows in sets for _, speaker in rows]
    first_rows = (0, *np.cumsum(sizes).tolist())
    numbers = [np.arange(size) // rows_per_shard for size in sizes]
    bases = np.cumsum([0] + [int(part[-1]) + 1 for part in numbers[:-1]])
    index["shard"] = np.concatenate([part + base for part, base in zip(numbers, bases, strict=True)])
    return index, first_rows


def mixed(
    index: np.ndarray, first_rows: tuple[int, ...], keep=None, seed: int = 0, window: int = 1 << 20, **asked
) -> Planner:
    names = tuple(f"set{number}" for number in range(len(first_rows) - 1))
    plan = PlanSettings(seed, 1000, 4, window_samples=window)
    return Planner(index, lengths_of, plan, keep, Mixing(names, first_rows, **asked))


def epoch_rows(planner: Planner, epoch: int) -> np.ndarray:
    windows = [planner.window(epoch, window).rows for window in range(planner.num_windows(epoch))]
    return np.sort(np.concatenate(windows))


ROWS = st.lists(st.tuples(st.integers(20, 500), st.integers(0, 5)), min_size=1, max_size=150)


@settings(max_examples=60, deadline=None)
@given(
    sets=st.lists(ROWS, min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
    speaker_temperature=st.sampled_from([1.0, 0.5, 0.0]),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
    window=st.sampled_from([16, 1 << 20]),
)
def test_shares_of_an_epoch_are_those_asked_for(sets, weights, speaker_temperature, seed, epoch, window):
    index, first_rows = joined_index(sets)
    asked = np.array(weights[: len(sets)])
    planner = mixed(
        index, first_rows, seed=seed, window=window, weights=tuple(asked), speaker_temperature=speaker_temperature
    )
    rows = epoch_rows(planner, epoch)
    frames = index["target_frames"].astype(np.int64)
    total = int(frames.sum())
    for number, (start, end) in enumerate(itertools.pairwise(first_rows)):
        own = rows[(rows >= start) & (rows < end)]
        wanted = asked[number] / asked.sum() * total
        assert abs(frames[own].sum() - wanted) <= max(0.01 * wanted, frames[start:end].max())
        copies = np.bincount(own - start, minlength=end - start)
        for speaker in np.unique(index["speaker"][start:end]):
            of_speaker = copies[index["speaker"][start:end] == speaker]
            assert of_speaker.max() - of_speaker.min() <= 1  # repeated as evenly as can be
    assert len(rows) == planner.epoch_samples(epoch)


@settings(max_examples=40, deadline=None)
@given(sets=st.lists(ROWS, min_size=1, max_size=3), epoch=st.integers(0, 3))
def test_without_weights_every_sample_comes_once(sets, epoch):
    index, first_rows = joined_index(sets)
    rows = epoch_rows(mixed(index, first_rows), epoch)
    assert rows.tolist() == list(range(len(index)))
    assert mixed(index, first_rows).shares(epoch) == []
    plain = Planner(index, lengths_of, PlanSettings(0, 1000, 4))
    assert plain.epoch_hash(epoch) == mixed(index, first_rows).epoch_hash(epoch)


def many(seed: int, size: int, speakers: int) -> list[tuple[int, int]]:
    bits = np.random.Philox(key=[seed, size]).random_raw(2 * size)
    return [(20 + int(a % 300), int(b % speakers)) for a, b in zip(bits[::2], bits[1::2], strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.7])
def test_shares_follow_hours_to_the_temperature(temperature):
    index, first_rows = joined_index([many(1, 4000, 3), many(2, 300, 3), many(3, 40, 1)])
    planner = mixed(index, first_rows, data_temperature=temperature)
    frames = index["target_frames"].astype(np.int64)
    hours = np.array([frames[start:end].sum() for start, end in itertools.pairwise(first_rows)], float)
    asked = hours**temperature / (hours**temperature).sum()
    for epoch in range(3):
        rows = epoch_rows(planner, epoch)
        found = np.array([frames[rows[(rows >= a) & (rows < b)]].sum() for a, b in itertools.pairwise(first_rows)])
        assert np.allclose(found / found.sum(), asked, rtol=0.01)
        assert abs(found.sum() / hours.sum() - 1) < 0.01  # an epoch is as long as the data


def test_speakers_have_shares_by_their_temperature_within_a_set():
    loud = [(100, 0)] * 900 + [(100, 1)] * 90 + [(100, 2)] * 10
    index, first_rows = joined_index([loud, many(4, 500, 4)])
    planner = mixed(index, first_rows, speaker_temperature=0.5)
    rows = epoch_rows(planner, 0)
    speakers = index["speaker"][rows[rows < first_rows[1]]]
    found = np.bincount(speakers.astype(int)) / len(speakers)
    roots = np.sqrt([900, 90, 10])
    assert np.allclose(found, roots / roots.sum(), atol=0.003)
    assert abs(planner.shares(0)[0].planned / planner.shares(0)[0].asked - 1) < 0.01


def test_over_epochs_a_subsampled_set_is_heard_evenly_and_anew():
    index, first_rows = joined_index([[(100, 0)] * 400, [(100, 0)] * 400])
    planner = mixed(index, first_rows, weights=(1.0, 3.0))
    epochs = [epoch_rows(planner, epoch) for epoch in range(4)]
    first = [rows[rows < 400] for rows in epochs]
    assert len(first[0]) == 200
    assert first[0].tolist() != first[1].tolist()
    heard = np.bincount(np.concatenate(first), minlength=400)
    assert heard.min() >= 1
    assert heard.max() <= 3
    other = epoch_rows(mixed(index, first_rows, seed=9, weights=(1.0, 3.0)), 0)
    assert other.tolist() != epochs[0].tolist()


@settings(max_examples=25, deadline=None)
@given(sets=st.lists(ROWS, min_size=2, max_size=3), step=st.integers(0, 30), window=st.sampled_from([16, 1 << 20]))
def test_mixed_packs_do_not_depend_on_ranks_or_where_one_starts(sets, step, window):
    index, first_rows = joined_index(sets)

    def plan() -> Planner:
        asked = {"weights": (5.0, 1.0, 1.0)[: len(sets)], "speaker_temperature": 0.5}
        return mixed(index, first_rows, window=window, **asked)

    def packs(planner: Planner, start: int, world_size: int, steps: int) -> list:
        """Packs of some steps as ranks take them, in the order of the plan."""
        each = 4 // world_size
        ranks = [planner.rank_packs(start, rank, world_size) for rank in range(world_size)]
        return [(epoch, pack.tolist()) for _ in range(steps * each) for epoch, pack in (next(rank) for rank in ranks)]

    whole = packs(plan(), 0, 1, step + 3)
    assert packs(plan(), step, 1, 3) == whole[4 * step :]
    assert packs(plan(), step, 2, 3) == packs(plan(), step, 4, 3) == whole[4 * step :]


def test_held_out_rows_never_come_however_a_set_is_repeated():
    index, first_rows = joined_index([many(1, 300, 5), many(2, 30, 5)])
    planner = mixed(index, first_rows, keep=lambda rows: rows["speaker"] != 2, weights=(1.0, 9.0))
    for epoch in range(3):
        rows = epoch_rows(planner, epoch)
        assert not (index["speaker"][rows] == 2).any()
    shares = planner.shares(0)
    assert shares[1].num_repeated > 0
    assert shares[1].most_copies > 1
    assert shares[0].num_left_out > 0
    assert "again" in str(shares[1])
    assert "wait" in str(shares[0])


def test_a_set_without_a_sample_that_fits_cannot_have_a_share():
    index, first_rows = joined_index([many(1, 30, 1), [(990, 0)] * 4])
    with pytest.raises(ConfigError, match=r"set1.*none of its samples"):
        mixed(index, first_rows, weights=(1.0, 1.0))
