"""Text protocols and error counts of `evaluate`."""

from __future__ import annotations

import numpy as np
import pytest

from train.evaluation.edits import Edits, character_edits, corpus, count_edits, failed, mean_rate, word_edits
from train.evaluation.text_protocols import HEADLINE, PROTOCOLS, VERSIONS, groups_of

# What the leaderboard's eval.py (8fce859) makes of these, rule by rule; the last three are those that surprise.
LEADERBOARD = [
    ("مرحبا، كيف حالك؟", "مرحبا كيف حالك"),
    ("نعم؛لا", "نعملا"),
    ("مُدَّ لَهُ يَدَ العَوْنِ", "مد له يد العون"),
    ("أحمد إلى آخر مؤمن بئر سماء", "احمد الى اخر مومن بير سما"),
    ("پيتزا ڤيديو", "بيتزا فيديو"),
    ("٣٤٥ و 12", "345 و12"),
    ("و كتب و قرأ", "وكتب وقرا"),
    ("فتى المدرسة", "فتى المدرسة"),
    ("هـــذا", "هـــذا"),
    ("«نعم» ٱلرحمٰن", "«نعم» ٱلرحمٰن"),
    ("١٢٫٥", "12٫5"),
]
STRICT = [
    ("أحمد إلى آخر ٱلدار", "احمد الي اخر الدار"),
    ("مُدَّ لَهُ يَدَ العَوْنِ", "مد له يد العون"),
    ("هـــذا", "هذا"),
    ("١٢٫٥ دينارا", "12 5 دينارا"),
    ("فتى المدرسة", "فتي المدرسه"),
    ("مؤمن بئر سماء", "مؤمن بئر سماء"),
    ("ﷲ ﻻ", "الله لا"),
    ("\u200fنعم\u202b، لا؟ «ربما»", "نعم لا ربما"),
]


@pytest.mark.parametrize(("text", "expected"), LEADERBOARD)
def test_oualb_gives_what_the_leaderboard_gives(text: str, expected: str):
    assert PROTOCOLS["oualb"](text) == expected


@pytest.mark.parametrize(("text", "expected"), STRICT)
def test_strict_folds_what_is_not_audible(text: str, expected: str):
    assert PROTOCOLS["strict"](text) == expected


def test_raw_keeps_all_but_blanks():
    assert PROTOCOLS["raw"](" أهلاً،\n بك ") == "أهلاً، بك"


def test_the_protocol_decides_the_score():
    asked, hypothesis = "ذهبت إلى المدرسة، يا أحمد!", "ذهبت الى المدرسه يا احمد"
    rates = {name: round(word_edits(rule(asked), rule(hypothesis)).rate, 2) for name, rule in PROTOCOLS.items()}
    assert rates == {"raw": 0.6, "strict": 0.0, "oualb": 0.2}
    assert HEADLINE == "strict"
    assert VERSIONS.keys() == PROTOCOLS.keys()


def test_groups_of_a_text():
    assert groups_of("رقم ٣٤٥") == ["digits"]
    assert groups_of("افتح Windows", "EGY") == ["latin words", "dialect EGY"]
    assert groups_of("مُدَّ يده") == ["diacritised"]
    assert groups_of("نعم") == []


@pytest.mark.parametrize(
    ("asked", "hypothesis", "expected"),
    [
        ("abc", "abc", Edits(3)),
        ("abc", "", Edits(3, 0, 3, 0)),
        ("", "", Edits(1)),
        ("", "ab", Edits(1, 0, 0, 2)),
        ("abcd", "axcd", Edits(4, 1, 0, 0)),
        ("abcd", "acd", Edits(4, 0, 1, 0)),
        ("abcd", "abxcd", Edits(4, 0, 0, 1)),
        ("kitten", "sitting", Edits(6, 2, 0, 1)),
    ],
)
def test_edits_are_kept_apart(asked: str, hypothesis: str, expected: Edits):
    assert character_edits(asked, hypothesis) == expected


def test_edits_are_the_fewest():
    def plain(a: str, b: str) -> int:
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            before, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
        return row[-1]

    rng = np.random.default_rng(0)
    for _ in range(100):
        a, b = ("".join(rng.choice(list("abc "), size=rng.integers(0, 12))) for _ in range(2))
        found = count_edits(a, b)
        assert found.errors == plain(a, b)
        assert found.length - found.deletions + found.insertions == len(b)


def test_corpus_and_mean_of_utterances_differ():
    sentence = "قرأت المقال ولم أفهم شيئا منه أبدا والله صدقني يا"
    short, long = word_edits("نعم", "لا"), word_edits(sentence, sentence)
    assert corpus([short, long]).rate == pytest.approx(1 / 11)
    assert mean_rate([short, long]) == 0.5


def test_a_failure_counts_all_and_never_hides_more():
    assert failed(Edits(10, 1, 0, 0)).rate == 1
    assert failed(Edits(10, 0, 0, 30)).rate == 3


@pytest.mark.parametrize("kind", [character_edits, word_edits])
def test_a_failed_text_without_letters_is_an_error_too(kind):
    """Otherwise it would stand under the failures and in no error rate; heard or not, it is divided by the same."""
    asked = PROTOCOLS["strict"]("؟!")
    sentence = kind("نعم", "نعم")
    assert failed(kind(asked, "")) == Edits(1, deletions=1)
    assert corpus([failed(kind(asked, "")), sentence]).rate == 1 / (1 + sentence.length)
    assert corpus([kind(asked, ""), sentence]) == Edits(1 + sentence.length)
