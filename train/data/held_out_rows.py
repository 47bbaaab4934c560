"""Rows that train.validation_fraction holds out of one data set or several: whole speakers, and no audio that training hears.

In: the joined data sets and the [train] section. Out: filters of the rows trained on and of those held out. With several sets, or
where references are drawn, speakers who share a clip by the hashes of columns.npy go to one side together. Else the rows trained
on are those of the speakers left, as they always were, and held-out rows with a clip of theirs are left out: the price is
reading up to 4,096 samples a side, and behind a URL nothing is read.
"""

from __future__ import annotations

import logging

from shards.errors import ConfigError
from train.config import TrainSection
from train.data.data_sets import JoinedSets
from train.data.linked_speakers import choose_linked_speakers
from train.data.plan import CHUNK, Keep
from train.data.same_audio import without_places
from train.data.validation_overlap import heard_places
from train.data.validation_split import choose_speakers, of_speakers
from train.world import World

log = logging.getLogger("train")


def hold_out(data: JoinedSets, section: TrainSection, world: World) -> tuple[Keep, Keep]:
    """Filters of the rows trained on and of those held out by train.validation_fraction. Raises ConfigError.

    Every rank must call this."""
    seed, fraction = section.seed, section.validation_fraction
    draws = section.reference != "as_listed"
    if (len(data.sets) > 1 or draws) and (columns := data.columns()) is not None:
        speakers = choose_linked_speakers(data.index, columns, seed, fraction, data.first_rows)
        is_all_known = bool(columns["target_audio"].all() and columns["reference_audio"].all())
    else:
        speakers, is_all_known = choose_speakers(data.index, seed, fraction, data.first_rows), False
    keep, held_out = of_speakers(speakers, inside=False), of_speakers(speakers, inside=True)
    return keep, held_out if is_all_known else without_heard(data, keep, held_out, world)


def without_heard(data: JoinedSets, trained: Keep, held_out: Keep, world: World) -> Keep:
    """Of held-out speakers' rows those whose audio no row trained on has as well; the others are logged.

    Every rank must call this. The rows trained on stay what they are. Raises ConfigError where nothing would be left.
    """
    places: list[int] = []
    names: list[str] = []
    if world.is_first and not data.is_remote:
        name = ", ".join(one.location for one in data.sets)
        places, names = heard_places(name, data.reader, data.index, trained, held_out)
    places, names = world.gather((places, names))[0]
    if not places:
        return held_out
    keep = without_places(held_out, places)
    is_any_left = any(keep(data.index[start : start + CHUNK]).any() for start in range(0, len(data.index), CHUNK))
    found = (
        f"train.validation_fraction: {len(places)} samples of held-out speakers have audio that is heard in training under "
        f"another name ({'; '.join(names)})"
    )
    if not is_any_left:
        raise ConfigError(
            f"{found}, and nothing else is held out: name the speakers in the list, give each a reference of its own, or "
            "name another data set in train.validation_data"
        )
    log.warning("%s; they are not evaluated with", found)
    return keep
