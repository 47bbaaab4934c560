"""What merging did, in numbers: how much of the update survived rounding, and whether the merged model says the same.

In: the weights before, after, and as they are written; logits of base, base + adapter, and merged model. Out: a `MergeProof`,
which stands in OUT/merge.json. In bf16 a weight has eight bits, so an update below 1/512 of it is lost or doubled: LoRA of small
learning rates can vanish on merging although it speaks well as an adapter (huggingface/peft#1388, #2502).
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from shards.artifacts import load_tokenizer
from shards.cloning import cloning_sample
from shards.config import SequenceSection
from shards.delay_pattern import CODEBOOK_SIZE
from shards.errors import CheckpointError
from shards.sequence import NUM_CODEBOOKS, SequenceBuilder
from train.model.decoder import HiggsAudio
from train.model.generate import generate
from train.model.probe import probe_logits

PROBE_FRAMES = 50
ENOUGH_KEPT = 0.9  # of an update's norm; below it a merge in fp32 is advised
# Logits of the merged model against base + adapter, in parts of what the adapter changes. In fp32 only the order of sums differs.
MOST_FP32_ERROR = 0.02
NOISE = 1e-5  # of the logits: what sums in fp32 differ by even where the adapter changes next to nothing


class GroupKept(msgspec.Struct, frozen=True):
    """Of the modules of one name, all layers together. D = the update, W = the base's weight."""

    kept: float  # ||round(W + D) - W|| / ||D||
    unmoved: float  # share of the weights that rounding put back where they were


class MergeProof(msgspec.Struct, frozen=True):
    """merge.json."""

    step: int
    chosen: str  # why this checkpoint
    dtype: str
    adapter_changes_logits: float  # ||base + adapter - base|| / ||base||, on one seeded input
    merged_differs: float  # ||merged - (base + adapter)|| / ||base + adapter - base||
    groups: dict[str, GroupKept]
    greedy_frames: int  # said by base + adapter to a seeded prompt, PROBE_FRAMES at most
    greedy_frames_equal: int  # of them, said by the merged model too
    likeliest_frames_equal: (
        int  # of PROBE_FRAMES seeded frames, those after which all eight likeliest codes are the same
    )

    @property
    def least_kept(self) -> tuple[str, float]:
        """The group that lost most; ("", 1) where nothing is adapted."""
        return min(
            ((name, group.kept) for name, group in self.groups.items()), key=lambda item: item[1], default=("", 1.0)
        )


@dataclass
class Rounding:
    """Counted while layers are merged."""

    _update: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # sums of squares
    _kept: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _unmoved: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _count: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, group: str, before: Tensor, after: Tensor, written: Tensor) -> None:
        """before, after [out, in] float32; written: `after` in the dtype of the file."""
        moved = written.float() - before
        self._update[group] += float((after - before).double().square().sum())
        self._kept[group] += float(moved.double().square().sum())
        self._unmoved[group] += int(((moved == 0) & (after != before)).sum())
        self._count[group] += before.numel()

    def groups(self) -> dict[str, GroupKept]:
        return {
            name: GroupKept(
                (self._kept[name] / squares) ** 0.5 if squares else 1.0, self._unmoved[name] / self._count[name]
            )
            for name, squares in sorted(self._update.items())
        }


def check_logits(base: Tensor, adapted: Tensor, merged: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """(what the adapter changes, what merging differs by in parts of it). Raises CheckpointError where merging lost it."""
    effect, error = float((adapted - base).norm()), float((merged - adapted).norm())
    if not (torch.isfinite(adapted).all() and torch.isfinite(merged).all()):
        raise CheckpointError(
            "the merged model's logits are not finite on a seeded input; `checkpoints validate` says why"
        )
    if dtype == torch.float32 and error > MOST_FP32_ERROR * effect + NOISE * float(base.norm()):
        raise CheckpointError(
            f"the merged model is not base + adapter: its logits differ by {error / max(effect, 1e-30):.1%} of what the "
            "adapter changes; nothing was written; this is a fault of the program or of peft's version, please report it"
        )
    return effect / float(base.norm()), error / effect if effect else 0.0


def likeliest_codes(model: HiggsAudio) -> Tensor:
    """[PROBE_FRAMES, K]: the likeliest code behind each of as many seeded frames, for a model that ends at once."""
    size = (PROBE_FRAMES, model.config.num_codebooks, model.config.codebook_vocab)
    return probe_logits(model, audio_rows=PROBE_FRAMES)[-math.prod(size) :].view(size).argmax(dim=-1)


def greedy_codes(model: HiggsAudio, tokenizer_dir: Path) -> np.ndarray:
    """[K, T] uint16, T at most PROBE_FRAMES: what the model says to a seeded prompt, the likeliest code each time."""
    draw = np.random.default_rng(0)
    reference = draw.integers(0, CODEBOOK_SIZE, (NUM_CODEBOOKS, PROBE_FRAMES)).astype(np.uint16)
    tokenizer = load_tokenizer(tokenizer_dir)
    sample = cloning_sample(tokenizer, "مرحبا", reference, "صباح الخير")
    prompt = SequenceBuilder(tokenizer, SequenceSection(conditioning="codes")).prompt(sample)
    return generate(model, prompt, PROBE_FRAMES).codes
