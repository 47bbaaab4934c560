"""Which pieces a recording is cut into: stretches of speech in, (start_s, end_s) of every piece out.

A cut lies in the middle of a pause of `min_pause_s` or more and never elsewhere, so no word is cut: closures inside Arabic words
(a doubled t or q) reach 0.2 s, and a cut at a shorter pause would end words. The price: speech that goes on for longer than the
longest piece without such a pause is skipped and counted. Of longer pauses a piece keeps `edge_s` at its ends. Which pauses are
taken is chosen for the whole recording at once, for pieces near the middle of the lengths asked for and little silence inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LONG_PAUSE_S = 0.6  # more silence than this inside a piece is avoided: it teaches the voice to stop
LOST = 100.0  # what a piece that is too short costs: more than any shape of the others


@dataclass(frozen=True)
class CutRules:
    min_s: float = 3.0
    max_s: float = 15.0
    min_pause_s: float = 0.3
    edge_s: float = 0.2  # at most, and at most half the pause


@dataclass(frozen=True)
class Unit:
    """Speech without a pause inside. Units of different `label` never share a piece; `goes_on`: no cut behind this one.

    `unfit`: the reason why it is in no piece.
    """

    start_s: float
    end_s: float
    label: str = ""
    goes_on: bool = False
    unfit: str = ""


@dataclass(frozen=True)
class Piece:
    """What is cut: the edges are part of it. `speech_s` counts from the first to the last sound."""

    start_s: float
    end_s: float
    units: tuple[Unit, ...]

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def speech_s(self) -> float:
        return sum(unit.end_s - unit.start_s for unit in self.units)


@dataclass(frozen=True)
class Skipped:
    """Speech that is in no piece, and why."""

    start_s: float
    end_s: float
    reason: str


# Reason -> what it means; printed with the counts.
SKIP_REASONS = {
    "no_pause": "longer than the longest piece without a pause to cut at",
    "too_short": "shorter than the shortest piece, and too far from its neighbours",
    "two_speakers": "two speakers share it by the turns of the RTTM",
    "no_speaker": "the RTTM has no turn there",
    "no_text": "the transcript has no text for it, or for less than half of it, or an unknown word (<unk>)",
    "text_without_speech": "the transcript has text there and no speech is heard: wrong times, or another recording's text",
    "loud_without_speech": "as loud as speech, and none to the network: music, noise, or a voice that it does not hear",
    "asr_no_text": "the recognizer heard no word in it",
    "asr_no_speech": "the recognizer's no-speech probability is above --max-no-speech",
    "asr_repeats": "the recognizer's text repeats itself: compression ratio above --max-compression",
    "asr_unsure": "the recognizer's mean log-probability is below --min-log-probability",
    "only_piece": "its speaker has no other piece that could be the reference",
}


def units_of(stretches: Sequence[tuple[float, float]], min_pause_s: float) -> list[Unit]:
    """Join stretches (start_s, end_s), in order, that are less than `min_pause_s` apart."""
    units: list[Unit] = []
    for start_s, end_s in stretches:
        if units and start_s - units[-1].end_s < min_pause_s - 1e-6:
            units[-1] = Unit(units[-1].start_s, end_s)
        else:
            units.append(Unit(start_s, end_s))
    return units


def cut(units: Sequence[Unit], duration_s: float, rules: CutRules) -> tuple[list[Piece], list[Skipped]]:
    """Units in order -> pieces and what is in none, both in order."""
    blocks = _blocks(units)
    edges = _edges(blocks, duration_s, rules.edge_s)
    pieces: list[Piece] = []
    skipped: list[Skipped] = []
    start = 0
    while start < len(blocks):
        end = start + 1
        while end < len(blocks) and _kind(blocks[end]) == _kind(blocks[start]):
            end += 1
        if reason := blocks[start][0].unfit:
            skipped += [Skipped(block[0].start_s, block[-1].end_s, reason) for block in blocks[start:end]]
            start = end
            continue
        for first, last in _best(blocks, edges, start, end, rules):
            inner = tuple(unit for block in blocks[first:last] for unit in block)
            piece = Piece(inner[0].start_s - edges[first][0], inner[-1].end_s + edges[last - 1][1], inner)
            if piece.duration_s > rules.max_s + 1e-6:
                skipped.append(Skipped(inner[0].start_s, inner[-1].end_s, "no_pause"))
            elif piece.duration_s < rules.min_s - 1e-6:
                skipped.append(Skipped(inner[0].start_s, inner[-1].end_s, "too_short"))
            else:
                pieces.append(piece)
        start = end
    return pieces, skipped


def _kind(block: list[Unit]) -> tuple[str, str]:
    return block[0].label, block[0].unfit


def _blocks(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units between which no cut is allowed, together."""
    blocks: list[list[Unit]] = []
    for number, unit in enumerate(units):
        before = units[number - 1] if number else unit
        if number and before.goes_on and (before.label, before.unfit) == (unit.label, unit.unfit):
            blocks[-1].append(unit)
        else:
            blocks.append([unit])
    return blocks


def _edges(blocks: list[list[Unit]], duration_s: float, edge_s: float) -> list[tuple[float, float]]:
    """(before, behind) of every block: half the pause, `edge_s` at most."""
    starts = [block[0].start_s for block in blocks] + [duration_s]
    ends = [0.0] + [block[-1].end_s for block in blocks]
    gaps = [max(0.0, start - end) for start, end in zip(starts, ends, strict=True)]
    last = len(gaps) - 1
    before = [min(edge_s, gap if number == 0 else gap / 2) for number, gap in enumerate(gaps[:-1])]
    behind = [min(edge_s, gap if number == last else gap / 2) for number, gap in enumerate(gaps) if number]
    return list(zip(before, behind, strict=True))


def _best(
    blocks: list[list[Unit]], edges: list[tuple[float, float]], start: int, end: int, rules: CutRules
) -> list[tuple[int, int]]:
    """The cheapest way to cut blocks[start:end] into runs (first, last)."""
    wanted_s = (rules.min_s + rules.max_s) / 2
    costs = [0.0] + [float("inf")] * (end - start)
    origins = [0] * (end - start + 1)
    for first in range(start, end):
        silence = 0.0
        for last in range(first + 1, end + 1):
            if last > first + 1:
                gap_s = blocks[last - 1][0].start_s - blocks[last - 2][-1].end_s
                silence += max(0.0, gap_s - LONG_PAUSE_S)
            length_s = blocks[last - 1][-1].end_s + edges[last - 1][1] - blocks[first][0].start_s + edges[first][0]
            if length_s > rules.max_s and last > first + 1:
                break
            cost = ((length_s - wanted_s) / wanted_s) ** 2 + 2 * silence
            if not rules.min_s <= length_s <= rules.max_s:
                cost = LOST * (1 + sum(unit.end_s - unit.start_s for block in blocks[first:last] for unit in block))
            cost += costs[first - start]
            if cost < costs[last - start]:
                costs[last - start], origins[last - start] = cost, first - start
    runs: list[tuple[int, int]] = []
    place = end - start
    while place:
        runs.append((start + origins[place], start + place))
        place = origins[place]
    return runs[::-1]
