"""What a run says of its plan before the first step.

In: the plan and the data sets it is of. Out: lines of the log; what is skipped, repeated or has no share is counted and named.
"""

from __future__ import annotations

import logging
from itertools import pairwise

from train.config import TrainSection
from train.data.data_sets import JoinedSets
from train.data.plan import Planner

log = logging.getLogger("train")


def log_plan(planner: Planner, section: TrainSection, total_steps: int, data: JoinedSets) -> None:
    """Its samples, packs and steps, each data set's share, and every sample that takes no part."""
    num_packs = planner.num_packs(0)
    num_tokens = planner.epoch_tokens(0)
    log.info(
        "%d samples, %d tokens: %d packs of up to %d tokens (%.1f %% full), %d steps an epoch, %d steps in all",
        planner.epoch_samples(0),
        num_tokens,
        num_packs,
        planner.settings.batch_tokens,
        100 * num_tokens / (num_packs * planner.settings.batch_tokens),
        planner.num_steps(0),
        total_steps,
    )
    for share in planner.shares(0):
        log.info("the first epoch has of %s", share)
        if not share.num_samples:
            log.warning("%s: its share is less than a sample, so none of it comes; raise its weight", share.name)
    for name, rows in zip(data.names, pairwise(data.first_rows), strict=True):
        if len(data.names) > 1 and not planner.takes_any(*rows):
            log.warning("%s: no sample of it takes part: all are too long for train.batch_tokens", name)
    if references := planner.references:
        log.info(
            "references are drawn each epoch; %d of %d samples keep the reference of the list: their speaker has no "
            "other clip",
            references.num_listed,
            references.num_trained,
        )
    fillers = planner.num_steps(0) * section.packs_per_step - num_packs
    if fillers:
        log.info("the last step of the first epoch is filled up with %d empty packs", fillers)
    if planner.num_too_long:
        rows = planner.too_long_rows
        keys = ", ".join(data.reader.key_of(data.index[row], planner.position_of(row)) for row in rows)
        keys += ", ..." if planner.num_too_long > len(rows) else ""
        log.info(
            "skipped: %d samples longer than train.batch_tokens = %d%s: %s",
            planner.num_too_long,
            section.batch_tokens,
            f" or with more targets than train.max_supervised_tokens = {section.max_supervised_tokens}"
            if section.max_supervised_tokens
            else "",
            keys,
        )
