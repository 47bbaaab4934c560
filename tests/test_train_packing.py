"""Packs keep their documents apart, and time runs forwards in each of them."""

from __future__ import annotations

import torch

from shards.config import SequenceSection
from shards.sequence import SequenceBuilder
from train.model.batch import pack
from train.model.weights import load_model


def test_packed_neighbours_do_not_see_each_other(tiny_dir, tokenizer, make_sample):
    model = load_model(tiny_dir / "model", torch.float32)
    builder = SequenceBuilder(tokenizer, SequenceSection())
    first, second, other = (builder.training(make_sample(i, 5, 8 + i)) for i in range(3))

    def losses_of_first(neighbour) -> torch.Tensor:
        batch = pack([first, neighbour], [0, 1], ["a", "b"])
        with torch.no_grad():
            hidden = model.hidden(batch)
        num_text = (first.token_ids != 128016).sum()
        start = len(batch.text_ids)
        return torch.cat([hidden[:num_text], hidden[start : start + first.codes.shape[1]]])

    torch.testing.assert_close(losses_of_first(second), losses_of_first(other), rtol=0, atol=1e-5)


def test_a_later_target_frame_does_not_leak_backwards(tiny_dir, tokenizer, make_sample):
    """Changing the codes of frame t (labels kept) leaves every prediction made before its column unchanged."""
    model = load_model(tiny_dir / "model", torch.float32)
    sequence = SequenceBuilder(tokenizer, SequenceSection()).training(make_sample(3, 5, 20))
    start, _ = sequence.target_columns
    changed_column = start + 12
    codes = sequence.codes.copy()
    codes[:, changed_column] = (codes[:, changed_column] + 1) % 1024
    import dataclasses

    changed = dataclasses.replace(sequence, codes=codes)
    with torch.no_grad():
        before, after = (model.hidden(pack([s], [0], ["k"])) for s in (sequence, changed))
    num_text = (sequence.token_ids != 128016).sum()
    difference = (before - after).abs().amax(dim=1)[num_text:]
    assert difference[:changed_column].max() < 1e-6
    assert difference[changed_column:].min() > 1e-4


def test_what_is_counted_on_the_cpu_stays_there(tokenizer, make_sample):
    """A CPU tensor given to a CUDA stream is an error, and counting targets on the GPU a synchronisation."""
    builder = SequenceBuilder(tokenizer, SequenceSection())
    batch = pack([builder.training(make_sample(1))], [0], ["a"])
    moved = batch.to(torch.device("meta"))
    assert moved.text_ids.is_meta
    assert moved.audio_targets.is_meta
    assert not moved.targets_per_codebook.is_meta
    changed: list[torch.Tensor] = []
    batch._each(lambda tensor: changed.append(tensor) or tensor)  # pyright: ignore[reportArgumentType]
    assert any(tensor is batch.codes for tensor in changed)
    assert not any(tensor is batch.targets_per_codebook for tensor in changed)
