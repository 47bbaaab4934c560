"""What the loop asks of training data, whether it is planned or streamed: the seam between `train/data` and the spine.

In: SHARDS as the user wrote it. Out: packs for any step, the number of steps, a small batch for the preflight, the held-out
packs, and what the ranks must have in common. Every rank makes its own `Source` and calls it in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shards.manifest import Fingerprints
from shards.sample import Sample
from shards.sequence import SequenceBuilder
from train.data.feed import DamageLimits
from train.data.heaviest_pack import PackSource
from train.data.loader import LoaderShare
from train.data.stages import LoadedPack
from train.model.batch import PackedBatch
from train.model.conditioning import Conditioning
from train.world import World


@dataclass(frozen=True)
class HeldOut:
    """The held-out packs, the same ones every time, and what there is to log about them."""

    loaded_packs: Callable[[], Iterator[LoadedPack]]  # one pass over this rank's packs; every rank has as many
    max_bad_fraction: float
    num_samples: int = 0
    num_packs: int = 0
    num_too_long: int = 0
    data_sets: tuple[str, ...] = ("data",)  # names of those that the samples are of

    def __str__(self) -> str:
        skipped = f" (skipped: {self.num_too_long} longer than train.batch_tokens)" if self.num_too_long else ""
        return f"held out: {self.num_samples} samples in {self.num_packs} packs{skipped}"


class Source(Protocol):
    """Training data. Methods below `prepare` may be called only after it."""

    digest: str  # of the data set, or of the list of shards of a stream
    validation_digest: str  # of the data set in train.validation_data; "" without
    total_steps: int  # known after `prepare`
    data_sets: tuple[str, ...]  # their names in metrics, in order
    text_rules: list[str] | None  # what stage one did to the texts, known after `check`; None: shards do not say
    audio_edits: dict[str, float] | None  # the same of the clips: the keys of [audio] that were on

    def check(self, expected: Fingerprints, conditioning: Conditioning) -> Conditioning:
        """Refuse data that was not made for this model; settle what the reference enters as. Raises ShardError."""
        ...

    def require_apart(self) -> list[int]:
        """Refuse held-out data that are trained on as well, and warn of common speakers. Raises ConfigError.

        Returns the places of held-out rows with audio that is heard in training, for `leave_out`."""
        ...

    def leave_out(self, places: list[int]) -> None:
        """Evaluate without these rows of train.validation_data. Raises ConfigError where none is left."""
        ...

    def heaviest_packs(self, builder: SequenceBuilder, world: World) -> PackSource:
        """Packs to measure memory with, before anything is planned. Every rank must call this."""
        ...

    def prepare(
        self, builder: SequenceBuilder, batch_tokens: int | None, counts_path: Path | None, world: World
    ) -> None:
        """Plan with this budget. `counts_path`: where the first rank keeps the pack counts of epochs."""
        ...

    def describe(self) -> None:
        """Log what was planned and what was skipped."""
        ...

    def facts(self, epoch: int) -> dict[str, str]:
        """What all ranks must have in common when an epoch begins."""
        ...

    def limits(self) -> DamageLimits:
        """How many damaged samples are borne."""
        ...

    def loaded_packs(self, first_step: int, share: LoaderShare) -> Iterator[LoadedPack]:
        """This rank's packs of every step from `first_step` on, without end. Raises PipelineError."""
        ...

    def preflight_batch(self, num_samples: int) -> PackedBatch:
        """The first sound samples. Raises ShardError when there is none."""
        ...

    def held_out(self, world: World) -> HeldOut | None:
        """The held-out packs; None where nothing is held out. Raises ConfigError."""
        ...

    def listening_samples(self, num_samples: int) -> list[Sample]:
        """Samples for the listening set, of held-out speakers where there are any."""
        ...
