"""Online best fit: lengths of samples in their order of arrival go in, packs within the budgets come out.

Best fit with few open packs, not a sorted one: sorting by length would fill packs as well but make each of them of one
length, a biased order. Budgets are tokens (memory of the layers), supervised columns (memory of the audio logits) and
references (what a Whisper tower costs).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np

from train.config import TrainSection

OPEN_PACKS = 8  # fill 97.3 / 98.7 / 99.4 % at 4k / 8k / 16k tokens; 32 open packs gain up to 0.1 (NOTES.md)
CLOSE_BELOW = 64  # tokens of room no real sample fits into
CHUNK = 1 << 16  # samples turned into Python numbers together


@dataclass(frozen=True)
class PlanSettings:
    """What decides a plan besides the index."""

    seed: int
    batch_tokens: int  # most tokens of a pack
    packs_per_step: int
    max_supervised_tokens: int = 0  # most target columns of a pack; 0 = no limit of its own
    max_references: int = 0  # most references, so most samples, of a pack; 0 = no limit
    window_samples: int = 1 << 20  # rows that are shuffled together
    order: Literal["random", "short_to_long"] = "random"  # of the first epoch; later ones are random


def best_fit(lengths: np.ndarray, supervised: np.ndarray, settings: PlanSettings) -> tuple[np.ndarray, np.ndarray]:
    """Online best fit: each sample goes into the open pack with the least room that still takes it.

    lengths, supervised [n] int64 in the order of arrival, each within the budgets -> places [n] int64 (numbers of the
    samples, pack after pack) and ends [p] int64. A plain loop, 0.75-1.5 us per sample (NOTES.md): 8 open packs are too few for
    array operations to pay.
    """
    budget = settings.batch_tokens
    most_supervised = settings.max_supervised_tokens or np.iinfo(np.int64).max
    most_samples = settings.max_references or len(lengths)
    places = np.empty(len(lengths), np.int64)
    ends: list[int] = []
    end = 0
    rooms: list[int] = []  # open packs, sorted: tokens of room * OPEN_PACKS + slot
    members: list[list[int]] = [[] for _ in range(OPEN_PACKS)]  # by slot
    supervised_room = [0] * OPEN_PACKS
    free = list(range(OPEN_PACKS))
    for start in range(0, len(lengths), CHUNK):
        stop = start + CHUNK
        chunk = zip(lengths[start:stop].tolist(), supervised[start:stop].tolist(), strict=True)
        for number, (length, columns) in enumerate(chunk, start):
            place = bisect_left(rooms, length * OPEN_PACKS)
            while place < len(rooms) and supervised_room[rooms[place] % OPEN_PACKS] < columns:
                place += 1
            if place < len(rooms):
                room, slot = divmod(rooms.pop(place), OPEN_PACKS)
            else:
                if not free:  # close the fullest
                    free.append(rooms.pop(0) % OPEN_PACKS)
                    group = members[free[-1]]
                    places[end : end + len(group)] = group
                    end += len(group)
                    ends.append(end)
                slot = free.pop()
                room, supervised_room[slot], members[slot] = budget, most_supervised, []
            group = members[slot]
            group.append(number)
            room -= length
            supervised_room[slot] -= columns
            if room < CLOSE_BELOW or len(group) == most_samples:
                places[end : end + len(group)] = group
                end += len(group)
                ends.append(end)
                free.append(slot)
            else:
                insort(rooms, room * OPEN_PACKS + slot)
    for entry in rooms:
        group = members[entry % OPEN_PACKS]
        places[end : end + len(group)] = group
        end += len(group)
        ends.append(end)
    return places, np.array(ends, np.int64)


Item = TypeVar("Item")


class OnlinePacks(Generic[Item]):
    """The same rule one sample at a time, for samples whose lengths are not known beforehand."""

    def __init__(self, settings: PlanSettings) -> None:
        self._settings = settings
        self._most_supervised = settings.max_supervised_tokens or np.iinfo(np.int64).max
        self._open: list[tuple[int, int, list[Item]]] = []  # tokens of room, supervised columns of room, samples

    def fits(self, length: int, supervised: int) -> bool:
        return length <= self._settings.batch_tokens and supervised <= self._most_supervised

    def add(self, item: Item, length: int, supervised: int) -> list[list[Item]]:
        """Put a sample that `fits` into a pack; returns the packs that this closed."""
        closed: list[list[Item]] = []
        self._open.sort(key=lambda pack: pack[0])
        place = next((i for i, pack in enumerate(self._open) if pack[0] >= length and pack[1] >= supervised), None)
        if place is not None:
            room, columns, items = self._open.pop(place)
        else:
            if len(self._open) == OPEN_PACKS:
                closed.append(self._open.pop(0)[2])  # the fullest
            room, columns, items = self._settings.batch_tokens, self._most_supervised, []
        items.append(item)
        room -= length
        if room < CLOSE_BELOW or len(items) == self._settings.max_references:
            closed.append(items)
        else:
            self._open.append((room, columns - supervised, items))
        return closed


def plan_settings(section: TrainSection) -> PlanSettings:
    assert isinstance(section.batch_tokens, int), '"auto" is settled before anything is planned'
    return PlanSettings(
        seed=section.seed,
        batch_tokens=section.batch_tokens,
        packs_per_step=section.packs_per_step,
        max_supervised_tokens=section.max_supervised_tokens,
        max_references=section.max_references,
        window_samples=section.shuffle_window,
        order=section.order,
    )
