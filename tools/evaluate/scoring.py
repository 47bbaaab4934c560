"""Scores of waves, one metric after the other, so that one metric's model is in memory at a time.

In: `Spoken` rows. Out: rows in OUT/scores/METRIC.jsonl, each with the sha256 of the wave it was computed from: a wave that
changed is scored again, one that did not never is. A file's name holds its model's hash, so two versions of an encoder never
share rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from preprocess.audio import CODEC_RATE
from tools.evaluate.items import Item
from tools.evaluate.mos import MosPredictor
from tools.evaluate.row_file import Key, RowFile
from tools.evaluate.speaking import Spoken
from tools.evaluate.systems import REFERENCE, other_clips
from tools.evaluate.waves import WaveFacts, read_wave
from train.evaluation.metric_models import SAMPLE_RATE, ModelIdentity
from train.evaluation.recognizers import Recognizer
from train.evaluation.speaker_encoders import SpeakerEncoder


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """What one metric says of one wave; which fields are set depends on the metric."""

    system: str
    draw: int
    item: str
    sha256: str
    facts: WaveFacts | None = None
    vector: list[float] | None = None  # a voice, by an encoder
    text: str | None = None  # what was recognised
    values: dict[str, float] | None = None  # of a MOS predictor, by name

    @property
    def key(self) -> Key:
        return self.system, self.draw, self.item


Score = Callable[[np.ndarray], dict[str, Any]]  # wave [S] at 16 kHz -> fields of Scored
Scores = dict[Key, Scored]
Faults = dict[Key, str]  # of waves that a metric's model could not score, in its own words


def measured(spoken: dict[Key, Spoken], out: Path) -> Iterator[tuple[Spoken, Scores]]:
    """Facts of every wave; yields after each, with all so far."""
    rows = RowFile(out / "scores" / "waves.jsonl", Scored, lambda row: row.key)
    for key, row in spoken.items():
        wave_facts = facts_of(row, out)
        old = rows.rows.get(key)
        if not old or old.facts != wave_facts:
            rows.add(Scored(system=key[0], draw=key[1], item=key[2], sha256=wave_facts.sha256, facts=wave_facts))
        yield row, rows.rows
    rows.close()


def facts_of(row: Spoken, out: Path) -> WaveFacts:
    return WaveFacts(error=row.error) if row.error else read_wave(out / row.wave)[1]


def scores_with(
    metric: str,
    identity: ModelIdentity,
    score: Score,
    spoken: dict[Key, Spoken],
    facts: Scores,
    out: Path,
    faults: Faults,
) -> Iterator[tuple[Spoken, Scores]]:
    """One model's score of every wave that is one; yields after each, with all so far. Equal waves are scored once.

    A wave that the model cannot score is added to `faults` and tried again by the next call: one odd wave, or a package with
    a fault, must not cost the scores of all others.
    """
    name = f"{metric}-{hashlib.sha256(msgspec.json.encode(identity)).hexdigest()[:12]}.jsonl"
    rows = RowFile(out / "scores" / name, Scored, lambda row: row.key)
    by_wave = {row.sha256: row for row in rows.rows.values()}
    for key, row in spoken.items():
        about = facts[key].facts
        if about is None or about.error or about.duration_s == 0:
            continue
        old = rows.rows.get(key)
        if not old or old.sha256 != about.sha256:
            same = by_wave.get(about.sha256)
            try:
                found = found_again(same) if same else score(at_16_khz(out / row.wave))
            except Exception as error:  # whatever somebody else's package raises
                faults[key] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                rows.rows.pop(key, None)  # of a wave that was there before
                yield row, rows.rows
                continue
            new = Scored(system=key[0], draw=key[1], item=key[2], sha256=about.sha256, **found)
            rows.add(new)
            by_wave[about.sha256] = new
        yield row, rows.rows
    rows.close()


def found_again(row: Scored) -> dict[str, Any]:
    return {"vector": row.vector, "text": row.text, "values": row.values}


def at_16_khz(path: Path) -> np.ndarray:
    import soxr

    return soxr.resample(read_wave(path)[0], CODEC_RATE, SAMPLE_RATE, quality="HQ").astype(np.float32)


def voice_score(encoder: SpeakerEncoder) -> Score:
    def score(wave: np.ndarray) -> dict[str, Any]:
        vector = encoder.embed(wave)
        if not np.isfinite(vector).all():
            raise ValueError("the encoder gave values that are not finite")
        return {"vector": [round(float(value), 6) for value in vector]}

    return score


def text_score(recognizer: Recognizer) -> Score:
    def score(wave: np.ndarray) -> dict[str, Any]:
        return {"text": recognizer.text_of(wave)}

    return score


def mos_score(predictor: MosPredictor) -> Score:
    def score(wave: np.ndarray) -> dict[str, Any]:
        values = predictor.values(wave)
        if not all(math.isfinite(value) for value in values.values()):
            raise ValueError("the predictor gave values that are not finite")
        return {"values": {name: round(value, 4) for name, value in values.items()}}

    return score


class Similarity(msgspec.Struct, frozen=True):
    """Of one wave: to its reference clip, and to another recording of the speaker (None where there is none)."""

    to_reference: float
    to_other: float | None


def similarities(items: list[Item], spoken: dict[Key, Spoken], voices: Scores) -> dict[Key, Similarity]:
    """Similarity of every wave with a voice. A wave without one is not here: its failure is counted by whoever sums up."""
    others = dict(zip((item.id for item in items), other_clips(items), strict=True))
    found: dict[Key, Similarity] = {}
    for key in spoken:
        system, _, item = key
        voice, reference = vector(voices, key), vector(voices, (REFERENCE, 0, item))
        if system == REFERENCE or voice is None or reference is None:
            continue
        number = others[item]
        other = None if number is None else vector(voices, ("real", 0, items[number].id))
        found[key] = Similarity(float(voice @ reference), None if other is None else float(voice @ other))
    return found


def vector(voices: Scores, key: Key) -> np.ndarray | None:
    row = voices.get(key)
    return None if row is None or row.vector is None else np.array(row.vector)
