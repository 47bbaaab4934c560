"""What one is asked to say, how codes are drawn for it, and what comes of it.

In: a prompt of `SequenceBuilder.prompt`. Out: raw codes without markers. A request may be cancelled at any time; what it has
said by then stays readable.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shards.delay_pattern import STREAM_BOS, undelay
from shards.sequence import FRAMES_PER_SECOND, Sequence
from train.model.generation.end_of_speech import until_end

__all__ = ["FRAMES_PER_SECOND", "GREEDY", "Request", "Sampling", "Speech"]


@dataclass(frozen=True)
class Sampling:
    """How the next code is drawn. temperature 0 is greedy and ignores the rest."""

    temperature: float = 1.0
    top_k: int = 50  # 0: off
    top_p: float = 0.95
    ras_window: int = 7  # columns; 0: off
    ras_max_repeats: int = 2
    seed: int = 0


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Speech:
    codes: np.ndarray  # [K, T] uint16
    stopped: bool  # False: cut at max_frames or cancelled, the model never ended


@dataclass(eq=False)
class Request:
    """One prompt on its way through an `Engine`."""

    prompt: Sequence
    max_frames: int  # 25 per second
    sampling: Sampling = GREEDY
    stopped: bool = False  # the model has ended by itself
    is_cancelled: bool = False
    _columns: list[np.ndarray] = field(default_factory=list)  # [n, K] each; the first column is all BOS

    def __post_init__(self) -> None:
        num_codebooks = self.prompt.codes.shape[0]
        self.max_columns = self.max_frames + num_codebooks + 1
        self.num_columns = 1
        self._columns.append(np.full((1, num_codebooks), STREAM_BOS))

    @property
    def is_done(self) -> bool:
        """Ended by itself, at its limit, or cancelled: nothing more will come."""
        return self.stopped or self.is_cancelled or self.num_columns >= self.max_columns

    @property
    def num_columns_left(self) -> int:
        return self.max_columns - self.num_columns

    @property
    def max_positions(self) -> int:
        """Positions of the cache that it can come to need."""
        return len(self.prompt) + self.max_columns

    def cancel(self) -> None:
        """Its slot is free from the next look at the device on."""
        self.is_cancelled = True

    def append(self, columns: np.ndarray) -> None:
        """Take columns [n, K] as the device made them; those behind the end are dropped."""
        columns, ends = until_end(columns[: self.num_columns_left])
        self.stopped |= ends
        self._columns.append(columns)
        self.num_columns += len(columns)

    def speech(self) -> Speech:
        """What has been said so far: the frames that are complete in every codebook."""
        codes = undelay(np.concatenate(self._columns).T)
        return Speech(codes[:, : self.max_frames], self.stopped)
