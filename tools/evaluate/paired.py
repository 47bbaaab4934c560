"""Is one system better than another: paired by item, resampled by speaker, with an interval and a verdict in words.

In: per item and draw the two systems' values as (numerator, denominator), and its speaker. Out: `Comparison`. Sentences of
one voice are not independent, so speakers are drawn, not sentences, and never speakers of one system only. The plain
percentile bootstrap covers too little with a dozen speakers, so it is studentised: each draw's difference is divided by
its own cluster-robust error (bootstrap-t: Efron 1981; for few clusters: Cameron, Gelbach and Miller, "Bootstrap-based
improvements for inference with clustered errors", Review of Economics and Statistics 90(3), 2008). With fewer than ten, or
where draws have no spread of their own, it is Student's t with one degree of freedom less than speakers (Cameron and Miller,
"A practitioner's guide to cluster-robust inference", Journal of Human Resources 50(2), 2015). Of shares all speakers may have
the same difference (no failure at all, say), which is no proof that the next one will: then the sign test's bound holds, up to
2.5 % of such samples miss a share 1 - 0.025^(1/n) of people who are otherwise. `method` says which. An interval ends where the
metric does (a difference of shares at -1 and 1): what lies beyond cannot be true, so cutting it off costs no coverage.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np

DRAWS = 10_000
CELLS = 2_000_000  # of speakers times draws held at once
MIN_SPEAKERS = 5  # below, an interval is shown but no verdict
MIN_FOR_BOOTSTRAP = (
    10  # below, draws of nearly equal speakers have next to no error of their own, and quotients explode
)
DEGENERATE_SHARE = 0.01  # of draws without a spread of their own; above, Student's t takes over
WIDEST = 3.0  # times Student's t interval; a wider one has exploded as well
NO_SPREAD = 1e-9  # of a difference's error: what rounding leaves of 0
POWER = 1.959964 + 0.841621  # standard errors away from 0 for a 95 % interval to exclude it 80 times in 100


Method = Literal["bootstrap-t by speaker", "t by speaker", "sign test by speaker"]


class Bounds(msgspec.Struct, frozen=True):
    """What a metric's value can be, and whether it is a share of yes and no."""

    lowest: float = -math.inf
    highest: float = math.inf
    is_share: bool = False


ERROR_RATE = Bounds(0.0)
COSINE = Bounds(-1.0, 1.0)
SHARE = Bounds(0.0, 1.0, is_share=True)
MOS_DIFFERENCE = Bounds(-4.0, 4.0)  # of two grades from 1 to 5


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """`difference` = first minus second, in the metric's own unit."""

    difference: float
    low: float | None  # of the 95 % interval; None with fewer than two speakers
    high: float | None
    p_worse: float | None  # how likely the first is worse
    num_items: int
    num_speakers: int
    speakers_needed: int | None  # that would tell a difference of this size, 80 times in 100; None: no size would
    method: Method | Literal["none"]
    verdict: Literal["better", "worse", "cannot tell"]
    words: str


def compare(
    first: np.ndarray,
    second: np.ndarray,
    speakers: np.ndarray,
    *,
    lower_is_better: bool,
    bounds: Bounds = Bounds(),  # noqa: B008 - frozen
    seed: int = 0,
    draws: int = DRAWS,
) -> Comparison:
    """Compare two systems on the same items. `bounds`: of a system's value.

    `first`, `second`: [n, 2] float64, numerator and denominator of each item (errors and letters; a mean has denominator 1).
    `speakers`: [n], any kind that sorts. A system's value is its sum of numerators over its sum of denominators.
    """
    _, cluster = np.unique(speakers, return_inverse=True)
    num_speakers = int(cluster.max()) + 1 if len(cluster) else 0
    sums = np.zeros((num_speakers, 4))
    np.add.at(sums, cluster, np.hstack([first, second]))
    facts = {"num_items": len(first), "num_speakers": num_speakers}
    total = sums.sum(0)
    if num_speakers < 2 or not (total[[1, 3]] > 0).all():
        why = "nothing was counted" if num_speakers > 1 else f"{num_speakers} speaker{'s' * (num_speakers != 1)}"
        return Comparison(
            difference=float(_difference(total)) if (total[[1, 3]] > 0).all() else 0.0,
            low=None,
            high=None,
            p_worse=None,
            speakers_needed=None,
            method="none",
            verdict="cannot tell",
            words=f"cannot tell: {why}; at least {MIN_SPEAKERS} speakers are needed",
            **facts,
        )
    difference, error = _estimate(np.ones((1, num_speakers)), sums)
    difference, error = float(difference[0]), float(error[0])
    widest = bounds.highest - bounds.lowest  # of a difference, to either side
    if bounds.is_share and error < NO_SPREAD:
        method, low, high, p_above = "sign test by speaker", *_without_spread(difference, num_speakers, widest)
    else:
        method, likely = _distribution(sums, difference, error, seed, draws)
        low, high = (float(x) for x in np.quantile(likely, [0.025, 0.975]))
        p_above = float((likely > 0).mean() + (likely == 0).mean() / 2)
    low, high = max(low, -widest), min(high, widest)
    p_worse = p_above if lower_is_better else 1 - p_above
    needed = speakers_needed(difference, error, num_speakers)
    verdict, words = _verdict(difference, low, high, num_speakers, needed, lower_is_better)
    return Comparison(
        difference=difference,
        low=low,
        high=high,
        p_worse=p_worse,
        speakers_needed=needed,
        method=method,
        verdict=verdict,
        words=words,
        **facts,
    )


