"""The sequence builder: delay pattern, labels, layouts, lengths. Each test is a bug that made someone's model silent."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from shards.config import SequenceSection
from shards.delay_pattern import STREAM_BOS, STREAM_EOS, delay, undelay
from shards.errors import ConfigError
from shards.label_shift import IGNORE, next_columns
from shards.sequence import AUDIO_BOS, AUDIO_EOS, AUDIO_OUT, AUDIO_OUT_BOS, EOT, SequenceBuilder, encode_text

SMALL = np.array([[1, 2, 3], [11, 12, 13]])


def test_delay_pattern_is_the_released_one():
    # Two codebooks, three frames: the example both reference implementations agree on.
    assert delay(SMALL).tolist() == [[1024, 1, 2, 3, 1025, 1025], [1024, 1024, 11, 12, 13, 1025]]


def test_targets_are_the_next_column_with_one_end_per_codebook():
    columns, targets = delay(SMALL), next_columns(SMALL)
    assert targets.tolist() == [[1, 2, 3, 1025, -100, -100], [-100, 11, 12, 13, 1025, -100]]
    learned = targets[:, :-1] != IGNORE
    np.testing.assert_array_equal(targets[:, :-1][learned], columns[:, 1:][learned])
    assert ((targets == STREAM_EOS).sum(axis=1) == 1).all()


@pytest.mark.parametrize("num_frames", [1, 2, 7, 8, 100])
def test_undelay_inverts_delay_and_drops_markers(num_frames):
    codes = np.random.default_rng(num_frames).integers(0, 1024, (8, num_frames))
    np.testing.assert_array_equal(undelay(delay(codes)), codes)


def test_undelay_of_cut_speech_keeps_only_complete_frames():
    codes = np.random.default_rng(0).integers(0, 1024, (8, 50))
    cut = delay(codes)[:, :30]  # the model never said end of speech
    np.testing.assert_array_equal(undelay(cut), codes[:, :22])
    assert undelay(cut).max() < 1024


@pytest.fixture(params=["clone", "as_written"])
def builder(request, tokenizer) -> SequenceBuilder:
    return SequenceBuilder(tokenizer, SequenceSection(layout=request.param))


def test_only_the_target_is_learned_and_every_codebook_ends_once(builder, make_sample):
    sample = make_sample(1, reference_frames=12, target_frames=20)
    sequence = builder.training(sample)
    start, end = sequence.target_columns
    assert end - start == 20 + 9
    outside = np.ones(sequence.codes.shape[1], dtype=bool)
    outside[start:end] = False
    assert (sequence.next_codes[:, outside] == IGNORE).all(), "the reference must not be learned"
    assert ((sequence.next_codes == STREAM_EOS).sum(axis=1) == 1).all()
    for k in range(8):
        learned = sequence.next_codes[k][sequence.next_codes[k] != IGNORE]
        np.testing.assert_array_equal(learned, [*sample.target_codes[k], STREAM_EOS])


def test_every_learned_token_is_the_next_token(builder, make_sample):
    sequence = builder.training(make_sample(2))
    learned = np.flatnonzero(sequence.next_token != IGNORE)
    assert len(learned) >= 3
    np.testing.assert_array_equal(sequence.next_token[learned], sequence.token_ids[learned + 1])
    assert AUDIO_OUT not in sequence.next_token
    assert set(sequence.next_token[learned][-2:]) == {AUDIO_EOS, EOT}, "after speech the turn must end"


def test_clone_learns_nothing_of_the_prompt(tokenizer, make_sample):
    sequence = SequenceBuilder(tokenizer, SequenceSection()).training(make_sample(2))
    assert sequence.next_token[sequence.next_token != IGNORE].tolist() == [AUDIO_OUT_BOS, AUDIO_EOS, EOT]


def test_clone_layout_is_the_released_prompt(tokenizer, make_sample):
    sample = make_sample(5, 4, 6)
    sequence = SequenceBuilder(tokenizer, SequenceSection(system_prompt="S")).training(sample)
    reference, target = (sample.facts.texts[i] for i in (1, 3))
    written = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{reference}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>{'<|AUDIO_OUT|>' * 13}<|audio_eos|><|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{target}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>{'<|AUDIO_OUT|>' * 15}<|audio_eos|><|eot_id|>"
    )
    assert sequence.token_ids.tolist() == encode_text(tokenizer, written).tolist()


def test_as_written_keeps_the_turns(tokenizer, make_sample):
    sample = make_sample(5, 4, 6)
    sequence = SequenceBuilder(tokenizer, SequenceSection(layout="as_written")).training(sample)
    system, reference, instruction, target = sample.facts.texts
    written = (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{reference}<|audio_bos|>{'<|AUDIO_OUT|>' * 13}<|audio_eos|>"
        f"{instruction}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{target}"
        f"<|audio_out_bos|>{'<|AUDIO_OUT|>' * 15}<|audio_eos|><|eot_id|>"
    )
    assert sequence.token_ids.tolist() == encode_text(tokenizer, written).tolist()
    assert (sequence.token_ids == AUDIO_BOS).sum() == 1
    learned = sequence.next_token[sequence.next_token != IGNORE].tolist()
    assert learned == [*encode_text(tokenizer, target).tolist(), AUDIO_OUT_BOS, AUDIO_EOS, EOT]


def test_prompt_is_the_training_sequence_cut_before_the_target(builder, make_sample):
    sample = make_sample(4, 10, 12)
    whole, prompt = builder.training(sample), builder.prompt(sample)
    np.testing.assert_array_equal(prompt.token_ids, whole.token_ids[: len(prompt)])
    assert prompt.token_ids[-1] == AUDIO_OUT_BOS
    assert whole.token_ids[len(prompt)] == AUDIO_OUT
    np.testing.assert_array_equal(prompt.codes, whole.codes[:, : prompt.codes.shape[1]])
    assert whole.codes[0, prompt.codes.shape[1]] == STREAM_BOS
    unseen = dataclasses.replace(sample, target_codes=np.zeros((8, 0), np.uint16))
    np.testing.assert_array_equal(builder.prompt(unseen).token_ids, prompt.token_ids)


def test_building_twice_gives_the_same_labels(builder, make_sample):
    sample = make_sample(6)
    first, second = builder.training(sample), builder.training(sample)
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))


def test_start_index_silences_earlier_assistant_text(tokenizer, make_sample):
    sample = make_sample(7)
    builder = SequenceBuilder(tokenizer, SequenceSection(layout="as_written"))
    later = dataclasses.replace(sample, facts=msgspec.structs.replace(sample.facts, start_index=3))
    assert (builder.training(later).next_token == IGNORE).all()
    assert (builder.training(later).next_codes != IGNORE).any(), "the target's codes are learned all the same"


@pytest.mark.parametrize("layout", ["clone", "as_written"])
@pytest.mark.parametrize("system_prompt", ["", "Generate audio."])
def test_lengths_from_the_index_equal_the_built_sequence(
    tmp_path, tokenizer, make_sample, make_dataset, layout, system_prompt
):
    from shards.manifest import open_dataset
    from shards.reader import SampleReader

    sizes = [(3, 5), (1, 1), (40, 80)]
    folder = make_dataset(tmp_path, [make_sample(i, *size) for i, size in enumerate(sizes)])
    _, index = open_dataset(folder)
    builder = SequenceBuilder(tokenizer, SequenceSection(layout=layout, system_prompt=system_prompt))
    built = [len(builder.training(SampleReader(folder).read(row))) for row in index]
    assert builder.lengths(index).tolist() == built


def test_a_foreign_tokenizer_is_refused():
    from tokenizers import Tokenizer, models

    with pytest.raises(ConfigError, match="not Higgs Audio v2's"):
        SequenceBuilder(Tokenizer(models.BPE()), SequenceSection())
