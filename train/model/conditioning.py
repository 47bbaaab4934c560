"""How a reference enters the model: as codes alone, or as Whisper rows in front of its codes.

In: the configuration, the base model's folder and what the shards hold. Out: one decision, printed in one line and
written into the run's configuration. The released checkpoint has no Whisper tower, so "whisper+codes" on it takes the
encoder of a Whisper checkpoint, frozen, and trains a projection that starts at zero: rows that say nothing until they
have learned to. The price is that such a model speaks with this project and with boson's class, not with transformers'.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.artifacts import resolve, whisper_fingerprint
from shards.config import FeaturesSection, SequenceSection
from shards.encoders.whisper_tower import WhisperSizes, read_whisper_sizes
from shards.errors import ConfigError, ShardError
from shards.manifest import Dataset


@dataclass(frozen=True)
class Conditioning:
    """`tower_dir` None: codes alone."""

    why: str
    tower_dir: Path | None = None  # a Whisper checkpoint, or the base model itself where it has a tower
    sizes: WhisperSizes | None = None
    has_projector: bool = False  # in the base; else it starts at zero and is trained whole
    runs_tower: bool = True  # False: the shards hold the tower's states

    @property
    def name(self) -> str:
        return "whisper+codes" if self.tower_dir else "codes"

    def __str__(self) -> str:
        return f"conditioning {self.name} ({self.why})"


CODES = Conditioning("codes alone were asked for")


def decide_conditioning(section: SequenceSection, features: FeaturesSection, base_dir: Path) -> Conditioning:
    """What is in force for this base model. May fetch `features.whisper_model`. Raises PipelineError."""
    if section.conditioning == "codes":
        return Conditioning('sequence.conditioning = "codes"')
    sizes = read_whisper_sizes(base_dir)
    if sizes:
        return Conditioning("the checkpoint's own Whisper tower", base_dir, sizes, has_projector=True)
    if section.conditioning == "auto":
        return Conditioning("the checkpoint has no Whisper tower")
    whisper_dir = resolve(features.whisper_model, features.whisper_revision, "features.whisper_model")
    sizes = read_whisper_sizes(whisper_dir)
    why = f"tower of {features.whisper_model}, frozen; the projection starts at zero and is trained"
    return Conditioning(why, whisper_dir, sizes)


def fit_to_shards(conditioning: Conditioning, dataset: Dataset, index: np.ndarray) -> Conditioning:
    """The decision checked against a data set. Raises ConfigError or ShardError saying what the shards lack."""
    if conditioning.tower_dir is None:
        return conditioning
    lacking = int((index["mel_samples"] == 0).sum())
    if lacking:
        raise ConfigError(
            f"{conditioning}: {lacking} of {len(index)} samples have no Whisper features of their reference; run "
            'preprocess with features.whisper = "mel", or set sequence.conditioning = "codes"'
        )
    stored = dataset.fingerprints.whisper
    if stored is None:
        return conditioning
    wanted = whisper_fingerprint(conditioning.tower_dir)
    if stored != wanted:
        raise ShardError(
            f"{conditioning}: the shards hold states of encoder {stored[:16]}, this tower is {wanted[:16]}; name the "
            "encoder they were made with in features.whisper_model, or run preprocess again"
        )
    why = f"{conditioning.why}; the shards hold its states"
    return dataclasses.replace(conditioning, why=why, runs_tower=False)
