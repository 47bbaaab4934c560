"""Warnings a person would give who looks at the curves: each is told once, in words, with what to do."""

from __future__ import annotations

from train.metrics import log

COPYING_BELOW = 1.0  # nats per code; guessing is 6.93, and clear speech is not that predictable before it was seen
WAITING_ABOVE = 0.05


class Watch:
    """Looks at every logged step."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def look(self, step: int, values: dict[str, float]) -> None:
        """`values` as they go to metrics.jsonl."""
        if values["epoch"] == 0 and values["loss/audio_loss"] < COPYING_BELOW:
            self._tell(
                "copying",
                f"step {step}: audio loss {values['loss/audio_loss']:.2f} although no sample was seen twice yet: this is how "
                "a model looks that copies its input; listen before you go on, and look at a sample with inspect-shards "
                "show KEY --sequence (tiny or repeated data does the same)",
            )
        if step > 1 and values["metrics/data_wait_fraction"] > WAITING_ABOVE:
            self._tell(
                "waiting",
                f"step {step}: {values['metrics/data_wait_fraction']:.0%} of the time went into waiting for data; raise "
                "train.num_workers, or put the shards on a faster disk",
            )

    def _tell(self, kind: str, line: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            log.warning("%s", line)
