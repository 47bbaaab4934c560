"""One sample for a person: its texts, turns, audio and codes, or what the model reads and learns position by position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from shards.sample import Sample


def describe(sample: Sample) -> Iterator[str]:
    facts = sample.facts
    yield f"key {sample.key}   id {facts.id}   row {facts.row}   speaker {facts.speaker}"
    for turn in facts.turns:
        yield f"{turn.role}:"
        for item in turn.items:
            if isinstance(item, int):
                yield f"  text  {facts.text_token_counts[item]:4d} tokens  {facts.texts[item]}"
            else:
                audio = facts.reference if item == "reference" else facts.target
                length = f"{audio.duration_s:.3f} s at {audio.sample_rate} Hz, {audio.num_frames} frames"
                yield f"  audio {item}: {length}, {audio.path}"
    yield f"clone layout says: reference {facts.texts[facts.reference_text]!r}, target {facts.texts[facts.target_text]!r}"
    for name, codes in (("reference", sample.reference_codes), ("target", sample.target_codes)):
        distinct = [len(np.unique(book)) for book in codes]
        yield f"{name} codes {codes.dtype}{list(codes.shape)}, distinct per codebook {distinct}, first frames:"
        for book, row in enumerate(codes[:, :12]):
            yield f"  codebook {book}: " + " ".join(f"{code:4d}" for code in row)
    mel = sample.reference_mel()
    yield (
        f"mel: {mel.dtype}{list(mel.shape)}, floor {facts.mel.floor:.4f}"
        if mel is not None and facts.mel
        else "mel: none"
    )
    states = sample.reference_whisper()
    if states is not None:
        yield f"Whisper states: {states.dtype}{list(states.shape)}"
    yield f"warnings: {', '.join(facts.warnings) or 'none'}   extra keys: {', '.join(facts.extra) or 'none'}"


def describe_sequence(sample: Sample, config_path: Path | None, overrides: tuple[str, ...]) -> Iterator[str]:
    """The sample as training with this configuration builds it."""
    from shards.artifacts import load_tokenizer, resolve
    from shards.config import read_config
    from shards.sequence import SequenceBuilder
    from tools.inspect_shards.show_sequence import sequence_lines
    from train.config import TrainConfig
    from train.model.conditioning import decide_conditioning

    config = read_config(TrainConfig, config_path, overrides)
    base_dir = resolve(config.model.base, config.model.revision, "model.base")
    conditioning = decide_conditioning(config.sequence, config.features, base_dir)
    section = msgspec.structs.replace(config.sequence, conditioning=conditioning.name)
    yield f"layout {section.layout}, {conditioning}"
    tokenizer = load_tokenizer(base_dir)
    sequence = SequenceBuilder(tokenizer, section).training(sample)
    yield from sequence_lines(sequence, tokenizer, config.loss.text_loss_weight, config.loss.audio_loss_weight)
