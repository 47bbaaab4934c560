"""Short runs: one with its checkpoints, and what tests read from them; data and settings are fixtures of conftest."""

from __future__ import annotations

import json
from pathlib import Path

from shards.config import read_config
from train.config import TrainConfig
from train.loop import RunOptions, train


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total_loss"] for line in lines}


def run_with_checkpoints(run: Path, short_data: Path, tiny_dir: Path, *settings: str) -> Path:
    """Train six steps into `run`, with checkpoints of steps 2, 4 and 6 as far as train.keep_checkpoints keeps them."""
    quick = ["batch_tokens=700", "packs_per_step=2", "max_steps=6", "save_every=2", "log_every=1", "num_workers=0"]
    overrides = [f"train.{word}" for word in (*quick, "listening_samples=0", *settings)] + ["lora.rank=4"]
    train(read_config(TrainConfig, tiny_dir / "pipeline.toml", overrides), short_data, run, RunOptions())
    return run
