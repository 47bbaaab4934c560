"""Losses on held-out data.

In: the held-out packs of a `Source`. Out: `eval/...` values that a run's training does not depend on: no gradient, no random
number, no optimizer state is touched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import torch
from torch import nn

from shards.delay_pattern import NUM_CODEBOOKS
from shards.errors import PipelineError
from train.config import LossSection
from train.data.feed import prefetch
from train.data.source import HeldOut
from train.data.stages import LoadedPack
from train.model.batch import PackedBatch
from train.model.loss import LossCounts, LossSums, losses_of_sets, step_losses
from train.world import World

MAX_KEYS = 8  # of a pack that are logged

log = logging.getLogger("train")


class EvalSums(msgspec.Struct, frozen=True):
    """What one rank has to add to an evaluation."""

    sums: list[float] = []  # text, contrastive, K codebooks
    counts: list[int] = []  # of their targets, in the same order
    correct: list[int] = []  # of the K codebooks' targets, those with the highest logit
    samples: int = 0
    bad: int = 0
    set_sums: list[list[float]] = []  # [D, 1 + K] of each data set: text, K codebooks
    set_counts: list[list[int]] = []  # [D, 3 + K] as in `PackedBatch.set_counts`
    not_finite: list[str] = []  # keys of the packs whose losses are not


@dataclass(frozen=True)
class Evaluation:
    """The held-out packs, the same ones every time."""

    held_out: HeldOut
    world: World

    def losses(
        self, model: nn.Module, section: LossSection, interrupted: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Losses over all held-out packs of all ranks, under the names of the metrics; none if it was interrupted.

        Losses that are not finite, or of no sample at all, are no evaluation: it is logged, and only the counts are
        returned, so that nothing is judged by them.
        `interrupted` is asked before every pack, by every rank, with the same answer. Raises PipelineError.
        """
        with untouched(model, self.world.device):
            mine = self._own(model, self.world.device, interrupted)
        if mine is None:
            return {}
        shares: list[EvalSums] = self.world.gather(mine)
        num_samples, num_bad = (sum(values) for values in zip(*((s.samples, s.bad) for s in shares), strict=True))
        if num_bad > self.held_out.max_bad_fraction * (num_samples + num_bad):
            raise PipelineError(
                f"{num_bad} of {num_samples + num_bad} held-out samples are damaged, more than train.max_bad_fraction = "
                f"{self.held_out.max_bad_fraction:g}; `inspect-shards verify` names them"
            )
        sums = torch.tensor([share.sums for share in shares], dtype=torch.float64).sum(dim=0)
        counts = torch.tensor([share.counts for share in shares]).sum(dim=0).clamp(min=1)
        correct = torch.tensor([share.correct for share in shares]).sum(dim=0)
        losses = step_losses(
            LossSums(sums[0], sums[2:], sums[1], correct),
            LossCounts(int(counts[0]), counts[2:], int(counts[1])),
            section,
            ramp=1.0,
        )
        codebooks, accuracy = losses.codebooks.tolist(), (correct / counts[2:]).tolist()
        numbers: dict[str, float] = {"eval/samples": num_samples, "eval/bad_samples": num_bad}
        if why := self._not_an_evaluation(shares, [losses.total.item(), losses.contrastive.item(), *codebooks]):
            if self.world.is_first:
                log.warning("held-out data: %s: not counted as an evaluation; the best checkpoint stays", why)
            return numbers
        return {
            "eval/total_loss": losses.total.item(),
            "eval/text_loss": losses.text.item(),
            "eval/audio_loss": sum(codebooks) / len(codebooks),
            "eval/contrastive_loss": losses.contrastive.item(),
            **{f"eval/codebook_{k}": value for k, value in enumerate(codebooks)},
            "eval/accuracy": sum(accuracy) / len(accuracy),
            **{f"eval/accuracy_{k}": value for k, value in enumerate(accuracy)},
            **self._of_sets(shares),
            **numbers,
        }

    def _of_sets(self, shares: list[EvalSums]) -> dict[str, float]:
        """Losses and samples of each data set, where there are several."""
        names = self.held_out.data_sets
        if len(names) == 1:
            return {}
        sums = torch.tensor([share.set_sums for share in shares], dtype=torch.float64).sum(dim=0)
        counts = torch.tensor([share.set_counts for share in shares]).sum(dim=0)
        num_samples = {
            f"eval/samples/{name}": number for name, number in zip(names, counts[:, 0].tolist(), strict=True)
        }
        return {**losses_of_sets("eval", names, sums, counts[:, 2:]), **num_samples}

    def _not_an_evaluation(self, shares: list[EvalSums], losses: list[float]) -> str:
        """Why nothing may be judged by these losses; "" for sound ones."""
        if not all(math.isfinite(loss) for loss in losses):
            packs = [f"{keys} (rank {rank})" for rank, share in enumerate(shares) for keys in share.not_finite]
            shown = "; ".join(packs[:3]) + (f"; and {len(packs) - 3} more" if len(packs) > 3 else "")
            return f"the loss is not finite, in {len(packs)} packs: samples {shown}"
        if not all(sum(counts) for counts in zip(*(share.counts[2:] for share in shares), strict=True)):
            return "no target was read"
        return ""

    def _own(self, model: nn.Module, device: torch.device, interrupted: Callable[[], bool]) -> EvalSums | None:
        sums = torch.zeros(2 + NUM_CODEBOOKS, dtype=torch.float64, device=device)
        counts = torch.zeros(2 + NUM_CODEBOOKS, dtype=torch.long)
        correct = torch.zeros(NUM_CODEBOOKS, dtype=torch.long, device=device)
        num_sets = len(self.held_out.data_sets)
        set_sums = torch.zeros(num_sets, 1 + NUM_CODEBOOKS, dtype=torch.float64, device=device)
        set_counts = torch.zeros(num_sets, 3 + NUM_CODEBOOKS, dtype=torch.long)
        num_samples = num_bad = 0
        finite: list[torch.Tensor] = []  # of every pack, on the device: nothing waits for it
        keys: list[str] = []
        for loaded, batch in self._together(prefetch(self.held_out.loaded_packs(), device)):
            if interrupted():
                return None
            part: LossSums = model(batch)
            found = torch.cat((part.text[None], part.contrastive[None], part.audio)).double()
            sums += found
            correct += part.correct
            if part.by_set is not None:
                set_sums += part.by_set
            set_counts += loaded.batch.set_counts
            finite.append(found.isfinite().all())
            host = loaded.batch
            keys.append(" ".join(host.keys[:MAX_KEYS]) + (" ..." if len(host.keys) > MAX_KEYS else ""))
            counts[0] += len(host.text_targets)
            counts[1] += host.num_pairs
            counts[2:] += host.targets_per_codebook
            num_samples += len(host.keys)
            num_bad += len(loaded.faults)
            for fault in loaded.faults:
                log.warning("held-out data: skipped: %s", fault)
        flags = torch.stack(finite).tolist() if finite else []
        bad_packs = [names for names, sound in zip(keys, flags, strict=True) if not sound]
        of_sets = set_sums.tolist(), set_counts.tolist()
        return EvalSums(
            sums.tolist(), counts.tolist(), correct.tolist(), num_samples, num_bad, *of_sets, bad_packs[:MAX_KEYS]
        )

    def _together(self, found: Iterator[tuple[LoadedPack, PackedBatch]]) -> Iterator[tuple[LoadedPack, PackedBatch]]:
        """Packs as they come, as soon as every rank has its own: one without would leave the others in a collective."""
        while True:
            problem, given = "", None
            try:
                given = next(found, None)
            except PipelineError as error:
                problem = str(error)
            for rank, message in enumerate(self.world.gather(problem)):
                if message:
                    raise PipelineError(f"held-out data, rank {rank}: {message}")
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
