"""How speech begins and ends in the columns of generation: forced markers, and the column behind which nothing comes.

In: drawn codes. Out: columns in the delay pattern of `shards.delay_pattern`, and where a request has ended. The rules are
those of transformers' `HiggsAudioV2DelayPatternLogitsProcessor`. The surprising one: any codebook's EOS begins the end, not
only the first's; the price of a wrong EOS is cut speech, as in the references.

Letters: B slots, K codebooks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shards.delay_pattern import STREAM_BOS, STREAM_EOS

NEVER = 1 << 40  # number of a column that has not come


def delay_pattern(drawn: Tensor, books: Tensor, number: Tensor, first_eos: Tensor) -> tuple[Tensor, Tensor]:
    """Force the staircases: codes [B, K] of each slot's column `number` [B] -> (the column [B, K], first_eos [B]).

    Codebook k is BOS in the first k + 1 columns, and EOS from k + 1 columns after the first EOS on. first_eos is NEVER until
    one has come.
    """
    column = torch.where(books >= number[:, None], STREAM_BOS, drawn)
    column = torch.where(books < (number - first_eos)[:, None], STREAM_EOS, column)
    has_eos = (column == STREAM_EOS).any(dim=-1)
    return column, torch.minimum(first_eos, torch.where(has_eos, number, NEVER))


def until_end(columns: np.ndarray) -> tuple[np.ndarray, bool]:
    """Columns [n, K] -> (those up to the first that is EOS in every codebook, that one included; whether there is one)."""
    ends = np.flatnonzero((columns == STREAM_EOS).all(axis=1))
    return (columns[: ends[0] + 1], True) if len(ends) else (columns, False)
