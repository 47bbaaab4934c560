"""A loaded voice model: model, codec and sequence builder together, for every tool that speaks.

In: a merged folder, or a base model and an adapter. Out: a `Speaker`. The prompt is built by the same sequence builder as in
training, with the settings that the merged folder (`higgs_voice.json`) or the adapter's checkpoint (`config.toml`)
remembers. A merged folder is not spoken with a codec other than the one it was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from shards.config import FeaturesSection, ModelSection, SequenceSection, read_config

if TYPE_CHECKING:
    from preprocess.audio import AudioFile
    from shards.encoders.codec import Codec
    from shards.sample import Sample
    from shards.sequence import SequenceBuilder
    from tools.checkpoints.model_folder import Voice
    from train.model.decoder import HiggsAudio
    from train.model.generate import Sampling, Speech


class SpeakConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelSection
    features: FeaturesSection
    sequence: SequenceSection


@dataclass(frozen=True)
class Speaker:
    """A loaded model, codec and sequence builder: all that speaking needs."""

    model: HiggsAudio
    codec: Codec
    builder: SequenceBuilder
    model_dir: Path

    def say(
        self, reference: Path, reference_text: str, text: str, max_frames: int, sampling: Sampling
    ) -> tuple[Speech, np.ndarray]:
        """The codes, and the wave [S] float32 at 24 kHz."""
        from preprocess.audio import CODEC_RATE, WHISPER_RATE
        from shards.artifacts import load_tokenizer
        from shards.cloning import cloning_sample
        from train.model.generate import generate

        audio = read_reference(reference)
        codes = self.codec.encode(audio.at(CODEC_RATE))
        sample = cloning_sample(load_tokenizer(self.model_dir), reference_text, codes, text)
        if self.builder.uses_whisper:
            sample = with_mel(sample, audio.at(WHISPER_RATE))
        speech = generate(self.model, self.builder.prompt(sample), max_frames, sampling)
        return speech, self.codec.decode(speech.codes)


def load_speaker(model_dir: Path, adapter: Path | None, config: SpeakConfig, device: str) -> Speaker:
    """Load everything. Raises PipelineError where model, adapter and codec do not belong together."""
    import torch

    from shards.artifacts import codec_fingerprint, load_tokenizer, resolve
    from shards.encoders.codec import load_codec
    from shards.errors import CheckpointError
    from shards.sequence import SequenceBuilder
    from train.model.conditioning import decide_conditioning
    from train.model.lora import load_adapter
    from train.model.weights import load_model
    from train.run_folder.identity import check_adapter, find_model_files

    voice = read_voice(model_dir)
    if adapter and (adapter.parent / "config.toml").is_file():  # of the checkpoint that the adapter lies in
        trained = read_config(SpeakConfig, adapter.parent / "config.toml")
        config = msgspec.structs.replace(config, sequence=trained.sequence, features=trained.features)
    base = resolve(str(model_dir), config.model.revision if str(model_dir) == config.model.base else "", "MODEL")
    if not (base / "config.json").is_file():
        raise CheckpointError(f"{model_dir}: no model here; give the OUT folder of `checkpoints merge` or a base model")
    codec_dir = resolve(config.model.codec, config.model.codec_revision, "model.codec")
    if voice and voice.codec_fingerprint != codec_fingerprint(codec_dir):
        raise CheckpointError(
            f"{model_dir} was trained with codec {voice.codec} ({voice.codec_fingerprint[:16]}), model.codec is "
            f"{config.model.codec} ({codec_fingerprint(codec_dir)[:16]}); name that codec in pipeline.toml"
        )
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    sequence = voice.sequence if voice else config.sequence
    conditioning = decide_conditioning(sequence, config.features, base)
    sequence = msgspec.structs.replace(sequence, conditioning=conditioning.name)
    if adapter:
        named = msgspec.structs.replace(config.model, base=str(model_dir))
        check_adapter(adapter, find_model_files(base, codec_dir, conditioning), named, config.features)
    # An adapter may hold the text head, which speaking does not need, so it must be there to take it.
    model = load_model(base, dtype, where, text_head=adapter is not None, conditioning=conditioning)
    if adapter:
        load_adapter(model, adapter)
    builder = SequenceBuilder(load_tokenizer(base), sequence)
    return Speaker(model.eval(), load_codec(codec_dir, str(where)), builder, base)


def read_voice(model_dir: Path) -> Voice | None:
    """higgs_voice.json of a merged folder; None for a base model."""
    from shards.manifest import read_record
    from tools.checkpoints.model_folder import VOICE_FILE, Voice

    path = model_dir / VOICE_FILE
    return read_record(path, Voice) if path.is_file() else None


def with_mel(sample: Sample, wave: np.ndarray) -> Sample:
    """The sample with its reference's Whisper features, stored as stage one stores them; wave [n] float32 at 16 kHz."""
    import dataclasses

    from preprocess.features import stored_mel
    from shards.sample import MelFacts, compress, write_npy

    frames, floor = stored_mel(wave)
    facts = msgspec.structs.replace(sample.facts, mel=MelFacts(len(wave), floor))
    return dataclasses.replace(sample, facts=facts, reference_mel_zst=compress(write_npy(frames.astype(np.float16))))


def read_reference(path: Path) -> AudioFile:
    """The reference, read and checked as stage one does."""
    from preprocess.audio import AudioLimits, decode, read_bytes
    from preprocess.reasons import AudioFault
    from shards.errors import DataError

    try:
        return decode(read_bytes(str(path)), AudioLimits())
    except AudioFault as fault:
        raise DataError(f"--reference {path}: {fault.detail}") from None
