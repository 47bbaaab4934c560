"""Checkpoints of a run: complete or not there, written beside training.

    RUN/checkpoints/checkpoint-500/
        adapter/        adapter_config.json, adapter_model.safetensors: loads with plain peft
        state/          torch.distributed.checkpoint: LoRA, optimizer, position
        identity.json   what must be equal for a run to go on
        metrics.json    the last logged metrics
        config.toml     the resolved configuration
        COMPLETE        last: sha256 of every file above; a folder without it is not a checkpoint

RUN/best points at the one with the lowest held-out audio loss; it is kept beside the newest.

Every rank copies its part to the CPU and training goes on; a thread writes under a temporary name with a process group of
its own, and rank 0 renames. The price is one more copy of LoRA and optimizer state. The position is a step number, nothing
else: plan and dropout are functions of it, so neither loader nor random state is saved, and the number of ranks may change.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from shards.writer import sync_folder, write_bytes, write_json
from train.model.lora import lora_parameters, save_adapter
from train.run_folder.checkpoint_folders import (
    Identity,
    best_checkpoint,
    check_identity,
    complete_checkpoints,
    digests,
    mark_best,
)
from train.world import SHORT_TIMEOUT, World

log = logging.getLogger("train")
ONLY_TRAINABLE = StateDictOptions(ignore_frozen_params=True)
ENDS_WITHIN_S = 20.0  # torch's launcher kills ranks 30 s after it asked them to end
WHOLE_ON_CPU = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)


class Checkpoints:
    """Writes a run's checkpoints, one at a time."""

    def __init__(
        self, run_dir: Path, world: World, lora_config: LoraConfig, identity: Identity, config_toml: str, keep: int
    ) -> None:
        self._run_dir = run_dir
        self._world = world
        self._lora_config = lora_config
        self._identity = identity
        self._config_toml = config_toml
        self._keep = keep
        self._thread = ThreadPoolExecutor(2, thread_name_prefix="checkpoint")  # one writes the state, one the rest
        self._pending: tuple[Path, Future[None]] | None = None
        # Collectives of two threads in one group would meet each other. By default a group waits half an hour for a
        # neighbour that has fallen silent, and the process with it.
        self._group: Any = None
        if world.is_distributed:
            self._group = dist.new_group(backend="gloo", timeout=SHORT_TIMEOUT)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, metrics: dict[str, float]) -> Path:
        """Begin to write checkpoint-`step` after `step` finished steps; every rank must call this.

        The checkpoint before it is finished first. One that could not be written is logged, and training goes on.
        """
        folder = self._run_dir / "checkpoints" / f"checkpoint-{step}"
        if self._pending and self._pending[0] == folder:  # a run that stops right after it was begun
            return folder
        self.finish()
        partial = folder.with_name(f".{folder.name}.tmp")
        fault = make_empty(partial) if self._world.is_first else None
        if any(self._world.gather(fault)):  # afterwards the folder is there for every rank, or nobody writes
            self._pending = folder, failed(fault)
            return folder
        adapter = adapter_tensors(model)
        state = {
            "model": get_model_state_dict(model, options=ONLY_TRAINABLE),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=ONLY_TRAINABLE),
            "step": step,
        }
        written = self._write_state(state, partial / "state")

        def finish() -> None:
            try:
                written.result()
                if self._world.is_first:
                    save_adapter(partial / "adapter", adapter, self._lora_config)
                    self._complete(partial, folder, metrics)
            except BaseException:
                if self._world.is_first:
                    shutil.rmtree(partial, ignore_errors=True)  # room for the next one
                raise

        self._pending = folder, self._thread.submit(finish)
        return folder

    def finish(self, must_succeed: bool = False) -> None:
        """Wait for the checkpoint being written; every rank must call this. Raises CheckpointError if it must succeed."""
        if self._pending is None:
            return
        folder, future = self._pending
        self._pending = None
        error = future.exception()
        message = None if error is None else reason(error)
        failures = [found for found in self._world.gather(message) if found]
        if failures:
            message = f"{folder}: not saved: {failures[0]}; the one before it is kept; make room or check the disk"
            if must_succeed:
                raise CheckpointError(message)
            log.warning("%s", message)
        else:
            log.info("saved %s", folder)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        """After a fault other ranks may be gone, so nobody is asked: this rank's own writing comes to its end, if it can."""
        if self._pending:
            wait([self._pending[1]], timeout=ENDS_WITHIN_S)
        self._thread.shutdown(wait=False)

    def _write_state(self, state: dict[str, Any], folder: Path) -> Future[Any]:
        """Copies first, writes later. Distributed states are staged by torch's own asynchronous writer."""
        if self._group is not None:
            return dcp.async_save(state, checkpoint_id=folder, process_group=self._group)  # pyright: ignore
        copied = _copied(state)

        def write() -> None:
            with _single_process():
                dcp.save(copied, checkpoint_id=folder, no_dist=True)

        return self._thread.submit(write)

    def _complete(self, partial: Path, folder: Path, metrics: dict[str, float]) -> None:
        write_json(partial / "identity.json", self._identity)
        write_json(partial / "metrics.json", metrics)
        write_bytes(partial / "config.toml", self._config_toml.encode())
        _sync_tree(partial)
        write_json(partial / "COMPLETE", digests(partial))
        shutil.rmtree(folder, ignore_errors=True)  # the rest of one whose removal was interrupted
        partial.replace(folder)
        sync_folder(folder.parent)
        mark_best(self._run_dir, folder, metrics)
        for old in complete_checkpoints(self._run_dir)[: -self._keep]:
            if old != best_checkpoint(self._run_dir):
                shutil.rmtree(old)


def make_empty(folder: Path) -> OSError | None:
    """What kept an empty folder from being made, if anything."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error
    return None


def failed(fault: OSError | None) -> Future[None]:
    """A write that was never begun, with the fault of the rank that has one."""
    future: Future[None] = Future()
    if fault:
        future.set_exception(fault)
    else:
        future.set_result(None)
    return future


def reason(error: BaseException) -> str:
    """The first line of what went wrong; torch's writer hides it one level deeper, with one error per rank."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Identity, world: World) -> int:
    """Load weights and optimizer; returns the number of finished steps. Every rank must call this.

    Raises CheckpointError when the checkpoint belongs to another run, naming both values, or cannot be read.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    check_identity(folder, identity)
    state = {
        "model": get_model_state_dict(model, options=ONLY_TRAINABLE),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=ONLY_TRAINABLE),
        "step": 0,
    }
    try:
        with _single_process():
            dcp.load(state, checkpoint_id=folder / "state", no_dist=not world.is_distributed)
    except Exception as error:  # the library's reader raises its own and the file system's errors alike
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: not readable: {first_line}; remove it to go on from an older one") from error
    with torch.no_grad():
        for name, parameter in lora_parameters(model):
            parameter.copy_(state["model"][name])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=ONLY_TRAINABLE)
    for group, asked in zip(optimizer.param_groups, settings, strict=True):
        group.update(asked)  # weight decay as it is asked for now: settings come with the saved moments
    return int(state["step"])


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trainable weights, whole and on the CPU; empty on other ranks than the first. Every rank must call this."""
    found: dict[str, Any] = get_model_state_dict(model, options=WHOLE_ON_CPU)
    names = {name for name, _ in lora_parameters(model)}
    return {name: tensor.clone() for name, tensor in found.items() if name in names}


def _copied(value: Any) -> Any:
    """A nested state with its tensors copied to the CPU."""
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


@contextmanager
def _single_process() -> Iterator[None]:
    """One process is what is meant here, so the library's guess that it is meant is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
