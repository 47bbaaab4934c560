"""Differences between systems, their intervals, and what is said about them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tools.evaluate.paired import COSINE, SHARE, compare


def simulated(rng: np.random.Generator, num_speakers: int, truth: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors and letters of two systems: voices differ in how much the second is better, sentences around that."""
    speakers = np.repeat(np.arange(num_speakers), rng.integers(3, 12, num_speakers))
    letters = rng.integers(20, 80, len(speakers)).astype(float)
    base = rng.normal(0.2, 0.05, len(speakers))
    change = truth + rng.normal(0, 0.03, num_speakers)[speakers] + rng.normal(0, 0.05, len(speakers))
    return np.stack([(base + change) * letters, letters], 1), np.stack([base * letters, letters], 1), speakers


def test_intervals_cover_the_truth_with_12_speakers():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(500):
        found = compare(*simulated(rng, 12, 0.01), lower_is_better=True, seed=seed, draws=1500)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.01 <= found.high
    assert 0.93 <= hits / 500 <= 0.97


def test_a_clear_difference_is_found_in_both_directions():
    tuned, base, speakers = simulated(np.random.default_rng(0), 12, -0.15)
    better = compare(tuned, base, speakers, lower_is_better=True)
    worse = compare(base, tuned, speakers, lower_is_better=True)
    assert (better.verdict, worse.verdict) == ("better", "worse")
    assert better.method == "bootstrap-t by speaker"
    assert better.p_worse is not None
    assert better.p_worse < 0.01
    assert worse.difference == -better.difference
    assert compare(tuned, base, speakers, lower_is_better=False).verdict == "worse"


def test_a_small_difference_says_what_size_would_tell():
    tuned, base, speakers = simulated(np.random.default_rng(0), 12, -0.005)
    found = compare(tuned, base, speakers, lower_is_better=True)
    assert found.verdict == "cannot tell"
    assert found.speakers_needed is not None
    assert found.speakers_needed > 12
    assert f"about {found.speakers_needed:,} speakers like these would tell" in found.words


def test_the_size_that_would_tell_tells_most_times():
    rng = np.random.default_rng(5)
    large = compare(*simulated(rng, 400, -0.02), lower_is_better=True, draws=50)
    needed = large.speakers_needed
    assert needed is not None
    assert 18 <= needed <= 32  # (2.8 * 0.0355 / 0.02)^2 = 25: 0.0355 is the spread of a speaker's mean
    found = [
        compare(*simulated(rng, 25, -0.02), lower_is_better=True, draws=300).verdict == "better" for _ in range(100)
    ]
    assert np.mean(found) > 0.65


def test_the_same_seed_gives_the_same_interval():
    data = simulated(np.random.default_rng(3), 12, 0.01)
    assert compare(*data, lower_is_better=True) == compare(*data, lower_is_better=True)


@pytest.mark.parametrize("num_speakers", [0, 1, 2, 4])
def test_few_speakers_get_no_verdict(num_speakers: int):
    data = simulated(np.random.default_rng(0), num_speakers, -0.5)
    found = compare(*data, lower_is_better=True)
    assert found.verdict == "cannot tell"
    assert "at least 5" in found.words
    assert (found.low is None) == (num_speakers < 2)


def test_equal_systems_are_never_better():
    _, base, speakers = simulated(np.random.default_rng(0), 12, 0.0)
    found = compare(base, base, speakers, lower_is_better=True)
    assert (found.difference, found.low, found.high, found.p_worse) == (0, 0, 0, 0.5)
    assert (found.verdict, found.speakers_needed) == ("cannot tell", None)
    assert found.words == "cannot tell at this size (12 speakers); there is no difference that more speakers would tell"


def test_one_odd_speaker_leaves_a_finite_interval():
    speakers = np.repeat(np.arange(12), 4)
    base = np.stack([np.full(48, 0.1), np.ones(48)], 1)
    tuned = base.copy()
    tuned[:4, 0] = 0.9
    found = compare(tuned, base, speakers, lower_is_better=True)
    assert found.method == "t by speaker"
    assert found.low is not None
    assert found.high is not None
    assert -1 < found.low < 0 < found.high < 1
    assert found.verdict == "cannot tell"


def test_a_metric_that_counted_nothing_is_no_verdict():
    zeros = np.zeros((6, 2))
    assert "nothing was counted" in compare(zeros, zeros, np.arange(6), lower_is_better=True).words


def by_hand(data: list[list[tuple[float, ...]]], drawn: list[int]) -> tuple[float, float]:
    """Difference and its error of these speakers, in loops: the definition, without any array."""
    total = [sum(row[column] for speaker in drawn for row in data[speaker]) for column in range(4)]
    first, second = total[0] / total[1], total[2] / total[3]
    squares = 0.0
    for speaker in drawn:
        part = sum((a - first * b) / total[1] - (c - second * d) / total[3] for a, b, c, d in data[speaker])
        squares += part * part
    return first - second, (squares * len(drawn) / (len(drawn) - 1)) ** 0.5


