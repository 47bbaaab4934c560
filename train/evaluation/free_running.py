"""How much of a recording's first second the model says by itself, greedily, codebook by codebook.

In: a few samples, held-out ones where there are any. Out: `eval/free_running...` metrics. Losses and their accuracy are given the
true codes before each column; here the model is given its own, as in speech, so labels shifted by a column or a prompt unlike
training's show here where curves look sound. All ranks speak each sample together, since weights may be sharded. The price:
after the first unlike code the two go apart, so sound models have low numbers too; what counts is that they rise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from shards.sample import Sample
from shards.sequence import FRAMES_PER_SECOND, SequenceBuilder
from train.evaluation.held_out import untouched
from train.model.decoder import HiggsAudio
from train.model.generate import GREEDY, generate
from train.world import World

MAX_FRAMES = FRAMES_PER_SECOND
MAX_SAMPLES = 4


@dataclass(frozen=True)
class FreeRunning:
    """Holds the samples, the same ones on every rank and at every evaluation."""

    samples: list[Sample]
    builder: SequenceBuilder
    world: World

    def accuracy(self, model: HiggsAudio, interrupted: Callable[[], bool]) -> dict[str, float]:
        """Metrics, none if it was interrupted. Every rank must call this.

        Frames that the model did not say, because it ended before, are wrong ones.
        """
        equal, num_frames = 0, 0
        with untouched(model, self.world.device), torch.compiler.set_stance("force_eager"):
            for sample in self.samples:
                wanted = sample.target_codes[:, :MAX_FRAMES]
                prompt = self.builder.prompt(sample)
                said = generate(model, prompt, wanted.shape[1], GREEDY, self.world, interrupted).codes
                if interrupted():
                    return {}
                both = min(said.shape[1], wanted.shape[1])
                equal = equal + (said[:, :both] == wanted[:, :both]).sum(axis=1)
                num_frames += wanted.shape[1]
        shares: list[float] = (np.asarray(equal) / max(1, num_frames)).tolist()
        return {
            "eval/free_running": sum(shares) / len(shares),
            **{f"eval/free_running_{k}": share for k, share in enumerate(shares)},
        }


def open_free_running(samples: list[Sample], builder: SequenceBuilder, world: World) -> FreeRunning | None:
    """Of what the first rank has read; None without samples. Every rank must call this."""
    shared: list[Sample] = world.gather(samples[:MAX_SAMPLES] if world.is_first else [])[0]
    return FreeRunning(shared, builder, world) if shared else None
