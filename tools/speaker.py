"""A loaded voice model: model, codec and sequence builder together, for every tool that speaks.

In: a merged or quantized folder, or a base model and an adapter. Out: a `Speaker`. The prompt is built by the same sequence
builder as in training, with the settings that the merged folder (`higgs_voice.json`) or the adapter's checkpoint (`config.toml`)
remembers. A merged folder is not spoken with a codec other than the one it was trained with.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from preprocess.sound_edits import AudioSection
from preprocess.text import TextSection
from shards.config import FeaturesSection, ModelSection, SequenceSection, parse_toml, read_config

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from preprocess.audio import AudioFile
    from shards.encoders.codec import Codec
    from shards.sample import Sample
    from shards.sequence import Sequence, SequenceBuilder
    from tools.checkpoints.model_folder import Voice
    from tools.reference import Reference
    from train.model.decoder import HiggsAudio

log = logging.getLogger("speak")


class SpeakConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelSection
    features: FeaturesSection
    sequence: SequenceSection
    text: TextSection
    audio: AudioSection


@dataclass(frozen=True)
class Speaker:
    """A loaded model, codec and sequence builder: all that speaking needs."""

    model: HiggsAudio
    codec: Codec
    builder: SequenceBuilder
    tokenizer: Tokenizer
    rules: TextSection  # what texts go through, as in training
    edits: AudioSection  # what recordings of a voice go through, as the clips of its training did

    def reference(self, recordings: list[AudioFile], text: str | None, codes: np.ndarray | None = None) -> Reference:
        """A voice ready for prompts: one or several recordings, and what is said in them. Raises DataError.

        codes: those of the recordings [8, T] uint16, where they are known already.
        """
        from preprocess.audio import CODEC_RATE, WHISPER_RATE
        from tools.prompt_text import prompt_text, warn_of_garbled
        from tools.reference import Reference, edited_recordings, joined_wave

        recordings = edited_recordings(recordings, self.edits)
        said = None if text is None else prompt_text(text, self.rules, "the reference's text")
        if said and not self.builder.reads_reference_text:
            log.warning("the reference's text is not used: this voice was trained without (reference_text_dropout = 1)")
        warn_of_garbled(said or "", "the reference's text")
        if codes is None:
            codes = self.codec.encode(joined_wave(recordings, CODEC_RATE))
        return Reference(codes, said, joined_wave(recordings, WHISPER_RATE) if self.builder.uses_whisper else None)

    def prompt(self, reference: Reference, text: str) -> Sequence:
        """What the model continues to say `text`. Raises DataError for a text that cannot be said."""
        return self.builder.prompt(self.sample(reference, text))

    def part_prompt(self, reference: Reference, said: str) -> Sequence:
        """As `prompt`, of a text, or a part of one, that `prompt_text` has cleaned: stage one cleans once, and twice is not
        once (`text.normalize = ["nfc", "presentation_forms"]` leaves marks in an order that "nfc" would change)."""
        return self.builder.prompt(self._sample(reference, said))

    def sample(self, reference: Reference, text: str) -> Sample:
        """The request as stage one would store it. Raises DataError for a text that cannot be said."""
        from tools.prompt_text import prompt_text

        return self._sample(reference, prompt_text(text, self.rules, "the text"))

    def _sample(self, reference: Reference, said: str) -> Sample:
        from shards.cloning import cloning_sample
        from shards.errors import DataError
        from shards.sample_checks import check_token_ids

        sample = cloning_sample(self.tokenizer, reference.text, reference.codes, said)
        try:
            check_token_ids(sample)  # a tokenizer with a normalizer of its own makes control tokens of other spellings
        except ValueError as fault:
            raise DataError(f"the request: {fault}; write it in plain letters") from None
        return sample if reference.wave_16k is None else with_mel(sample, reference.wave_16k)


def load_speaker(
    model_dir: Path, adapter: Path | None, config: SpeakConfig, device: str, dtype: torch.dtype | None = None
) -> Speaker:
    """Load everything; `dtype` None is bfloat16 on CUDA, float32 on a CPU.

    This is the only place that knows what kinds of models there are: merged, or base and adapter. Raises PipelineError
    where model, adapter and codec do not belong together.
    """
    import torch

    from shards.artifacts import load_tokenizer, resolve
    from shards.encoders.codec import load_codec
    from shards.errors import CheckpointError
    from shards.sequence import SequenceBuilder
    from train.model.conditioning import decide_conditioning
    from train.model.lora import load_adapter
    from train.model.quantized import refuse_quantized
    from train.model.weights import load_model
    from train.run_folder.identity import check_adapter, find_model_files

    base = resolve(str(model_dir), config.model.revision if str(model_dir) == config.model.base else "", "MODEL")
    if not (base / "config.json").is_file():
        raise CheckpointError(f"{model_dir}: no model here; give the OUT folder of `checkpoints merge` or a base model")
    codec_dir = find_codec(base, config)
    if voice := read_voice(base):
        rules = msgspec.structs.replace(config.text, normalize=voice.normalize)
        config = msgspec.structs.replace(config, sequence=voice.sequence, text=rules, audio=voice.audio)
    trained = adapter.resolve().parent / "config.toml" if adapter else None  # of the checkpoint that it lies in
    if trained and trained.is_file():  # newer than what a merged base remembers
        config = as_trained(trained, config)
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    conditioning = decide_conditioning(config.sequence, config.features, base)
    sequence = msgspec.structs.replace(config.sequence, conditioning=conditioning.name)
    if adapter:
        refuse_quantized(base, "no adapter fits them")
        named = msgspec.structs.replace(config.model, base=str(model_dir))
        check_adapter(adapter, find_model_files(base, codec_dir, conditioning), named, config.features)
    # An adapter may hold the text head, which speaking does not need, so it must be there to take it.
    model = load_model(base, dtype, where, text_head=adapter is not None, conditioning=conditioning)
    if adapter:
        load_adapter(model, adapter)
    tokenizer = load_tokenizer(base)
    builder = SequenceBuilder(tokenizer, sequence)
    return Speaker(model.eval(), load_codec(codec_dir, str(where)), builder, tokenizer, config.text, config.audio)


def find_codec(model_dir: Path, config: SpeakConfig) -> Path:
    """The folder of the model's codec: the configured one, or the one it was trained with where none is configured.

    Raises CheckpointError for a codec other than the one that a merged model was trained with.
    """
    from shards.artifacts import codec_fingerprint, resolve
    from shards.errors import CheckpointError

    voice, model = read_voice(model_dir), config.model
    if voice and (model.codec, model.codec_revision) == (ModelSection().codec, ModelSection().codec_revision):
        model = msgspec.structs.replace(model, codec=voice.codec, codec_revision=voice.codec_revision)
    folder = resolve(model.codec, model.codec_revision, "model.codec")
    if voice and voice.codec_fingerprint != codec_fingerprint(folder):
        raise CheckpointError(
            f"{model_dir} was trained with codec {voice.codec} ({voice.codec_fingerprint[:16]}), model.codec is "
            f"{model.codec} ({codec_fingerprint(folder)[:16]}); name that codec in pipeline.toml"
        )
    return folder


def as_trained(checkpoint_config: Path, config: SpeakConfig) -> SpeakConfig:
    """The configuration with what the adapter's checkpoint remembers of its training.

    [text] and [audio] stand there only if the shards said what their texts and clips had gone through.
    """
    trained = read_config(SpeakConfig, checkpoint_config)
    config = msgspec.structs.replace(config, sequence=trained.sequence, features=trained.features)
    remembered = parse_toml(checkpoint_config.read_text(encoding="utf-8")).keys() & {"text", "audio"}
    return msgspec.structs.replace(config, **{name: getattr(trained, name) for name in remembered})


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
