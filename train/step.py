"""One optimizer step: gradients of all packs on all ranks, clip, update; and how fast steps go.

Losses are sums divided by what the whole step counted on all ranks, so the result does not depend on how a step is cut
into packs or ranks. A number that is not finite stops the run before the optimizer touches a weight.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shards.errors import PipelineError
from train.config import LossSection, TrainConfig
from train.model.batch import PackedBatch
from train.model.decoder import HiggsAudio
from train.model.flops import lora_sizes_of, matmul_rate, step_flops
from train.model.fsdp import full_tensor, sync_gradients
from train.model.loss import LossCounts, LossSums, curriculum_factor, losses_of_sets, step_losses
from train.optim import learning_rate_at
from train.world import ALONE, World


class NotFinite(PipelineError):
    """A loss or a gradient is not a number; no weight was touched."""


@dataclass(frozen=True)
class StepResult:
    """Normalised losses of this rank's packs, still on the device: an unlogged step needs no more synchronisation."""

    total: Tensor  # []
    text: Tensor  # []
    codebooks: Tensor  # [K]
    contrastive: Tensor  # []
    accuracy: Tensor  # [K], this rank's targets with the highest logit, by those of the whole step
    grad_norm: Tensor  # [], of all ranks
    by_set: Tensor | None = None  # [D, 1 + K] sums of this rank, None of a single data set
    set_counts: Tensor | None = None  # [D, 3 + K] of this rank, on the CPU

    def values(self, world: World = ALONE, data_sets: tuple[str, ...] = ()) -> dict[str, float]:
        """Metrics of the whole step, and of each of several data sets (none named: not); every rank must call this."""
        parts = torch.cat((torch.stack((self.total, self.text, self.contrastive)), self.codebooks, self.accuracy))
        local, num_books = parts.double().cpu(), len(self.codebooks)
        if data_sets and self.by_set is not None and self.set_counts is not None:
            of_sets = torch.stack((self.by_set.double().cpu(), self.set_counts[:, 2:].double()))
            local = torch.cat((local, of_sets.flatten()))  # one exchange for all
        total, text, contrastive, *others = world.sum(local).tolist()
        codebooks, accuracy = others[:num_books], others[num_books : 2 * num_books]
        sums_and_counts = torch.tensor(others[2 * num_books :]).view(2, -1, 1 + num_books)
        of_sets = losses_of_sets("loss", data_sets, *sums_and_counts) if data_sets and self.by_set is not None else {}
        return {
            "loss/total_loss": total,
            "loss/text_loss": text,
            "loss/audio_loss": sum(codebooks) / len(codebooks),
            "loss/contrastive_loss": contrastive,
            **{f"loss/codebook_{k}": value for k, value in enumerate(codebooks)},
            "accuracy/audio": sum(accuracy) / len(accuracy),
            **{f"accuracy/codebook_{k}": value for k, value in enumerate(accuracy)},
            **of_sets,
            "metrics/grad_norm": self.grad_norm.item(),
        }


