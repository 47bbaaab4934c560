"""Which samples are held out of training: whole speakers, and the few that the listening set speaks.

In: the index, a seed and a fraction. Out: held-out speakers, row filters for the planner, and samples to listen to. Speakers
are disjoint, because a voice that was trained on says nothing about cloning a new one; the price is that the held-out share
is only near the fraction asked for.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import numpy as np

from shards.errors import CannotHoldOut, ShardError
from shards.reader import SampleReader
from shards.sample import Sample
from shards.sequence import SequenceBuilder
from train.data.plan import CHUNK, Keep
from train.data.scramble import scramble

log = logging.getLogger("train")


def choose_speakers(
    index: np.ndarray, seed: int, fraction: float, first_rows: tuple[int, ...] | None = None
) -> np.ndarray:
    """Held-out speakers [v] uint64, sorted: a pure function of the speakers' names and counts, the seed and the fraction.

    Speakers are taken in an order given by the seed, each if it brings the share nearer to the fraction; at least one is
    taken, and at least one is left of each data set (`first_rows`: where each begins, and the end; None: one). Raises
    CannotHoldOut when that cannot be.
    """
    counts: dict[int, int] = {}
    sets_of: dict[int, set[int]] = {}
    first_rows = first_rows or (0, len(index))
    for data_set, (first, end) in enumerate(itertools.pairwise(first_rows)):
        for start in range(first, end, CHUNK):
            speakers, numbers = np.unique(index[start : min(end, start + CHUNK)]["speaker"], return_counts=True)
            for speaker, number in zip(speakers.tolist(), numbers.tolist(), strict=True):
                counts[speaker] = counts.get(speaker, 0) + number
                sets_of.setdefault(speaker, set()).add(data_set)
    left = [sum(data_set in sets for sets in sets_of.values()) for data_set in range(len(first_rows) - 1)]

    def can_go(speaker: int) -> bool:
        return all(left[data_set] > 1 for data_set in sets_of[speaker])

    if len(counts) < 2:
        raise CannotHoldOut(
            fraction,
            f"the data set has only {len(counts)} speaker, and held-out speakers must be others than those trained on",
        )
    names = np.array(sorted(counts), np.uint64)
    order = np.argsort(scramble(names, seed), kind="stable")
    wanted = fraction * len(index)
    taken: list[int] = []
    total = 0
    for speaker in names[order].tolist():
        if can_go(speaker) and abs(total + counts[speaker] - wanted) < abs(total - wanted):
            taken.append(speaker)
            total += counts[speaker]
            for data_set in sets_of[speaker]:
                left[data_set] -= 1
    if not taken:  # the smallest share there is
        possible = [speaker for speaker in counts if can_go(speaker)]
        if not possible:
            raise CannotHoldOut(
                fraction,
                f"each of the {len(counts)} speakers is the only one of a data set, so holding one out would leave nothing of it "
                "to train on",
            )
        taken = [min(possible, key=lambda speaker: (counts[speaker], speaker))]
    return np.array(sorted(taken), np.uint64)


def of_speakers(speakers: np.ndarray, inside: bool) -> Callable[[np.ndarray], np.ndarray]:
    """A row filter for `Planner`: rows whose speaker is among `speakers` [v] sorted uint64, or all others."""

    def keep(rows: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(speakers, rows["speaker"]), len(speakers) - 1)
        return (speakers[place] == rows["speaker"]) == inside

    return keep


SHORT_FRAMES = 250  # ten seconds: what one wants to listen to again and again


def choose_samples(
    reader: SampleReader, index: np.ndarray, keep: Keep | None, num_samples: int, builder: SequenceBuilder
) -> list[Sample]:
    """The first sound samples that are kept: short targets first, each of another speaker if there are so many."""
    found: list[int] = []
    for start in range(0, len(index), CHUNK):
        rows = index[start : start + CHUNK]
        found += (start + np.flatnonzero(keep(rows) if keep else np.ones(len(rows), bool))).tolist()
        if len(found) >= num_samples:
            break
    rows = index[found]
    is_long = rows["target_frames"] > SHORT_FRAMES
    rows = rows[np.argsort(is_long, kind="stable")]
    is_repeated = np.ones(len(rows), bool)
    is_repeated[np.unique(rows["speaker"], return_index=True)[1]] = False
    samples: list[Sample] = []
    for row in rows[np.argsort(is_repeated, kind="stable")]:
        if len(samples) == num_samples:
            break
        try:
            sample = reader.read(row)
            builder.prompt(sample)
        except (ShardError, ValueError, IndexError) as error:
            log.warning("listening set: skipped: %s", error)
        else:
            samples.append(sample)
    return samples
