"""One row per utterance with everything known about it: what sums, tables and the report are made of.

In: spoken rows and scores. Out: `Utterance`s. Every item has a row in every draw of every system: where no wave came, the row
is a failure with 100 % error and similarity 0, so that no failure makes a denominator smaller.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shards.sequence import FRAMES_PER_SECOND
from tools.evaluate.items import Item
from tools.evaluate.mos import LOWEST
from tools.evaluate.row_file import Key
from tools.evaluate.scoring import Scores, Similarity
from tools.evaluate.speaking import Spoken
from tools.evaluate.systems import REFERENCE, System
from tools.evaluate.waves import WaveFacts, failure_of
from train.evaluation.edits import Edits, character_edits, failed, word_edits
from train.evaluation.text_protocols import PROTOCOLS, groups_of

NO_WAVE = frozenset({"missing", "empty", "silent"})


class Utterance(msgspec.Struct, frozen=True, kw_only=True):
    system: str
    draw: int
    item: str
    speaker: str
    text: str
    wave: str
    groups: list[str]
    failure: str = ""  # one of waves.FAILURES, or ""
    error: str = ""  # why there is no wave
    duration_s: float = 0.0
    expected_s: float | None = None
    real_s: float | None = None
    leading_silence_s: float = 0.0
    trailing_silence_s: float = 0.0
    copied_s: float | None = None
    text_reached: bool | None = None
    text_of_model: str = ""  # where it did not
    recognised: str | None = None
    characters: dict[str, Edits] = {}  # by protocol; with the failure counted
    words: dict[str, Edits] = {}
    similarity: dict[str, Similarity] = {}  # by encoder
    mos_difference: dict[str, float] = {}  # to the real recording of the text, by predictor; empty without one


def utterances_of(
    items: list[Item],
    systems: list[System],
    draws: int,
    spoken: dict[Key, Spoken],
    facts: Scores,
    texts: Scores | None,
    voices: dict[str, dict[Key, Similarity]],
    mos: list[Scores],
) -> list[Utterance]:
    """Rows in the order of systems, draws and items. `texts`: None where nothing was recognised."""
    found = []
    for system in systems:
        for draw in range(draws if system.speaks else 1):
            for item in items:
                key = (system.name, draw, item.id)
                if system.kind == "real" and item.real is None:
                    continue
                found.append(_utterance(item, system, key, spoken.get(key), facts, texts, voices, mos))
    return found


def _utterance(
    item: Item,
    system: System,
    key: Key,
    row: Spoken | None,
    facts: Scores,
    texts: Scores | None,
    voices: dict[str, dict[Key, Similarity]],
    mos: list[Scores],
) -> Utterance:
    about = _facts(facts, key) or WaveFacts(error="no wave was made")
    real = _facts(facts, ("real", 0, item.id))
    reference = _facts(facts, (REFERENCE, 0, item.id))
    real_s = real.duration_s if real and not real.error else None
    expected_s = real_s or _by_rate(item, reference)
    limit = expected_s if system.kind in ("base", "tuned", "waves") else None
    failure = failure_of(about, row.ended if row else None, limit)
    recognised = None if texts is None else (texts[key].text or "" if key in texts and failure not in NO_WAVE else "")
    characters, words = {}, {}
    if recognised is not None:
        for name, rule in PROTOCOLS.items():
            asked, hypothesis = rule(item.text), rule(recognised)
            parts = character_edits(asked, hypothesis), word_edits(asked, hypothesis)
            characters[name], words[name] = (failed(part) if failure else part for part in parts)
    nothing = Similarity(0.0, 0.0)
    similarity = {name: nothing if failure in NO_WAVE else scores.get(key, nothing) for name, scores in voices.items()}
    return Utterance(
        system=key[0],
        draw=key[1],
        item=item.id,
        speaker=item.speaker,
        text=item.text,
        wave=row.wave if row else "",
        groups=groups_of(item.text, item.dialect),
        failure=failure,
        error=about.error,
        duration_s=about.duration_s,
        expected_s=expected_s,
        real_s=real_s,
        leading_silence_s=about.leading_silence_s,
        trailing_silence_s=about.trailing_silence_s,
        copied_s=None if row is None or row.copied_frames is None else row.copied_frames / FRAMES_PER_SECOND,
        text_reached=row.text_reached if row else None,
        text_of_model=row.text_of_model if row else "",
        recognised=recognised,
        characters=characters,
        words=words,
        similarity=similarity,
        mos_difference=_mos_differences(key, failure, mos) if system.kind != "shuffled" and _is_heard(real) else {},
    )


def _facts(facts: Scores, key: Key) -> WaveFacts | None:
    row = facts.get(key)
    return row.facts if row else None


def _is_heard(real: WaveFacts | None) -> bool:
    """Only a recording with sound in it is something to be different from."""
    return real is not None and failure_of(real, None, None) not in NO_WAVE


def _mos_differences(key: Key, failure: str, mos: list[Scores]) -> dict[str, float]:
    """By predictor's value: the wave's less its recording's. A wave that is not there gets the lowest of the scale."""
    found = {}
    for scores in mos:
        mine, real = (scores[k].values if k in scores else None for k in (key, ("real", 0, key[2])))
        for name, value in (real or {}).items():
            guess = LOWEST if failure in NO_WAVE or mine is None else mine[name]
            found[name] = round(guess - value, 4)
    return found


def _by_rate(item: Item, reference: WaveFacts | None) -> float | None:
    """The text at the reference's characters per second."""
    if not reference or reference.error or not item.reference_text:
        return None
    return reference.duration_s * max(1, len(item.text)) / len(item.reference_text)


def of_system(rows: Iterable[Utterance], system: str) -> list[Utterance]:
    return [row for row in rows if row.system == system]
