"""One rank of a run without a model: plan, loader and feed as the training loop uses them. Started by test_train_integrity.

rank_script.py DATASET MODEL STEPS OUT KEY=VALUE...     STEPS 0: one epoch; die_at=STEP: be killed there
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import msgspec

from shards.artifacts import load_tokenizer
from shards.config import SequenceSection
from shards.errors import PipelineError
from shards.sequence import SequenceBuilder
from train.config import TrainSection
from train.data.feed import Feed
from train.data.loader import LoaderShare
from train.data.planned_source import PlannedSource
from train.world import join, leave

TIMEOUT_S = 30.0


def main(dataset: str, model: str, steps: str, out: str, *options: str) -> None:
    values = dict(option.split("=") for option in options)
    die_at = int(values.pop("die_at", -1))
    section = msgspec.convert({key: json.loads(value) for key, value in values.items()}, TrainSection)
    world = join("cpu", timedelta(seconds=TIMEOUT_S))
    source = PlannedSource(dataset, section)
    source.prepare(SequenceBuilder(load_tokenizer(Path(model)), SequenceSection()))
    world.require_equal(source.facts(0))
    share = LoaderShare(world.rank, world.size, section.num_workers)
    feed = Feed(source.loaded_packs(0, share), section.packs_per_step, 0, world, source.limits())
    keys = []
    for step in range(int(steps) or source.planner.num_steps(0)):
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        given = next(feed)
        keys.append([batch.keys for batch in given.batches])
    Path(out).write_text(json.dumps({"steps": keys, **feed.values()}))
    leave()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
