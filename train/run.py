"""A run that is ready to step: all that `set_up` makes and the steps need, and how it was asked to run.

In: nothing; the fields are filled in by `train/set_up.py`. Out: `Run`, frozen, because one that changed between two steps could
not be continued from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from train.config import TrainConfig
from train.data.source import Source
from train.evaluation.free_running import FreeRunning
from train.evaluation.held_out import Evaluation
from train.evaluation.listening import Listening
from train.evaluation.listening_scores import ListeningScores
from train.model.batch import PackedBatch
from train.model.decoder import HiggsAudio
from train.model.loss import LossTerms
from train.run_folder.checkpoint import Checkpoints
from train.run_folder.metrics import Metrics
from train.world import World


@dataclass(frozen=True)
class RunOptions:
    """How to run this time; what to train stands in the configuration."""

    resume: str = "auto"  # auto, never, or a checkpoint folder
    dry_run: bool = False
    skip_preflight: bool = False


@dataclass(frozen=True)
class Run:
    """All that the steps need."""

    config: TrainConfig  # final: nothing in it is "auto"
    run_dir: Path
    world: World
    source: Source
    model: HiggsAudio
    optimizer: torch.optim.Optimizer
    evaluation: Evaluation | None
    listening: Listening | None
    free_running: FreeRunning | None
    scores: ListeningScores | None  # of the first rank, where eval.score asks for them
    metrics: Metrics | None  # of the first rank
    saver: Checkpoints
    first_step: int  # finished steps at the start
    start_from: Path | None  # the checkpoint with those steps
    preflight: tuple[PackedBatch, LossTerms] | None  # what the losses of the first step are compared with
    interrupted: Callable[[], bool]  # every rank asks at the same places and gets the same answer
    waiting: Callable[[], AbstractContextManager[None]]  # around a wait for data, which a signal ends

    @property
    def total_steps(self) -> int:
        return self.source.total_steps

    def is_eval_step(self, step: int) -> bool:
        evaluates = self.evaluation is not None or self.listening is not None
        return evaluates and (step % self.config.train.eval_every == 0 or step == self.total_steps)

    def is_log_step(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step in (1, self.total_steps) or self.is_eval_step(step)
