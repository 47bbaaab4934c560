"""Ids and labels against boson's `prepare_chatml_sample` and collator: the user's sample and twenty generated ones."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("boson_multimodal", reason="boson's environment: make test-boson")

from boson_inputs import as_written_row, clone_row, collate, dataset_sample

from shards.config import RELEASED_SYSTEM_PROMPT, SequenceSection
from shards.label_shift import IGNORE
from shards.sample import Sample, Turn
from shards.sequence import AUDIO_OUT, WHISPER, Sequence, SequenceBuilder, encode_text

# The user's own sample: its instruction says less than its assistant, as real lists do.
GUIDE_TEXTS = [
    "You are a helpful assistant capable of generating speech in the voice of the provided reference audio.",
    "مثل ما قال هاك متدبس متدس ايه ما اقدر لان هذا الحديد وين ودي؟",
    "Please generate speech for given text in reference audio's voice: والميزة فيها يعني الكيس الماتيريال.",
    "والميزة فيها يعني الكيس الماتيريال، هذا انت بيتي هو كاربون.",
]


@pytest.fixture(scope="module")
def boson_tokenizer(model_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def samples(tokenizer, make_sample) -> list[Sample]:
    """The guide's sample, and twenty with other turns: no system, several texts, start_index, a second assistant turn."""
    guide = with_texts(make_sample(100, 30, 45), GUIDE_TEXTS, tokenizer)
    generated = [make_sample(seed, 1 + 3 * seed, 1 + 7 * (seed % 5)) for seed in range(20)]
    variants = [
        [Turn("user", [1, "reference", 2]), Turn("assistant", [3, "target"])],
        [Turn("system", [0]), Turn("user", ["reference", 1, 2]), Turn("assistant", ["target"])],
        [Turn("system", [0, "reference"]), Turn("user", [1, 2]), Turn("assistant", [3, "target", 1])],
        [Turn("user", [1]), Turn("assistant", ["reference"]), Turn("user", [2]), Turn("assistant", ["target"])],
        [Turn("user", [1, "reference", 2]), Turn("assistant", [3]), Turn("assistant", ["target"])],
    ]
    changed = [
        with_turns(sample, variants[number % 5], start_index=3 if number % 5 == 3 else None)
        for number, sample in enumerate(generated[:15])
    ]
    return [guide, *changed, *generated[15:]]


def with_texts(sample: Sample, texts: list[str], tokenizer) -> Sample:
    import dataclasses

    ids = [encode_text(tokenizer, text) for text in texts]
    facts = msgspec.structs.replace(sample.facts, texts=texts, text_token_counts=[len(item) for item in ids])
    return dataclasses.replace(sample, facts=facts, text_ids=np.concatenate(ids))


def with_turns(sample: Sample, turns: list[Turn], start_index: int | None) -> Sample:
    import dataclasses

    return dataclasses.replace(
        sample, facts=msgspec.structs.replace(sample.facts, turns=turns, start_index=start_index)
    )


def equal_to_boson(sequence: Sequence, sample: Sample, row: dict, tokenizer) -> None:
    """`sequence` holds the expanded form: every placeholder is as many positions as its audio has columns."""
    codes = [sample.reference_codes, sample.target_codes]
    batch = collate([dataset_sample(row, tokenizer, codes)])
    ids, labels = batch.input_ids[0].numpy(), batch.label_ids[0].numpy()
    num_real = int(batch.attention_mask.sum())
    ids, labels = ids[:num_real], labels[:num_real]

    audio = iter([part.shape[1] + 9 for part in codes])
    widths = [next(audio) if token in (WHISPER, AUDIO_OUT) else 1 for token in ids]
    expanded = np.repeat(np.where(ids == WHISPER, AUDIO_OUT, ids), widths)
    np.testing.assert_array_equal(sequence.token_ids, expanded)
    np.testing.assert_array_equal(sequence.next_token, [*np.repeat(labels, widths)[1:], IGNORE])

    # boson keeps columns of AUDIO and of AUDIO_OUT apart; ours stand in the order of their positions.
    is_in = ids[(ids == WHISPER) | (ids == AUDIO_OUT)] == WHISPER
    kinds = {True: iter([]), False: iter([])}
    for kind, columns, starts in (
        (True, batch.audio_in_ids, batch.audio_in_ids_start),
        (False, batch.audio_out_ids, batch.audio_out_ids_start),
    ):
        kinds[kind] = iter(np.split(columns.numpy(), starts.numpy()[1:], axis=1) if len(starts) else [])
    columns = np.concatenate([next(kinds[bool(kind)]) for kind in is_in], axis=1)
    np.testing.assert_array_equal(sequence.codes, columns)

    out_labels = batch.label_audio_ids.numpy()
    is_out_column = np.repeat(~is_in, [part.shape[1] + 9 for part in codes])
    shifted = np.concatenate([out_labels[:, 1:], np.full((8, 1), IGNORE)], axis=1)
    expected = np.full(sequence.next_codes.shape, IGNORE)
    expected[:, is_out_column] = shifted
    np.testing.assert_array_equal(sequence.next_codes, expected)


@pytest.mark.parametrize("number", range(21))
def test_as_written_equals_boson(samples, tokenizer, boson_tokenizer, number):
    sample = samples[number]
    builder = SequenceBuilder(tokenizer, SequenceSection(layout="as_written"))
    row = as_written_row(sample)
    # boson also learns a reference that an assistant speaks, unless start_index leaves it out; ours never does.
    spoken_by_assistant = any(turn.role == "assistant" and "reference" in turn.items for turn in sample.facts.turns)
    assert not spoken_by_assistant or sample.facts.start_index is not None
    equal_to_boson(builder.training(sample), sample, row, boson_tokenizer)


@pytest.mark.parametrize("number", [0, 15, 20])
def test_clone_equals_boson_with_the_released_conversation(samples, tokenizer, boson_tokenizer, number):
    sample = samples[number]
    sequence = SequenceBuilder(tokenizer, SequenceSection(layout="clone")).training(sample)
    equal_to_boson(sequence, sample, clone_row(sample, RELEASED_SYSTEM_PROMPT), boson_tokenizer)


def test_bosons_collator_destroys_labels_and_ours_does_not(samples, tokenizer, boson_tokenizer):
    """Why everything above is made anew for every batch; and the reason our builder holds no labels between calls."""
    sample = samples[0]
    codes = [sample.reference_codes, sample.target_codes]
    theirs = dataset_sample(as_written_row(sample), boson_tokenizer, codes)
    first, second = (int((collate([theirs]).label_audio_ids >= 0).sum()) for _ in range(2))
    assert first > 0
    assert second == 0
    builder = SequenceBuilder(tokenizer, SequenceSection(layout="as_written"))
    once, again = builder.training(sample), builder.training(sample)
    np.testing.assert_array_equal(once.next_codes, again.next_codes)
    np.testing.assert_array_equal(once.next_token, again.next_token)
    assert (again.next_codes >= 0).sum() == first
