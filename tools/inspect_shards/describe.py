"""One sample for a person: its texts, turns, audio and codes."""

from __future__ import annotations

from collections.abc import Iterator

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
