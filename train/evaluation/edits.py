"""Errors between a text and what was recognised: substitutions, deletions and insertions, of characters and of words.

In: two lists of symbols. Out: `Edits`. Rates are divided by the length of the text that was asked, so they can pass 100 %.
Where several alignments are equally short, substitutions are preferred, then deletions; the sum is the same for all.
Characters include the blanks between words, as in jiwer and NeMo. A text that its rules leave nothing of counts as one
symbol, heard unless something else was: so a failure of it is an error like any other, and all systems are divided by the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np


class Edits(msgspec.Struct, frozen=True):
    """Counts of one utterance, or their sum over many. `length` is that of the asked text."""

    length: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per asked symbol; of nothing asked 0 without and 1 with errors."""
        return self.errors / self.length if self.length else float(self.errors > 0)


def count_edits(asked: Sequence[str], recognised: Sequence[str]) -> Edits:
    """The fewest edits that turn `asked` into `recognised`: time and memory of n * m cells."""
    n, m = len(asked), len(recognised)
    numbers = {symbol: number for number, symbol in enumerate({*asked, *recognised})}
    hypothesis = np.array([numbers[symbol] for symbol in recognised], np.int32)
    places = np.arange(m + 1, dtype=np.int32)
    costs = np.empty((n + 1, m + 1), np.int32)
    costs[0] = places
    for i, symbol in enumerate(asked, 1):
        row = costs[i]
        row[0] = i
        row[1:] = np.minimum(costs[i - 1, :-1] + (hypothesis != numbers[symbol]), costs[i - 1, 1:] + 1)
        row[:] = np.minimum.accumulate(row - places) + places  # insertions: a cell to the left costs one more
    return _walk_back(costs, asked, recognised)


def _walk_back(costs: np.ndarray, asked: Sequence[str], recognised: Sequence[str]) -> Edits:
    i, j = len(asked), len(recognised)
    substitutions = deletions = insertions = 0
    while i or j:
        differs = i > 0 and j > 0 and asked[i - 1] != recognised[j - 1]
        if i and j and costs[i, j] == costs[i - 1, j - 1] + differs:
            substitutions += differs
            i, j = i - 1, j - 1
        elif i and costs[i, j] == costs[i - 1, j] + 1:
            deletions += 1
            i -= 1
        else:
            insertions += 1
            j -= 1
    return Edits(len(asked), substitutions, deletions, insertions)


def character_edits(asked: str, recognised: str) -> Edits:
    return of_one_symbol_at_least(count_edits(asked, recognised))


def word_edits(asked: str, recognised: str) -> Edits:
    return of_one_symbol_at_least(count_edits(asked.split(), recognised.split()))


def of_one_symbol_at_least(found: Edits) -> Edits:
    return found if found.length else Edits(1, insertions=found.insertions)


def failed(measured: Edits) -> Edits:
    """The same utterance counted as a failure: at least 100 % error. What already is worse stays as bad as it is."""
    if measured.rate >= 1:
        return measured
    return Edits(measured.length, deletions=measured.length)


def corpus(parts: Iterable[Edits]) -> Edits:
    """The sum over utterances; its rate is the corpus rate."""
    parts = list(parts)
    return Edits(
        sum(part.length for part in parts),
        sum(part.substitutions for part in parts),
        sum(part.deletions for part in parts),
        sum(part.insertions for part in parts),
    )


def mean_rate(parts: Sequence[Edits]) -> float:
    """The mean of the utterances' rates, as seed-tts-eval reports it: short utterances weigh as much as long ones."""
    return float(np.mean([part.rate for part in parts])) if parts else 0.0
