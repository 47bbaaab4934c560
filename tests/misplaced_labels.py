"""Packs whose labels stand where they must not, in the three ways that trainers are known to get wrong."""

from __future__ import annotations

import dataclasses

import torch

from shards.label_shift import IGNORE
from train.model.batch import PackedBatch

# What each does: by how many columns every codebook's labels are moved, and what a model that knows better says of it.
MISPLACED = {
    "unshifted": ([-1] * 8, "codebook 0 by +1"),  # every label is the column it stands at
    "shifted twice": ([1] * 8, "codebook 0 by -1"),
    "undelayed": (list(range(8)), "codebook 1 by -1, codebook 2 by -2"),
}


def displaced(batch: PackedBatch, columns: list[int]) -> PackedBatch:
    """The pack with labels [Na, K] taken from `columns` rows on, per codebook; IGNORE beyond the target."""
    dense = torch.full_like(batch.codes, IGNORE)
    dense[batch.audio_rows] = batch.audio_targets
    labels = torch.full_like(batch.audio_targets, IGNORE)
    for book, by in enumerate(columns):
        for place, row in enumerate(batch.audio_rows.tolist()):
            source = row + by
            if 0 <= source < len(dense) and batch.segments[source] == batch.segments[row]:
                labels[place, book] = dense[source, book]
    return dataclasses.replace(batch, audio_targets=labels)
