"""Held-out data: which speakers are kept out of training, and the losses on them.

In: the index and a fraction, or another data set. Out: `eval/...` values that a run's training does not depend on: no
gradient, no random number, no optimizer state is touched. Speakers are disjoint, because a voice that was trained on says
nothing about cloning a new one; the price is that the held-out share is only near the fraction asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import nn

from shards.errors import ConfigError, PipelineError
from shards.sequence import NUM_CODEBOOKS
from train.config import LossSection
from train.data import Delivery
from train.feed import ahead
from train.loss import LossCounts, LossSums, step_losses
from train.packing import PackedBatch
from train.parallel import World
from train.plan import CHUNK

log = logging.getLogger("train")

MIX = np.uint64(0x9E3779B97F4A7C15)  # the 64-bit golden ratio: spreads seeds over the numbers


def choose_speakers(index: np.ndarray, seed: int, fraction: float) -> np.ndarray:
    """Held-out speakers [v] uint64, sorted: a pure function of the speakers' names and counts, the seed and the fraction.

    Speakers are taken in an order given by the seed, each if it brings the share nearer to the fraction; at least one is
    taken and at least one is left. Raises ConfigError when there is only one.
    """
    counts: dict[int, int] = {}
    for start in range(0, len(index), CHUNK):
        speakers, numbers = np.unique(index[start : start + CHUNK]["speaker"], return_counts=True)
        for speaker, number in zip(speakers.tolist(), numbers.tolist(), strict=True):
            counts[speaker] = counts.get(speaker, 0) + number
    if len(counts) < 2:
        raise ConfigError(
            f"train.validation_fraction = {fraction}: the data set has only {len(counts)} speaker, and held-out speakers "
            "must be others than those trained on; name another data set in train.validation_data or set it to 0"
        )
    names = np.array(sorted(counts), np.uint64)
    order = np.argsort(scramble(names, seed), kind="stable")
    wanted = fraction * len(index)
    taken: list[int] = []
    total = 0
    for speaker in names[order].tolist():
        if len(taken) + 1 < len(names) and abs(total + counts[speaker] - wanted) < abs(total - wanted):
            taken.append(speaker)
            total += counts[speaker]
    if not taken:  # the smallest share there is
        taken = [min(counts, key=lambda speaker: (counts[speaker], speaker))]
    return np.array(sorted(taken), np.uint64)


def scramble(numbers: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [n] -> uint64 [n], another order for every seed (the finalizer of splitmix64)."""
    with np.errstate(over="ignore"):
        x = numbers + MIX * np.uint64(seed + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def of_speakers(speakers: np.ndarray, inside: bool) -> Callable[[np.ndarray], np.ndarray]:
    """A row filter for `Planner`: rows whose speaker is among `speakers` [v] sorted uint64, or all others."""

    def keep(rows: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(speakers, rows["speaker"]), len(speakers) - 1)
        return (speakers[place] == rows["speaker"]) == inside

    return keep


class Part(msgspec.Struct, frozen=True):
    """What one rank has to add to an evaluation."""

    sums: list[float] = []  # text, contrastive, K codebooks
    counts: list[int] = []  # of their targets, in the same order
    samples: int = 0
    bad: int = 0


@dataclass(frozen=True)
class Evaluation:
    """The held-out packs, the same ones every time."""

    deliveries: Callable[[], Iterator[Delivery]]  # one pass over this rank's packs
    world: World
    max_bad_fraction: float

    def losses(
        self, model: nn.Module, section: LossSection, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Losses over all held-out packs of all ranks, under the names of the metrics; none if it was interrupted.

        `interrupted` is asked before every pack, by every rank, with the same answer. Raises PipelineError.
        """
        with untouched(model, self.world.device):
            mine = self._own(model, self.world.device, interrupted)
        if mine is None:
            return {}
        shares: list[Part] = self.world.gather(mine)
        num_samples, num_bad = (sum(values) for values in zip(*((s.samples, s.bad) for s in shares), strict=True))
        if num_bad > self.max_bad_fraction * (num_samples + num_bad):
            raise PipelineError(
                f"{num_bad} of {num_samples + num_bad} held-out samples are damaged, more than train.max_bad_fraction = "
                f"{self.max_bad_fraction:g}; `inspect-shards verify` names them"
            )
        sums = torch.tensor([share.sums for share in shares], dtype=torch.float64).sum(dim=0)
        counts = torch.tensor([share.counts for share in shares]).sum(dim=0).clamp(min=1)
        losses = step_losses(
            LossSums(sums[0], sums[2:], sums[1]),
            LossCounts(int(counts[0]), counts[2:], int(counts[1])),
            section,
            ramp=1.0,
        )
        codebooks = losses.codebooks.tolist()
        return {
            "eval/total_loss": losses.total.item(),
            "eval/text_loss": losses.text.item(),
            "eval/audio_loss": sum(codebooks) / len(codebooks),
            "eval/contrastive_loss": losses.contrastive.item(),
            **{f"eval/codebook_{k}": value for k, value in enumerate(codebooks)},
            "eval/samples": num_samples,
            "eval/bad_samples": num_bad,
        }

    def _own(self, model: nn.Module, device: torch.device, interrupted: Callable[[], bool]) -> Part | None:
        sums = torch.zeros(2 + NUM_CODEBOOKS, dtype=torch.float64, device=device)
        counts = torch.zeros(2 + NUM_CODEBOOKS, dtype=torch.long)
        num_samples = num_bad = 0
        for delivery, batch in self._together(ahead(self.deliveries(), device)):
            if interrupted():
                return None
            part: LossSums = model(batch)
            sums += torch.cat((part.text[None], part.contrastive[None], part.audio)).double()
            host = delivery.batch
            counts[0] += len(host.text_targets)
            counts[1] += host.num_pairs
            counts[2:] += host.targets_per_codebook
            num_samples += len(host.keys)
            num_bad += len(delivery.faults)
            for fault in delivery.faults:
                log.warning("held-out data: left out: %s", fault)
        return Part(sums.tolist(), counts.tolist(), num_samples, num_bad)

    def _together(self, found: Iterator[tuple[Delivery, PackedBatch]]) -> Iterator[tuple[Delivery, PackedBatch]]:
        """Packs as they come, as soon as every rank has its own: one without would leave the others in a collective."""
        while True:
            problem, given = "", None
            try:
                given = next(found, None)
            except PipelineError as error:
                problem = str(error)
            for rank, told in enumerate(self.world.gather(problem)):
                if told:
                    raise PipelineError(f"held-out data, rank {rank}: {told}")
            if given is None:
                return
            yield given


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random state are given back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    for module, training in modes:
        module.training = training
