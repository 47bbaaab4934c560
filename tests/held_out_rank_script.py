"""One rank that evaluates held-out packs with a sharded model; rank 1's data fail at the second pack. See test_train_held_out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from shards.errors import PipelineError, ShardError
from train.config import LoraSection, LossSection
from train.data.source import HeldOut
from train.data.stages import FILLER, LoadedPack
from train.evaluation.held_out import Evaluation
from train.model.batch import pack
from train.model.fsdp import apply_fsdp
from train.model.lora import add_lora
from train.model.weights import load_model
from train.world import join, leave, release_frames


def main(model_dir: str, timeout_s: str) -> None:
    world = join("cpu", timedelta(seconds=float(timeout_s)))
    model = load_model(Path(model_dir), torch.float32)
    add_lora(model, LoraSection(rank=4), "base", seed=0)
    apply_fsdp(model, model.model.layers, world, bf16=False, shard_base=False)

    def loaded_packs() -> Iterator[LoadedPack]:
        for number in range(3):
            if world.rank == 1 and number == 1:
                raise ShardError("shard-000007.tar: gone")
            yield LoadedPack(pack([FILLER], [0], []), epoch=0)

    Evaluation(HeldOut(loaded_packs, max_bad_fraction=0.0), world).losses(model, LossSection())
    leave()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PipelineError as error:
        release_frames(error)
        print(f"error: {error}", file=sys.stderr)
        leave()
        sys.exit(1)
