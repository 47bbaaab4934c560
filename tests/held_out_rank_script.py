"""One rank that evaluates held-out packs with a sharded model; rank 1's data fail at the second pack. See test_train_held_out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from shards.errors import PipelineError, ShardError
from train.config import LoraSection, LossSection
from train.data import FILLER, Delivery
from train.held_out import Evaluation
from train.lora import add_lora
from train.packing import pack
from train.parallel import join, leave, let_go, shard
from train.weights import load_model


def main(model_dir: str, timeout_s: str) -> None:
    world = join("cpu", timedelta(seconds=float(timeout_s)))
    model = load_model(Path(model_dir), torch.float32)
    add_lora(model, LoraSection(rank=4), "base", seed=0)
    shard(model, model.model.layers, world, bf16=False, shard_base=False)

    def deliveries() -> Iterator[Delivery]:
        for number in range(3):
            if world.rank == 1 and number == 1:
                raise ShardError("shard-000007.tar: gone")
            yield Delivery(pack([FILLER], [0], []), epoch=0)

    Evaluation(deliveries, world, max_bad_fraction=0.0).losses(model, LossSection())
    leave()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PipelineError as error:
        let_go(error)
        print(f"error: {error}", file=sys.stderr)
        leave()
        sys.exit(1)
