"""A text as the model gets it: cleaned as stage one cleaned those it was trained on, and free of control tokens.

In: a text and the rules of the voice. Out: the text that is put into the prompt. Whoever speaks calls this, so what is said
cannot differ from what was trained.
"""

from __future__ import annotations

import logging

from preprocess.reasons import RowFault
from preprocess.sources import refuse_control_tokens
from preprocess.text import SLOW, TextSection, clean
from preprocess.unseen import garbled
from shards.errors import DataError

log = logging.getLogger("speak")
MARGIN_S = 5.0
CHARS_PER_DIGIT = 8  # as it is read out


def prompt_text(text: str, rules: TextSection, name: str) -> str:
    """Raises DataError, naming the text, where it holds a control token or nothing that can be said."""
    if not isinstance(text, str):
        raise DataError(f"{name}: expected a text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name}: not valid Unicode at character {error.start}; give it as UTF-8") from None
    cleaned = clean(text, rules)[0].strip()
    try:
        refuse_control_tokens(cleaned, "user")
    except RowFault as fault:
        raise DataError(f"{name}: {fault.detail}: no text may hold that; remove it") from None
    if not any(letter.isalnum() for letter in cleaned):
        raise DataError(f"{name}: {cleaned[:40]!r} holds no letter or digit; give what is to be said")
    return cleaned


def warn_of_garbled(text: str, name: str) -> None:
    """As stage one warns; it may be meant."""
    if lost := garbled(text):
        log.warning("%s: %s; was it read in its own encoding?", name, lost)


def longest_s(text: str, rules: TextSection) -> float:
    """No speech of `text` lasts longer: stage one warns of slower clips. Behind it the model goes round in circles."""
    chars = sum(CHARS_PER_DIGIT if letter.isdigit() else 1 for letter in text)
    return MARGIN_S + chars / max(SLOW * rules.min_chars_per_s, 1.0)
