"""Several ranks on gloo: the same losses, norms and adapters for any number of ranks, and any of the step's options.

Real processes by the real `train --gpus N` on CPU. Packs are made by the plan, so a global batch is the same for all.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

STEPS = 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_dataset, make_sample) -> Path:
    rng = np.random.default_rng(0)
    samples = [make_sample(seed, *rng.integers(3, 30, 2).tolist()) for seed in range(40)]
    return make_dataset(tmp_path_factory.mktemp("dataset"), samples)


@pytest.fixture(scope="module")
def train_run(dataset, tiny_dir, run_command, tmp_path_factory):
    """A function (name, gpus, settings...) -> run folder, after the real command."""

    def start(name: str, gpus: int, *settings: str, run: Path | None = None, status: int = 0) -> Path:
        folder = run or tmp_path_factory.mktemp("runs") / name
        quick = ["train.device=cpu", "train.batch_tokens=800", "train.packs_per_step=4", f"train.max_steps={STEPS}"]
        quick += ["train.log_every=1", "train.num_workers=0", "lora.rank=4", "train.learning_rate=1e-3"]
        options = [part for setting in [*quick, *settings] for part in ("--set", setting)]
        result = run_command(
            *("train", dataset, folder, "--config", tiny_dir / "pipeline.toml", "--gpus", gpus, *options),
            env={"OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == status, result.stderr
        return folder

    return start


def history(run: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss/total_loss"], line["metrics/grad_norm"]) for line in lines]


def adapter(run: Path) -> dict:
    return load_file(run / "checkpoints" / f"checkpoint-{STEPS}" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(train_run) -> Path:
    return train_run("alone", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "settings"),
    [
        (2, []),
        (4, []),
        (2, ["train.shard_base=true"]),
        (2, ["train.activation_checkpointing=full"]),
        (2, ["train.shard_base=true", "train.activation_checkpointing=full"]),
    ],
    ids=["two", "four", "two-shard-base", "two-recompute", "two-shard-base-recompute"],
)
def test_ranks_change_nothing(alone, train_run, gpus, settings):
    run = train_run("run", gpus, *settings)
    assert len(history(run)) == STEPS
    np.testing.assert_allclose(history(run), history(alone), rtol=0, atol=1e-5)
    one, other = adapter(alone), adapter(run)
    assert one.keys() == other.keys()
    for name in one:
        # AdamW divides by the root of tiny second moments; summation order shows there first.
        np.testing.assert_allclose(one[name].numpy(), other[name].numpy(), rtol=0, atol=1e-6, err_msg=name)
