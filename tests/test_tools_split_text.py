"""A long text is split at its marks, and nothing of it is lost, changed or cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.split_text import split_text

WHOLE = [
    "3.14",
    "1,000",
    "١٫٥",
    "٣،٥",
    "10:30",
    "https://example.com/a.b?c=d",
    "د.محمد",
    "U.S.",
    "١٠:٣٠",
    "v2.0",
    "a@b.co",
]
WORDS = ["كتاب", "هذا", "مُدَّ", "word", "a", "نعم", "الجسر", *WHOLE]
MARKS = [" ", " ", " ", ". ", "! ", "? ", "؟ ", "؛ ", "، ", ", ", "\n", "...", '." ', "؟", "؛", "،", " - ", "؟! "]

texts = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(MARKS)), min_size=1, max_size=60).map(
    lambda pairs: "".join(word + mark for word, mark in pairs)
)


@settings(max_examples=100, deadline=None)
@given(texts | st.text(max_size=200), st.integers(1, 80))
def test_the_joined_parts_are_the_text(text, max_chars):
    parts = split_text(text, max_chars)
    assert "".join(parts) == text
    assert len(parts) == 1 or all(any(letter.isalnum() for letter in part) for part in parts)


@settings(max_examples=100, deadline=None)
@given(texts, st.integers(1, 80))
def test_no_number_word_or_address_is_cut(text, max_chars):
    parts = split_text(text, max_chars)
    for before, after in pairwise(parts):
        if not before[-1].isspace():
            assert before[-1] in "؟؛،!?."
            assert not (len(before) > 1 and before[-2].isdigit() and after[0].isdigit())
            assert any(mark in before[-4:] for mark in "؟؛،")


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(30, 80))
def test_parts_are_as_long_as_allowed_at_most(text, max_chars):
    for part in split_text(text, max_chars):
        spoken = part.strip()
        assert len(spoken) <= max_chars or len(max(spoken.split(), key=len)) + 12 > max_chars


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ذهبت إلى السوق. اشتريت خبزا", ["ذهبت إلى السوق. ", "اشتريت خبزا"]),
        ("كم السعر؟عشرة", ["كم السعر؟", "عشرة"]),
        ("أولا؛ثانيا\nثالثا", ["أولا؛", "ثانيا\n", "ثالثا"]),
        ("قال: «نعم.» ثم ذهب", ["قال: «نعم.» ", "ثم ذهب"]),
        ("القيمة 3.14 تقريبا. تم", ["القيمة 3.14 تقريبا. ", "تم"]),
        ("عند الساعة 10:30، ثم ١٫٥", ["عند الساعة 10:30، ", "ثم ١٫٥"]),
        ("جاء د. محمد. ثم خرج", ["جاء د. محمد. ", "ثم خرج"]),
        ("The U.S. army came. It left", ["The U.S. army came. ", "It left"]),
        ("See Dr. Smith. Now go", ["See Dr. Smith. ", "Now go"]),
        ("هيا!!! اذهب؟! نعم", ["هيا!!! ", "اذهب؟! ", "نعم"]),
        ("قال: «كم السعر؟»، ثم ذهب", ["قال: «كم السعر؟»، ", "ثم ذهب"]),
        ("«كم السعر؟»قال البائع", ["«كم السعر؟»", "قال البائع"]),
        ("أولا  \n\n ثانيا", ["أولا  \n\n ", "ثانيا"]),
    ],
)
def test_a_text_is_split_where_a_reader_stops(text, parts):
    longest = max(len(part.strip()) for part in parts)
    assert split_text(text, longest) == parts


def test_a_short_text_stays_whole():
    text = "نعم. لا. ربما؟ حسنا!"
    assert split_text(text) == [text]
    assert split_text("") == [""]
    assert split_text("؟؟؟ ... !", 3) == ["؟؟؟ ... !"]


@pytest.mark.parametrize("run", [" " * 100_000, "." * 100_000 + "x", "؟" * 100_000 + "x", " \n" * 50_000])
def test_a_long_run_is_read_once(run):
    """Read again from each of its letters, 10^10 steps, this would not end."""
    text = f"نص{run}نص"
    assert "".join(split_text(text, 10)) == text
