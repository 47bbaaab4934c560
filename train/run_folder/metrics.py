"""What a run reports: metrics.jsonl always, one console line, logs/training.log, and Weights & Biases if asked.

metrics.jsonl is the truth: one JSON object per logged step, append-only, cut back to the resumed step after a restart
so that no step appears twice. The W&B key comes from the environment only; it never enters a file.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.errors import ConfigError
from shards.printable import redact, redact_values
from shards.terminal import LineFormatter
from shards.writer import write_bytes
from train.config import WandbSection

log = logging.getLogger("train")


def open_log(run_dir: Path, rank: int = 0) -> None:
    """Log lines to the console and to RUN/logs/training.log; ranks but the first say only what is wrong."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if rank == 0:
        handlers.append(logging.FileHandler(run_dir / "logs" / "training.log", encoding="utf-8"))
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
    for old in list(log.handlers):
        old.close()
        log.removeHandler(old)
    for handler in handlers:
        who = "" if rank == 0 else f"rank {rank}: "
        handler.setFormatter(LineFormatter(f"%(asctime)s {who}%(message)s", "%H:%M:%S"))
        log.addHandler(handler)


class Metrics:
    """Receives one dictionary per logged step."""

    def __init__(self, run_dir: Path, resumed_step: int, wandb_run: Any = None, tensorboard: bool = False) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._keep_until(resumed_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = wandb_run
        self._tensorboard = start_tensorboard(run_dir, resumed_step) if tensorboard else None

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._wandb:
            self._wandb.log(values, step=step)
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def log_audio(self, step: int, waves: dict[str, Path]) -> None:
        """The listening set of a step, where trackers take sound; the files themselves stay in the run."""
        found = {f"listening/{key}": path for key, path in waves.items() if path.is_file()}
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Audio(str(path)) for name, path in found.items()}, step=step)
        if self._tensorboard:
            import soundfile
            import torch

            for name, path in found.items():
                wave, sample_rate = soundfile.read(path, dtype="float32")
                self._tensorboard.add_audio(name, torch.from_numpy(wave)[None], step, sample_rate)

    def close(self) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.finish()
        if self._tensorboard:
            self._tensorboard.close()

    def _keep_until(self, step: int) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_bytes(self._path, "".join(f"{line}\n" for line in kept).encode())


def held_out_history(run_dir: Path, step: int) -> list[float]:
    """eval/audio_loss of every evaluation of a run up to `step`, oldest first."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    found = [line.get("eval/audio_loss") for line in lines if line["step"] <= step]
    return [loss for loss in found if loss is not None and math.isfinite(loss)]


def console_line(step: int, total_steps: int, values: dict[str, float]) -> str:
    held_out = ""
    if "eval/total_loss" in values:
        held_out = (
            f" | held out: loss {values['eval/total_loss']:.4f} (text {values['eval/text_loss']:.4f} audio "
            f"{values['eval/audio_loss']:.4f})"
        )
    if "eval/speech_ended" in values:
        held_out += (
            f" | speech: {values['eval/speech_ended']:.0%} ended by itself, {values['eval/speech_length_ratio']:.2f} x as "
            "long as recorded"
        )
    return (
        f"step {step}/{total_steps} | loss {values['loss/total_loss']:.4f} "
        f"(text {values['loss/text_loss']:.4f} audio {values['loss/audio_loss']:.4f} "
        f"contrastive {values['loss/contrastive_loss']:.4f}) | grad {values['metrics/grad_norm']:.3f} | "
        f"lr {values['metrics/learning_rate']:.2e} | {values['metrics/samples_per_second']:.1f} samples/s | "
        f"{values['metrics/tokens_per_second']:.0f} tokens/s | data wait {values['metrics/data_wait_fraction']:.0%}{held_out}"
    )


def start_tensorboard(run_dir: Path, resumed_step: int) -> Any:
    """A writer into RUN/tensorboard; points after the resumed step are dropped. Raises ConfigError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "train.tensorboard = true: the package tensorboard is not installed; pip install -e '.[tensorboard]'"
        ) from None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)


def start_wandb(run_dir: Path, section: WandbSection, config: dict[str, Any], resumes: bool) -> Any:
    """A Weights & Biases run, or None. Called before the model loads. Raises ConfigError when it cannot start.

    A run that `resumes` goes on with its curves there: its id stands in RUN/wandb/run-id.txt. Steps that it repeats are
    the same to the last bit, and W&B keeps the first. Offline every start is a folder of its own, as `wandb sync` wants.
    """
    if section.mode == "off":
        return None
    import wandb

    id_path = run_dir / "wandb" / "run-id.txt"
    is_online = section.mode == "online"
    known: dict[str, Any] = {}
    if is_online and resumes and id_path.is_file():
        known = {"id": id_path.read_text(encoding="utf-8").strip(), "resume": "allow"}
    try:
        with redacted_arguments():
            wandb_run = wandb.init(
                project=section.project,
                mode=section.mode,
                dir=run_dir,
                name=redact(run_dir.name),
                config=redact_values(config),
                **known,
            )
    except Exception as error:  # wandb raises many kinds; all mean "not logged in" or "not reachable" here
        raise ConfigError(
            f"wandb.mode = {section.mode!r}: {str(error).strip().splitlines()[0]}; "
            "set WANDB_API_KEY, or use --no-wandb, or wandb.mode = 'offline'"
        ) from error
    if is_online:
        write_bytes(id_path, f"{wandb_run.id}\n".encode())
    return wandb_run


@contextmanager
def redacted_arguments() -> Iterator[None]:
    """W&B keeps the command line of the process that starts it; tokens in it are hidden meanwhile."""
    given = sys.argv
    sys.argv = redact_values(given)
    try:
        yield
    finally:
        sys.argv = given
