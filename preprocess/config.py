"""Sections of pipeline.toml that stage one reads; units and reasons stand in pipeline.toml beside each key."""

from __future__ import annotations

from typing import Annotated

import msgspec

from preprocess.audio import AudioLimits
from preprocess.sound_edits import AudioSection
from preprocess.text import TEXT_RULES, TextSection
from shards.config import FeaturesSection, ModelSection
from shards.manifest import Precision


class PreprocessSection(msgspec.Struct, frozen=True, kw_only=True):
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    workers: Annotated[int, msgspec.Meta(ge=0)] = 0  # 0: one per usable core
    samples_per_shard: Annotated[int, msgspec.Meta(ge=1)] = 1024
    max_reject_fraction: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.05
    min_duration_s: Annotated[float, msgspec.Meta(ge=0.1)] = 0.5
    max_duration_s: Annotated[float, msgspec.Meta(gt=0.0, le=30.0)] = 30.0  # Whisper's window
    max_clipped_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.02
    codec_precision: Precision = "fp32"

    def audio_limits(self) -> AudioLimits:
        return AudioLimits(self.min_duration_s, self.max_duration_s, self.max_clipped_share)


class PreprocessConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelSection
    features: FeaturesSection
    text: TextSection
    audio: AudioSection
    preprocess: PreprocessSection


def deciding_keys(config: PreprocessConfig) -> dict[str, object]:
    """What decides the output bytes: everything but the models' names (their fingerprints do) and the worker count."""
    # Absent when off: a job and a data set made before there was the section, or the key, are the same as today's.
    edits = {} if config.audio.is_off else {"audio": msgspec.to_builtins(config.audio)}
    absent = {"workers"} if config.preprocess.codec_precision != "fp32" else {"workers", "codec_precision"}
    return {
        "rules": {"text": TEXT_RULES},
        "features": {"whisper": config.features.whisper},
        "text": msgspec.to_builtins(config.text),
        "preprocess": {
            key: value for key, value in msgspec.to_builtins(config.preprocess).items() if key not in absent
        },
        **edits,
    }
