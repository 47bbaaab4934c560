"""Warnings a person would give who watches the curves: each is logged once, in words, with what to do."""

from __future__ import annotations

import logging
import math

log = logging.getLogger("train")
COPYING_BELOW = 1.0  # nats per code; guessing is 6.93, and clear speech is not that predictable before it was seen
WAITING_ABOVE = 0.05
RISING = 3  # evaluations without a new best before it is logged


class CurveMonitor:
    """Checks every logged step, and knows when held-out losses have stopped to fall."""

    def __init__(self, held_out: list[float] | None = None, patience: int = 0, logs: bool = True) -> None:
        """`held_out`: eval/audio_loss of every evaluation so far. `patience`: evaluations without a new best; 0 = any.

        Every rank watches, so that all stop together; only one of them `logs`.
        """
        self._logs = logs
        self._logged: set[str] = set()
        self._held_out = list(held_out or [])
        self._patience = patience

    @property
    def without_improvement(self) -> int:
        """Evaluations since the best one."""
        if not self._held_out:
            return 0
        return len(self._held_out) - 1 - self._held_out.index(min(self._held_out))

    @property
    def should_stop_early(self) -> bool:
        return 0 < self._patience <= self.without_improvement

    def check(self, step: int, values: dict[str, float]) -> None:
        """`values` as they go to metrics.jsonl."""
        if values["epoch"] == 0 and values["loss/audio_loss"] < COPYING_BELOW:
            self._warn_once(
                "copying",
                f"step {step}: audio loss {values['loss/audio_loss']:.2f} although no sample was seen twice yet: this is how "
                "a model looks that copies its input; listen before you go on, and read a sample with inspect-shards "
                "show KEY --sequence (tiny or repeated data does the same)",
            )
        if step > 1 and values["metrics/data_wait_fraction"] > WAITING_ABOVE:
            self._warn_once(
                "waiting",
                f"step {step}: {values['metrics/data_wait_fraction']:.0%} of the time went into waiting for data; raise "
                "train.num_workers, or put the shards on a faster disk",
            )

        if math.isfinite(values.get("eval/audio_loss", math.nan)):
            self._held_out.append(values["eval/audio_loss"])
            if self.without_improvement >= RISING:
                self._warn_once(
                    "rising",
                    f"step {step}: the held-out audio loss has not fallen for {self.without_improvement} evaluations "
                    f"(best {min(self._held_out):.4f}, now {self._held_out[-1]:.4f}): the model learns its data by heart; "
                    "RUN/best is the checkpoint to take, and train.patience stops a run by itself",
                )

    def _warn_once(self, kind: str, line: str) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            if self._logs:
                log.warning("%s", line)
