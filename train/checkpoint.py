"""Checkpoints of a run: complete or not there.

    RUN/checkpoints/checkpoint-500/
        adapter/        adapter_config.json, adapter_model.safetensors: loads with plain peft
        state/          torch.distributed.checkpoint: LoRA, optimizer, random state, position
        identity.json   what must be equal for a run to go on
        metrics.json    the last logged metrics
        config.toml     the resolved configuration
        COMPLETE        last; a folder without it is not a checkpoint

A checkpoint is written under a temporary name, synced, and renamed. The position is a step number, nothing else: the
plan is a function of it, so what the loader had read ahead does not matter.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from shards.errors import CheckpointError
from shards.manifest import read_record
from shards.writer import sync_folder, write_bytes, write_json
from train.lora import lora_parameters, save_adapter

ONLY_TRAINABLE = StateDictOptions(ignore_frozen_params=True)


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal for a run to go on: another value means another run."""

    dataset_digest: str
    model_base: str
    lora: dict[str, Any]
    seed: int
    batch_tokens: int
    packs_per_step: int
    max_supervised_tokens: int
    max_references: int
    shuffle_window: int
    order: str
    plan_version: int
    loader: str
    validation_fraction: float
    layout: str
    conditioning: str = "codes"


def save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lora_config: LoraConfig,
    identity: Identity,
    config_toml: str,
    metrics: dict[str, float],
    keep: int,
) -> Path:
    """Write checkpoint-`step` after `step` finished steps, then remove the oldest beyond `keep`."""
    folder = run_dir / "checkpoints" / f"checkpoint-{step}"
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_adapter(partial / "adapter", dict(lora_parameters(model)), lora_config)
    with _single_process():
        dcp.save(_state(model, optimizer, step), checkpoint_id=partial / "state", no_dist=True)
    write_json(partial / "identity.json", identity)
    write_json(partial / "metrics.json", metrics)
    write_bytes(partial / "config.toml", config_toml.encode())
    _sync_tree(partial)
    write_bytes(partial / "COMPLETE", b"")
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was asked to start over
    partial.replace(folder)
    sync_folder(folder.parent)
    for old in complete_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Identity) -> int:
    """Load weights, optimizer and random state; returns the number of finished steps.

    Raises CheckpointError when the checkpoint belongs to another run, naming both values, or cannot be read.
    """
    _check_identity(folder, read_record(folder / "identity.json", Identity), identity)
    state = _state(model, optimizer, 0)
    try:
        with _single_process():
            dcp.load(state, checkpoint_id=folder / "state", no_dist=True)
    except Exception as error:  # the library's reader raises its own and the file system's errors alike
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: not readable: {first_line}; remove it to go on from an older one") from error
    for name, parameter in lora_parameters(model):
        parameter.data.copy_(state["model"][name])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=ONLY_TRAINABLE)
    torch.set_rng_state(state["rng"])
    return int(state["step"])


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    folders = [path.parent for path in (run_dir / "checkpoints").glob("checkpoint-*/COMPLETE")]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, options=ONLY_TRAINABLE),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=ONLY_TRAINABLE),
        "rng": torch.get_rng_state(),
        "step": step,
    }


@contextmanager
def _single_process() -> Iterator[None]:
    """One process is what is meant here, so the library's guess that it is meant is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _check_identity(folder: Path, saved: Identity, now: Identity) -> None:
    before, after = msgspec.to_builtins(saved), msgspec.to_builtins(now)
    differing = [f"{name} was {before[name]!r}, is {after[name]!r}" for name in before if before[name] != after[name]]
    if differing:
        raise CheckpointError(
            f"{folder}: belongs to another run: {'; '.join(differing)}; restore those settings or give a new RUN folder"
        )


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