def _difference(sums: np.ndarray) -> np.ndarray:
    """sums [..., 4] -> first ratio minus second ratio [...]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]


def _estimate(weights: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """weights [B, G], how often each speaker is drawn; sums [G, 4] -> difference [B] and its cluster-robust error [B].

    The error comes from the ratios' linear part: a speaker's share in the difference is (numerator - ratio * denominator)
    over the total denominator, for the first system less the second's; their squares are summed, times G / (G - 1).
    """
    num_speakers = weights.shape[1]
    total = weights @ sums  # [B, 4]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_1, ratio_2 = total[:, 0] / total[:, 1], total[:, 2] / total[:, 3]
        part = (sums[:, 0] - ratio_1[:, None] * sums[:, 1]) / total[:, 1, None]
        part -= (sums[:, 2] - ratio_2[:, None] * sums[:, 3]) / total[:, 3, None]  # [B, G]
        variance = (weights * part**2).sum(1) * num_speakers / (num_speakers - 1)
    return ratio_1 - ratio_2, np.sqrt(variance)


def _without_spread(difference: float, num_speakers: int, widest: float) -> tuple[float, float, float]:
    """(low, high, P(above 0)) of a share's difference that is the same of every speaker: others may be at either end."""
    missed = 1 - 0.025 ** (1 / num_speakers)
    sign = 0.5 if difference == 0 else 1 - 0.5**num_speakers if difference > 0 else 0.5**num_speakers
    return difference - missed * (difference + widest), difference + missed * (widest - difference), sign


def _distribution(
    sums: np.ndarray, difference: float, error: float, seed: int, draws: int
) -> tuple[Literal["bootstrap-t by speaker", "t by speaker"], np.ndarray]:
    """[draws] values the true difference may have: quantiles are interval ends, shares are probabilities."""
    num_speakers = len(sums)
    rng = np.random.default_rng(seed)
    student = difference + error * rng.standard_t(num_speakers - 1, size=draws)
    if num_speakers < MIN_FOR_BOOTSTRAP or error == 0:
        return "t by speaker", student
    estimates = []
    for start in range(0, draws, max(1, CELLS // num_speakers)):
        size = min(draws - start, max(1, CELLS // num_speakers))
        weights = rng.multinomial(num_speakers, np.full(num_speakers, 1 / num_speakers), size=size)
        estimates.append(_estimate(weights.astype(np.float64), sums))
    drawn, errors = (np.concatenate(parts) for parts in zip(*estimates, strict=True))
    sound = np.isfinite(drawn) & (errors > 1e-9 * error)
    likely = difference - error * (drawn[sound] - difference) / errors[sound]
    if sound.mean() < 1 - DEGENERATE_SHARE or _width(likely) > WIDEST * _width(student):
        return "t by speaker", student
    return "bootstrap-t by speaker", likely


def _width(likely: np.ndarray) -> float:
    low, high = np.quantile(likely, [0.025, 0.975])
    return float(high - low)


def speakers_needed(difference: float, error: float, num_speakers: int) -> int | None:
    """Speakers like these at which a difference of this size would be told from 0, 80 times in 100."""
    if difference == 0 or not math.isfinite(error):
        return None
    return max(MIN_SPEAKERS, math.ceil(num_speakers * (POWER * error / difference) ** 2))


def _verdict(
    difference: float, low: float, high: float, num_speakers: int, needed: int | None, lower_is_better: bool
) -> tuple[Literal["better", "worse", "cannot tell"], str]:
    enough = (
        f"about {needed:,} speakers like these would tell a difference of this size"
        if needed
        else "there is no difference that more speakers would tell"
    )
    if num_speakers < MIN_SPEAKERS:
        return "cannot tell", f"cannot tell with {num_speakers} speakers; at least {MIN_SPEAKERS} are needed"
    if low <= 0 <= high:
        return "cannot tell", f"cannot tell at this size ({num_speakers} speakers); {enough}"
    is_better = (difference < 0) == lower_is_better
    return ("better", "better") if is_better else ("worse", "worse")
