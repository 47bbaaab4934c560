"""How much of each data set a run has trained on: samples and hours of target audio since its first step.

In: the packs of every step that was taken. Out: metrics under the names of the data sets, the same on any number of ranks. A
run that goes on takes up the numbers that its checkpoint holds, by the order of the data sets, since folders may be renamed.
The price: an exchange between the ranks where it is logged or saved; a step counts on the CPU by itself. With one data
set there is nothing to tell apart, and nothing is said.
"""

from __future__ import annotations

from pathlib import Path

import torch

from shards.sequence import FRAMES_PER_SECOND
from train.model.batch import PackedBatch
from train.run_folder.checkpoint_folders import read_metrics
from train.world import World

SAMPLES, HOURS = "metrics/samples/", "metrics/hours/"
FRAMES_PER_HOUR = 3600 * FRAMES_PER_SECOND


class DataProgress:
    def __init__(self, data_sets: tuple[str, ...], world: World, start_from: Path | None = None) -> None:
        """`start_from`: the checkpoint of a run that goes on."""
        self._names, self._world = data_sets, world
        self._counted = torch.zeros(len(data_sets), 2, dtype=torch.long)  # of this rank, since they were last summed
        self._total = totals_of(start_from, len(data_sets)) if start_from else torch.zeros_like(self._counted)

    def count(self, batches: list[PackedBatch]) -> None:
        for batch in batches:
            self._counted += batch.set_counts[:, :2]

    def values(self) -> dict[str, float]:
        """Of several data sets; every rank must call this."""
        if len(self._names) == 1:
            return {}
        self._total += self._world.sum(self._counted)
        self._counted = torch.zeros_like(self._counted)
        found: dict[str, float] = {}
        for name, (num_samples, num_frames) in zip(self._names, self._total.tolist(), strict=True):
            found |= {SAMPLES + name: num_samples, HOURS + name: num_frames / FRAMES_PER_HOUR}
        return found


def totals_of(checkpoint: Path, num_sets: int) -> torch.Tensor:
    """[num_sets, 2] int64, samples and frames; zeros where the checkpoint does not say."""
    numbers = {name: value for name, value in read_metrics(checkpoint).items() if isinstance(value, int | float)}
    samples, hours = ([value for name, value in numbers.items() if name.startswith(what)] for what in (SAMPLES, HOURS))
    if len(samples) != num_sets or len(hours) != num_sets:
        return torch.zeros(num_sets, 2, dtype=torch.long)
    return torch.tensor([[int(n), round(h * FRAMES_PER_HOUR)] for n, h in zip(samples, hours, strict=True)])