@dataclass(frozen=True)
class StepSettings:
    """What one step does with its packs."""

    step: int  # finished steps before this one
    learning_rate: float
    loss: LossSection
    max_grad_norm: float = 1.0
    seed: int = 0

    @staticmethod
    def at(step: int, total_steps: int, config: TrainConfig) -> StepSettings:
        section = config.train
        rate = learning_rate_at(step, total_steps, section)
        return StepSettings(step, rate, config.loss, section.max_grad_norm, section.seed)

    def dropout_seed(self, rank: int) -> int:
        """uint64: a resumed run draws what the uninterrupted one would have drawn, and every rank draws its own."""
        return int(np.random.SeedSequence((self.seed, self.step, rank)).generate_state(1, np.uint64)[0])


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[PackedBatch],
    settings: StepSettings,
    counts: LossCounts | None = None,
    world: World = ALONE,
    interrupted: Callable[[], bool] = lambda: False,
) -> StepResult | None:
    """Gradients of all packs of the step, clip, update. `counts`: targets of all ranks, where the feed counted them.

    `interrupted` is asked between two packs, by every rank, with the same answer: a step of many packs may take longer than
    who sends a signal waits. Then nothing is updated and None is returned. Raises PipelineError when a number is not finite.
    """
    counts = counts or LossCounts.of(batches, world)
    section = settings.loss
    ramp = curriculum_factor(settings.step, section.curriculum_steps, section.enable_curriculum_learning)
    torch.manual_seed(settings.dropout_seed(world.rank))
    parts, correct, by_set = [], [], []
    for number, batch in enumerate(batches, start=1):
        if number > 1 and interrupted():
            optimizer.zero_grad(set_to_none=True)
            return None
        sync_gradients(model, number == len(batches))
        sums: LossSums = model(batch)
        losses = step_losses(sums, counts, section, ramp)
        losses.total.backward()
        correct.append(sums.correct)
        by_set += [] if sums.by_set is None else [sums.by_set]
        parts.append([value.detach() for value in losses])
    total, text, codebooks, contrastive = (torch.stack(values).sum(dim=0) for values in zip(*parts, strict=True))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
    stop_unless_finite(settings.step, total, grad_norm, batches, world)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    accuracy = torch.stack(correct).sum(dim=0).float() / counts.audio.to(total.device, non_blocking=True)
    of_sets = (
        (torch.stack(by_set).sum(dim=0), torch.stack([batch.set_counts for batch in batches]).sum(dim=0))
        if by_set
        else ()
    )
    return StepResult(total, text, codebooks, contrastive, accuracy, grad_norm, *of_sets)


def stop_unless_finite(step: int, total: Tensor, grad_norm: Tensor, batches: list[PackedBatch], world: World) -> None:
    """Raises NotFinite on every rank, naming the samples of the ranks whose own loss is not finite."""
    own_loss, norm = total.item(), grad_norm.item()
    if math.isfinite(norm) and (world.is_distributed or math.isfinite(own_loss)):
        return  # a loss that is not finite makes the norm of all ranks so
    keys = [key for batch in batches for key in batch.keys]
    suspects = world.gather(None if math.isfinite(own_loss) else keys)
    named = [key for found in suspects if found for key in found] or keys
    raise NotFinite(
        f"step {step + 1}: loss {own_loss}, gradient norm {norm}: not finite, stopped before the update; samples "
        f"{', '.join(named[:8])}{' ...' if len(named) > 8 else ''}; lower train.learning_rate or read them with "
        "inspect-shards show"
    )


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """What is there before the first step stays until the last, so Python's collector need not scan it during them.

    One scan of the 370,000 objects that the imports alone leave takes 0.2 s (2 cores, NOTES.md), comes on every rank at
    another time, and all ranks wait for it.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class StepClock:
    """Throughput, its share of what the device can do, and the share of time spent waiting for data, since the last report."""

    def __init__(self, model: HiggsAudio, world: World) -> None:
        self._config = model.config
        self._lora_sizes = lora_sizes_of(model)
        self._rate = matmul_rate(world.device)
        self._world = world
        self.restart()

    def restart(self) -> None:
        self._flops = 0.0
        self._start = time.monotonic()
        self._waited_s = 0.0
        self._num_samples = self._num_tokens = 0

    @contextmanager
    def waiting(self):
        start = time.monotonic()
        yield
        self._waited_s += time.monotonic() - start

    def count(self, batches: list[PackedBatch]) -> None:
        self._num_samples += sum(len(batch.keys) for batch in batches)
        self._num_tokens += sum(batch.num_tokens for batch in batches)
        self._flops += step_flops(self._config, self._lora_sizes, batches)

    def values(self) -> dict[str, float]:
        """Metrics of all ranks, shares as means; every rank must call this."""
        world = self._world
        elapsed_s = time.monotonic() - self._start
        shares = self._waited_s / elapsed_s / world.size, self._flops / elapsed_s / self._rate / world.size
        local = torch.tensor([self._num_samples, self._num_tokens, *shares], dtype=torch.float64)
        num_samples, num_tokens, waited, mfu = world.sum(local).tolist()
        memory = torch.cuda.max_memory_allocated(world.device) if world.device.type == "cuda" else 0
        self.restart()
        return {
            "metrics/mfu": mfu,
            "metrics/samples_per_second": num_samples / elapsed_s,
            "metrics/tokens_per_second": num_tokens / elapsed_s,
            "metrics/data_wait_fraction": waited,
            "metrics/gpu_memory_gb": memory / 1e9,
        }
