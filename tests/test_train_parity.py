"""Our model against transformers' HiggsAudioV2ForConditionalGeneration on the same tiny random weights.

The reference sees one sample at a time; ours sees them one at a time and packed. Equal logits, summed losses, gradients
of every parameter, and greedy codes, with the cloning context in front of the target.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.config import SequenceSection
from shards.delay_pattern import undelay
from shards.label_shift import IGNORE
from shards.sequence import Sequence, SequenceBuilder
from train.model.batch import pack
from train.model.generate import generate
from train.model.weights import load_model

transformers = pytest.importorskip("transformers", minversion="5.3", reason="the native class came with 5.3")

RELATIVE = 1e-5  # fp32, other order of summation


@pytest.fixture(scope="module")
def ours(tiny_dir: Path):
    return load_model(tiny_dir / "model", torch.float32)


@pytest.fixture(scope="module")
def reference(tiny_dir: Path):
    return transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(
        tiny_dir / "model", use_text_head=True, dtype=torch.float32
    )


@pytest.fixture(scope="module", params=["clone", "as_written"])
def sequences(request, tokenizer, make_sample) -> list[Sequence]:
    builder = SequenceBuilder(tokenizer, SequenceSection(layout=request.param))
    sizes = [(7, 9), (1, 1), (23, 4), (5, 30)]
    return [builder.training(make_sample(seed, *size)) for seed, size in enumerate(sizes)]


def reference_inputs(sequence: Sequence) -> dict[str, Tensor]:
    return {
        "input_ids": torch.from_numpy(sequence.token_ids.astype(np.int64))[None],
        "audio_input_ids": torch.from_numpy(sequence.codes.T.astype(np.int64))[None],
        "audio_input_ids_mask": torch.ones((1, sequence.codes.shape[1]), dtype=torch.bool),
    }


def reference_losses(model, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Text logits, audio logits at audio columns, summed text loss, summed audio loss per codebook."""
    output = model.model(**reference_inputs(sequence)).last_hidden_state[0]
    text_logits = model.text_lm_head(output)
    is_audio = torch.from_numpy(sequence.token_ids == 128016)
    audio_logits = model.audio_lm_head(output[is_audio]).view(-1, 8, 1026)
    text = F.cross_entropy(text_logits, torch.from_numpy(sequence.next_token.astype(np.int64)), reduction="sum")
    targets = torch.from_numpy(sequence.next_codes.astype(np.int64))
    audio = torch.stack([F.cross_entropy(audio_logits[:, k], targets[k], reduction="sum") for k in range(8)])
    return text_logits, audio_logits, text, audio


def close(ours: Tensor, reference: Tensor) -> None:
    scale = reference.abs().max().item()
    torch.testing.assert_close(ours, reference, rtol=0, atol=RELATIVE * max(scale, 1e-6))


def test_state_dict_names_are_the_transformers_names(ours, reference):
    assert set(ours.state_dict()) == set(reference.state_dict())


@pytest.mark.parametrize("packed", [False, True])
def test_logits_equal(ours, reference, sequences, packed):
    packs = [sequences] if packed else [[sequence] for sequence in sequences]
    for group in packs:
        batch = pack(group, list(range(len(group))), ["k"] * len(group))
        with torch.no_grad():
            hidden = ours.hidden(batch)
            num_text = len(batch.text_ids)
            texts, audios = [], []
            for sequence in group:
                text_logits, audio_logits, _, _ = reference_losses(reference, sequence)
                is_text = torch.from_numpy(sequence.token_ids != 128016)
                texts.append(text_logits[is_text])
                audios.append(audio_logits)
            close(ours.text_lm_head(hidden[:num_text]), torch.cat(texts))
            close(ours.audio_logits(hidden[num_text:]), torch.cat(audios))


@pytest.mark.parametrize("packed", [False, True])
def test_loss_sums_and_all_gradients_equal(ours, reference, sequences, packed):
    ours.requires_grad_(True)
    ours.zero_grad()
    reference.zero_grad()
    packs = [sequences] if packed else [[sequence] for sequence in sequences]
    text = audio = torch.zeros(())
    for group in packs:
        sums = ours(pack(group, list(range(len(group))), ["k"] * len(group)))
        (sums.text + sums.audio.sum()).backward()
        text, audio = text + sums.text.detach(), audio + sums.audio.detach()
    expected_text = expected_audio = torch.zeros(())
    for sequence in sequences:
        _, _, sequence_text, sequence_audio = reference_losses(reference, sequence)
        (sequence_text + sequence_audio.sum()).backward()
        expected_text = expected_text + sequence_text.detach()
        expected_audio = expected_audio + sequence_audio.detach()
    close(text, expected_text)
    close(audio, expected_audio)
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = gradients[name]
        assert (parameter.grad is None) == (expected is None), name
        if expected is not None:
            assert expected.abs().max() > 0, f"{name}: a zero gradient would prove nothing"
            close(parameter.grad, expected)


def test_our_targets_give_the_reference_its_own_loss(ours, reference, sequences):
    """The class's `labels` are unshifted and it shifts itself: shifting ours back must give our loss."""
    sequence = sequences[0]
    labels = np.concatenate([[IGNORE], sequence.next_token[:-1]])
    audio_labels = np.concatenate([np.full((8, 1), IGNORE), sequence.next_codes[:, :-1]], axis=1)
    # Audio labels are scattered to audio positions and shifted there; an audio's last column must predict nothing.
    assert (sequence.next_codes[:, -1] == IGNORE).all()
    with torch.no_grad():
        output = reference(
            **reference_inputs(sequence),
            labels=torch.from_numpy(labels.astype(np.int64))[None],
            audio_labels=torch.from_numpy(audio_labels.T.astype(np.int64))[None],
        )
        sums = ours(pack([sequence], [0], ["k"]))
    num_text = (sequence.next_token != IGNORE).sum()
    num_audio = (sequence.next_codes != IGNORE).sum(axis=1)
    expected = sums.text / num_text + (sums.audio / torch.from_numpy(num_audio)).sum()
    close(expected, output.loss)


def test_greedy_generation_equals_the_reference(ours, reference, tokenizer, make_sample):
    builder = SequenceBuilder(tokenizer, SequenceSection())
    prompt = builder.prompt(make_sample(3, 20, 5))
    max_frames = 30
    speech = generate(ours, prompt, max_frames)
    output = reference.generate(
        **reference_inputs(prompt), max_new_tokens=max_frames + 9, do_sample=False, eos_token_id=128009
    )
    columns = output[0, prompt.codes.shape[1] :].T.numpy()
    expected = undelay(columns)
    assert expected.shape[1] >= max_frames, "the random model must not stop early, or little is compared"
    np.testing.assert_array_equal(speech.codes, expected[:, :max_frames])