def test_the_interval_is_that_of_loops_over_speakers():
    tuned, base, speakers = simulated(np.random.default_rng(7), 14, 0.01)
    data = [[(*a, *b) for a, b, s in zip(tuned, base, speakers, strict=True) if s == speaker] for speaker in range(14)]
    difference, error = by_hand(data, list(range(14)))
    draw = random.Random(1)
    likely = []
    for _ in range(3000):
        again, its_error = by_hand(data, [draw.randrange(14) for _ in range(14)])
        likely.append(difference - error * (again - difference) / its_error)
    low, high = np.quantile(likely, [0.025, 0.975])
    found = compare(tuned, base, speakers, lower_is_better=True)
    assert found.difference == pytest.approx(difference, abs=1e-12)
    assert found.low == pytest.approx(low, abs=0.15 * error)
    assert found.high == pytest.approx(high, abs=0.15 * error)
    assert found.p_worse == pytest.approx(np.mean(np.array(likely) > 0), abs=0.03)
    without = [by_hand(data, [other for other in range(14) if other != speaker])[0] for speaker in range(14)]
    jackknife = (13 / 14 * sum((value - np.mean(without)) ** 2 for value in without)) ** 0.5
    assert error == pytest.approx(jackknife, rel=0.1)


def test_speakers_are_drawn_not_sentences():
    """Copies of each sentence add nothing about further speakers: the interval stays."""
    tuned, base, speakers = simulated(np.random.default_rng(2), 12, 0.02)
    once = compare(tuned, base, speakers, lower_is_better=True)
    often = compare(*(np.repeat(part, 20, axis=0) for part in (tuned, base, speakers)), lower_is_better=True)
    assert often.low == pytest.approx(once.low, abs=1e-12)
    assert often.high == pytest.approx(once.high, abs=1e-12)


def yes_or_no(first: list[float], second: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One item a speaker."""
    ones = np.ones(len(first))
    return np.stack([first, ones], 1), np.stack([second, ones], 1), np.arange(len(first))


def test_intervals_of_shares_end_where_shares_do():
    """Five of six speakers' items fail: without an end the interval would reach beyond what a difference of shares can be."""
    data = yes_or_no([1, 1, 1, 1, 1, 0], [0] * 6)
    free = compare(*data, lower_is_better=True)
    found = compare(*data, lower_is_better=True, bounds=SHARE)
    assert free.high is not None
    assert free.high > 1
    assert (found.low, found.high) == (free.low, 1)
    assert (found.verdict, found.p_worse) == (free.verdict, free.p_worse)
    flat = np.stack([[0.99, 0.99, 0.99, 0.99, -0.99], np.ones(5)], 1)
    wide = compare(flat, flat * [-1, 1], np.arange(5), lower_is_better=False, bounds=COSINE)
    assert wide.low is not None
    assert -2 < wide.low < wide.difference < 2
    assert wide.high == 2


@pytest.mark.parametrize(("num_speakers", "verdict"), [(5, "cannot tell"), (6, "worse"), (12, "worse")])
def test_shares_without_spread_have_the_sign_tests_bound(num_speakers: int, verdict: str):
    """All fail against none: five heads in a row come once in 16 throws of either side, six once in 32."""
    found = compare(*yes_or_no([1] * num_speakers, [0] * num_speakers), lower_is_better=True, bounds=SHARE)
    assert (found.method, found.verdict, found.high) == ("sign test by speaker", verdict, 1)
    assert found.p_worse == 1 - 0.5**num_speakers


def test_no_failure_of_either_is_no_proof_of_none():
    """Of 12 speakers: people who make up 27 % of all can be missed by all 12 draws."""
    found = compare(*yes_or_no([0] * 12, [0] * 12), lower_is_better=True, bounds=SHARE)
    assert (found.difference, found.p_worse, found.verdict) == (0, 0.5, "cannot tell")
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 12))
    assert found.low == pytest.approx(-(1 - 0.025 ** (1 / 12)))
    assert found.high is not None
    assert (1 - found.high) ** 12 == pytest.approx(0.025)


def test_intervals_of_failures_cover_the_truth_as_well():
    rng = np.random.default_rng(4)
    hits = 0
    for seed in range(300):
        of_speaker = rng.beta(0.8, 7.2, 12), rng.beta(2.4, 5.6, 12)  # a tenth and three tenths fail
        failed = [(rng.random((12, 6)) < share[:, None]).sum(1).astype(float) for share in of_speaker]
        first, second = (np.stack([part, np.full(12, 6.0)], 1) for part in failed)
        found = compare(first, second, np.arange(12), lower_is_better=True, bounds=SHARE, seed=seed, draws=600)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= -0.2 <= found.high
    assert 0.92 <= hits / 300 <= 0.98  # 300 draws of 95 % have a standard error of 1.3 %
