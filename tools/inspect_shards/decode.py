"""The sound that a sample's codes hold: the only honest check of what the model hears and learns to say."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shards.config import ModelSection, read_config
from shards.errors import ShardError
from shards.manifest import Dataset, decoder_of
from shards.sample import Sample


class DecodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelSection


def decode_sample(
    record: Dataset, sample: Sample, reference: bool, out: Path, config_path: Path | None, overrides: tuple[str, ...]
) -> float:
    """Write OUT, 24 kHz wav; returns its seconds. Raises ShardError where model.codec is not the data set's codec."""
    from shards.encoders.codec import load_codec, write_wave
    from shards.sequence import SAMPLE_RATE

    codec_dir = codec_of(record, config_path, overrides)
    wave = load_codec(codec_dir).decode(sample.reference_codes if reference else sample.target_codes)
    write_wave(out, wave)
    return len(wave) / SAMPLE_RATE


def codec_of(record: Dataset, config_path: Path | None, overrides: tuple[str, ...]) -> Path:
    """The folder of the codec that made the codes. Raises ShardError where model.codec is another one."""
    from shards.artifacts import codec_fingerprint, resolve

    config = read_config(DecodeConfig, config_path, overrides)
    codec_dir = resolve(config.model.codec, config.model.codec_revision, "model.codec")
    found = codec_fingerprint(codec_dir)
    if found != decoder_of(record.fingerprints.codec):
        raise ShardError(
            f"the codes were made with codec {record.fingerprints.codec[:16]}, model.codec = {config.model.codec!r} is "
            f"{found[:16]}, which would make another sound of them; name the data set's codec with --config or --set"
        )
    return codec_dir
