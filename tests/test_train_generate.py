"""Drawing codes: what may come, how often, and what a seed fixes. Greedy speech is held against the references elsewhere."""

from __future__ import annotations

import torch

from shards.sequence import STREAM_BOS, STREAM_EOS
from train.model.generate import GREEDY, Sampling, draw

VOCAB, BOOKS = 1026, 8
NOTHING_BEFORE = torch.full((1, BOOKS), STREAM_BOS)


def drawn(
    logits: torch.Tensor, sampling: Sampling, count: int = 400, recent: torch.Tensor = NOTHING_BEFORE
) -> set[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    return {code for _ in range(count) for code in draw(logits, recent, sampling, generator).tolist()}


def ladder() -> torch.Tensor:
    """[K, V]: code 0 is the likeliest, every next one half as likely."""
    return (-torch.arange(VOCAB) * torch.log(torch.tensor(2.0))).expand(BOOKS, VOCAB).clone()


def test_the_beginning_of_an_audio_is_never_drawn_within_it():
    logits = torch.full((BOOKS, VOCAB), -30.0)
    logits[:, STREAM_BOS], logits[:, STREAM_EOS], logits[:, 5] = 20.0, 1.0, 1.0
    assert drawn(logits, Sampling(ras_window=0)) == {5, STREAM_EOS}
    assert logits[0, STREAM_BOS] == 20.0, "the caller's logits are left alone"
    assert drawn(logits, GREEDY, count=1) == {STREAM_BOS}, "greedy is the references' argmax"


def test_top_k_and_top_p_leave_the_likeliest():
    assert drawn(ladder(), Sampling(top_k=3, top_p=1.0, ras_window=0)) == {0, 1, 2}
    # 1/2 + 1/4 + 1/8 = 0.875 is still below 0.9, so the fourth is in and the fifth is not.
    assert drawn(ladder(), Sampling(top_k=0, top_p=0.9, ras_window=0)) == {0, 1, 2, 3}
    assert len(drawn(ladder(), Sampling(top_k=0, top_p=1.0, ras_window=0))) > 6


def test_temperature_flattens():
    cold = drawn(ladder(), Sampling(temperature=0.02, top_k=0, top_p=1.0, ras_window=0))
    assert cold == {0}
    assert len(drawn(ladder(), Sampling(temperature=4.0, top_k=0, top_p=1.0, ras_window=0))) > 20


def test_a_code_that_fills_the_window_is_drawn_again_from_all():
    """Top-k 1 allows code 0 only; with it twice in the window, others come. Elsewhere in the books nothing changes."""
    recent = torch.full((7, BOOKS), 700)
    recent[:2, 3] = 0
    generator = torch.Generator().manual_seed(0)
    columns = torch.stack([draw(ladder(), recent, Sampling(top_k=1), generator) for _ in range(200)])
    assert set(columns[:, 3].tolist()) > {0, 1, 2}
    others = columns[:, [book for book in range(BOOKS) if book != 3]]
    assert others.unique().tolist() == [0]


def test_a_seed_fixes_what_is_said():
    def said(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [code for _ in range(5) for code in draw(ladder(), NOTHING_BEFORE, Sampling(), generator).tolist()]

    assert said(3) == said(3)
    assert said(3) != said(4)
