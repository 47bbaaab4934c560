"""Checkpoints of a run: complete or not there, written beside training.

    RUN/checkpoints/checkpoint-500/
        adapter/        adapter_config.json, adapter_model.safetensors: loads with plain peft
        state/          tensors.safetensors, state.json: LoRA, optimizer, position (`train.run_folder.state`)
        identity.json   what must be equal for a run to go on
        metrics.json    the last logged metrics
        config.toml     the resolved configuration
        COMPLETE        last: sha256 of every file above; a folder without it is not a checkpoint

RUN/best points at the one that `train.best_by` calls best, by default by held-out audio loss; it is kept beside the newest.

Rank 0 gathers the parts of all on the CPU and training goes on; a thread of it writes under a temporary name and renames.
The price is one more copy of LoRA and optimizer state. The position is a step number, nothing else: plan and dropout are
functions of it, so neither loader nor random state is saved, and the number of ranks may change. It stands in state.json:
the folder's name is for people, who copy and rename.
"""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from shards.errors import CheckpointError
from shards.writer import sync_folder, sync_tree, write_bytes, write_json
from train.model.lora import save_adapter
from train.run_folder.checkpoint_folders import digests, mark_best, move_away, remove_old
from train.run_folder.identity import IDENTITY, Identity
from train.run_folder.state import gather_state, write_state
from train.world import World

log = logging.getLogger("train")
ENDS_WITHIN_S = 20.0  # torch's launcher kills ranks 30 s after it asked them to end


class Checkpoints:
    """Writes a run's checkpoints, one at a time."""

    def __init__(
        self,
        run_dir: Path,
        world: World,
        lora_config: LoraConfig,
        identity: Identity,
        config_toml: str,
        keep: int,
        best_by: str,
    ) -> None:
        self._run_dir = run_dir
        self._world = world
        self._lora_config = lora_config
        self._identity = identity
        self._config_toml = config_toml
        self._keep = keep
        self._best_by = best_by
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future[None]] | None = None

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
        tensors = gather_state(model, optimizer)
        if self._world.is_first:
            self._pending = folder, self._thread.submit(self._write, partial, folder, step, tensors, metrics)
        else:
            self._pending = folder, failed(None)
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

    def _write(
        self, partial: Path, folder: Path, step: int, tensors: dict[str, Tensor], metrics: dict[str, float]
    ) -> None:
        try:
            write_state(partial, tensors, step)
            prefix = "model/"
            adapter = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
            save_adapter(partial / "adapter", adapter, self._lora_config)
            self._complete(partial, folder, metrics)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # room for the next one
            raise

    def _complete(self, partial: Path, folder: Path, metrics: dict[str, float]) -> None:
        write_json(partial / IDENTITY, self._identity)
        write_json(partial / "metrics.json", metrics)
        write_bytes(partial / "config.toml", self._config_toml.encode())
        sync_tree(partial)
        write_json(partial / "COMPLETE", digests(partial))
        if (folder / "COMPLETE").is_file():  # of another step, named so by a person
            move_away(folder)
        shutil.rmtree(folder, ignore_errors=True)  # the rest of one whose removal was interrupted
        partial.replace(folder)
        sync_folder(folder.parent)
        mark_best(self._run_dir, folder, metrics, self._best_by)
        remove_old(self._run_dir, self._keep)


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
    """The first line of what went wrong."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
