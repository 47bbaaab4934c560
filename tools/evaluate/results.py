"""The figures of an evaluation: OUT/results.json, a pure function of its utterances.

In: `Utterance`s and who they are of. Out: a dictionary for JSON: scores of each system, differences with intervals and
verdicts, failures by name, the worst, and what was not measured. No times of day and no speeds, so that a resumed
evaluation gives the same bytes as one that was never interrupted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import msgspec
import numpy as np

from tools.evaluate.paired import COSINE, ERROR_RATE, MOS_DIFFERENCE, SHARE, Comparison, compare
from tools.evaluate.systems import System
from tools.evaluate.utterances import Utterance, of_system
from train.evaluation.edits import Edits, corpus, mean_rate
from train.evaluation.text_protocols import HEADLINE, VERSIONS

NUM_WORST = 20
HIGH_RATE = 0.5  # utterances above count as lost, as seed-tts-eval counts them
FORMAT = 1


def system_scores(rows: list[Utterance], floor: dict[str, float], ceiling: dict[str, float]) -> dict[str, Any]:
    """All figures of one system's rows. `floor`, `ceiling`: mean similarity by encoder of strangers and of recordings."""
    scores: dict[str, Any] = {
        "utterances": len(rows),
        "failures": {
            "share": share(bool(row.failure) for row in rows),
            **Counter(row.failure for row in rows if row.failure),
        },
        "failed": [
            {"item": row.item, "draw": row.draw, "failure": row.failure, "why": row.error}
            for row in rows
            if row.failure
        ],
    }
    if any(row.recognised is not None for row in rows):
        scores["cer"] = {name: error_figures([row.characters[name] for row in rows]) for name in VERSIONS}
        scores["wer"] = {name: error_figures([row.words[name] for row in rows]) for name in VERSIONS}
        scores["empty_transcripts"] = sum(row.recognised == "" for row in rows)
    scores["similarity"] = {
        encoder: similarity_figures(rows, encoder, floor.get(encoder), ceiling.get(encoder))
        for encoder in (rows[0].similarity if rows else {})
    }
    predictors = sorted({name for row in rows for name in row.mos_difference})
    if predictors and rows[0].system != "real":
        scores["mos_difference"] = {name: mos_figures(rows, name) for name in predictors}
    spoken = [row for row in rows if row.duration_s > 0]
    ratios = [row.duration_s / row.real_s for row in spoken if row.real_s]
    copied = [row.copied_s for row in rows if row.copied_s is not None]
    reached = [row.text_reached for row in rows if row.text_reached is not None]
    scores |= {
        "duration_ratio": rounded(np.mean(ratios)) if ratios else None,
        # of all together: the mean of utterances would be that of one that broke off after a frame
        "characters_per_second": rounded(sum(len(row.text) for row in spoken) / sum(row.duration_s for row in spoken))
        if spoken
        else None,
        "leading_silence_s": rounded(np.mean([row.leading_silence_s for row in spoken])) if spoken else None,
        "trailing_silence_s": rounded(np.mean([row.trailing_silence_s for row in spoken])) if spoken else None,
        "longest_copy_of_the_prompt_s": max(copied) if copied else None,
        "text_reached_the_model": share(reached) if reached else None,
        "changed_texts": changed_texts(rows),
    }
    return scores


def changed_texts(rows: list[Utterance]) -> list[dict[str, str]]:
    """Items whose text the model's tokens do not spell: once each, for every draw has the same tokens."""
    changed = {row.item: row for row in rows if row.text_reached is False}
    return [{"item": item, "asked": row.text, "reached": row.text_of_model} for item, row in changed.items()]


def error_figures(parts: list[Edits]) -> dict[str, Any]:
    total = corpus(parts)
    return {
        "corpus": rounded(total.rate),
        "mean_of_utterances": rounded(mean_rate(parts)),
        "substitutions": total.substitutions,
        "deletions": total.deletions,
        "insertions": total.insertions,
        "length": total.length,
        "utterances_above_half": sum(part.rate > HIGH_RATE for part in parts),
    }


def similarity_figures(
    rows: list[Utterance], encoder: str, floor: float | None, ceiling: float | None
) -> dict[str, float | int | None]:
    pairs = [row.similarity[encoder] for row in rows]
    others = [pair.to_other for pair in pairs if pair.to_other is not None]
    mean = float(np.mean([pair.to_reference for pair in pairs]))
    can_share = floor is not None and ceiling is not None and ceiling > floor
    return {
        "to_reference": rounded(mean),
        "to_another_clip": rounded(np.mean(others)) if others else None,
        "utterances_with_another_clip": len(others),
        "share_of_the_way": rounded((mean - floor) / (ceiling - floor)) if can_share else None,  # pyright: ignore
    }


def mos_figures(rows: list[Utterance], name: str) -> dict[str, float | int]:
    """Never a grade: how much lower or higher than the recordings of the same sentences."""
    found = [row.mos_difference[name] for row in rows if name in row.mos_difference]
    return {"to_the_recording": rounded(np.mean(found)), "utterances": len(found)}


def summed_up(
    rows: list[Utterance],
    systems: list[System],
    identities: dict[str, Any],
    not_measured: list[str],
    about: dict[str, Any],
) -> dict[str, Any]:
    """results.json. `about`: what was evaluated; `identities`: models of the metrics by name."""
    by_name = {system.name: of_system(rows, system.name) for system in systems}
    floor = means(by_name, [system.name for system in systems if system.kind == "shuffled"])
    ceiling = means(by_name, [system.name for system in systems if system.kind == "real"])
    scores = {name: system_scores(part, floor, ceiling) for name, part in by_name.items() if part}
    return {
        "format": FORMAT,
        **about,
        "protocols": VERSIONS,
        "headline": f"cer {HEADLINE}",
        "models": identities,
        "not_measured": not_measured,
        "systems": [msgspec.to_builtins(system) for system in systems],
        "scores": scores,
        "comparisons": comparisons(by_name, systems),
        "groups": split(by_name, lambda row: row.groups),
        "speakers": split(by_name, lambda row: [row.speaker]),
        "worst": worst(by_name, systems),
    }


def means(by_name: dict[str, list[Utterance]], names: list[str]) -> dict[str, float]:
    rows = [row for name in names for row in by_name[name]]
    encoders = rows[0].similarity if rows else {}
    return {encoder: float(np.mean([row.similarity[encoder].to_reference for row in rows])) for encoder in encoders}


# --- differences ----------------------------------------------------------------------------------------------------


def comparisons(by_name: dict[str, list[Utterance]], systems: list[System]) -> list[dict[str, Any]]:
    """Every tuned or foreign system against the base, and every one that speaks against the recordings. A system with
    perturbed references against itself without, and the tuned one against the base that had the same.
    """
    found = []
    for first, second in pairs_of(systems):
        for metric, values in metrics_of(by_name[first.name] + by_name[second.name]).items():
            compared = paired(by_name[first.name], by_name[second.name], metric, values)
            found.append({"first": first.name, "second": second.name, "metric": metric, **figures(compared)})
    return found


def pairs_of(systems: list[System]) -> list[tuple[System, System]]:
    plain = [system for system in systems if not system.perturb]
    spoken = [system for system in plain if system.kind in ("tuned", "waves", "base")]
    pairs = [(s, o) for s in spoken for o in plain if (o.kind == "base" and s.kind != "base") or o.kind == "real"]
    for system in (system for system in systems if system.perturb):
        pairs += [(system, other) for other in plain if other.is_model_of(system)]
        pairs += [
            (system, other)
            for other in systems
            if other.perturb == system.perturb and other.kind == "base" and system.kind != "base"
        ]
    return pairs


Values = Any  # Utterance -> (numerator, denominator), or None where the metric does not hold for it


def metrics_of(rows: list[Utterance]) -> dict[str, Values]:
    """What two systems are compared by; the headline first."""
    found: dict[str, Values] = {}
    if any(row.characters for row in rows):
        for kind in ("characters", "words"):
            name = "cer" if kind == "characters" else "wer"
            found[name] = lambda row, kind=kind: edits_of(getattr(row, kind)[HEADLINE])
    for encoder in rows[0].similarity if rows else {}:
        found[f"similarity {encoder}"] = lambda row, encoder=encoder: (row.similarity[encoder].to_reference, 1.0)
        found[f"similarity to another clip {encoder}"] = lambda row, encoder=encoder: to_other(row, encoder)
    for name in sorted({name for row in rows for name in row.mos_difference}):
        found[f"mos {name}"] = lambda row, name=name: mos_of(row, name)
    found["failures"] = lambda row: (float(bool(row.failure)), 1.0)
    return found


def edits_of(part: Edits) -> tuple[float, float]:
    return float(part.errors), float(part.length)


def to_other(row: Utterance, encoder: str) -> tuple[float, float] | None:
    value = row.similarity[encoder].to_other
    return None if value is None else (value, 1.0)


def mos_of(row: Utterance, name: str) -> tuple[float, float] | None:
    value = row.mos_difference.get(name)
    return None if value is None else (value, 1.0)


BOUNDS = {"cer": ERROR_RATE, "wer": ERROR_RATE, "failures": SHARE}


def paired(first: list[Utterance], second: list[Utterance], metric: str, values: Values) -> Comparison:
    """By item: the draws of an item are summed up, so that a system with more draws weighs no more. Only items of both."""
    sums = [by_item(rows, values) for rows in (first, second)]
    both = [item for item in sums[0] if item in sums[1]]
    arrays = [np.array([part[item][:2] for item in both], np.float64).reshape(-1, 2) for part in sums]
    speakers = np.array([sums[0][item][2] for item in both])
    bounds = BOUNDS.get(metric) or (COSINE if metric.startswith("similarity") else MOS_DIFFERENCE)
    return compare(arrays[0], arrays[1], speakers, lower_is_better=metric in BOUNDS, bounds=bounds)


def by_item(rows: list[Utterance], values: Values) -> dict[str, tuple[float, float, str]]:
    parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    speakers = {}
    for row in rows:
        value = values(row)
        if value is not None:
            parts[row.item].append(value)
            speakers[row.item] = row.speaker
    return {
        item: (sum(v[0] for v in found) / len(found), sum(v[1] for v in found) / len(found), speakers[item])
        for item, found in parts.items()
    }


def figures(comparison: Comparison) -> dict[str, Any]:
    return {
        name: rounded(value) if isinstance(value, float) else value
        for name, value in msgspec.to_builtins(comparison).items()
    }


# --- parts ----------------------------------------------------------------------------------------------------------


def split(by_name: dict[str, list[Utterance]], parts_of: Any) -> dict[str, dict[str, Any]]:
    """The main figures by group or speaker, for each system."""
    found: dict[str, dict[str, Any]] = {}
    for name, rows in by_name.items():
        parts: dict[str, list[Utterance]] = defaultdict(list)
        for row in rows:
            for part in parts_of(row):
                parts[part].append(row)
        for part in sorted(parts):
            found.setdefault(part, {})[name] = short_figures(parts[part])
    return dict(sorted(found.items()))


def short_figures(rows: list[Utterance]) -> dict[str, Any]:
    found: dict[str, Any] = {"utterances": len(rows), "failures": share(bool(row.failure) for row in rows)}
    if rows[0].characters:
        found["cer"] = rounded(corpus(row.characters[HEADLINE] for row in rows).rate)
        found["wer"] = rounded(corpus(row.words[HEADLINE] for row in rows).rate)
    for encoder in rows[0].similarity:
        found[f"similarity {encoder}"] = rounded(np.mean([row.similarity[encoder].to_reference for row in rows]))
    return found


def badness(row: Utterance) -> tuple[float, ...]:
    """Sorts the worst to the end: failures, then errors, then unlike voices."""
    rate = row.characters[HEADLINE].rate if row.characters else 0.0
    alike = min((pair.to_reference for pair in row.similarity.values()), default=0.0)
    return float(bool(row.failure)), rate, -alike


def worst(by_name: dict[str, list[Utterance]], systems: list[System]) -> list[dict[str, Any]]:
    """The worst utterances of the systems under test: tuned and foreign ones, or the base where it is alone."""
    plain = [system for system in systems if not system.perturb]  # what a bad reference does has rows of its own
    tested = [system.name for system in plain if system.kind in ("tuned", "waves")]
    tested = tested or [system.name for system in plain if system.kind == "base"]
    rows = sorted((row for name in tested for row in by_name[name]), key=badness, reverse=True)[:NUM_WORST]
    return [
        {
            "system": row.system,
            "draw": row.draw,
            "item": row.item,
            "speaker": row.speaker,
            "failure": row.failure,
            "cer": rounded(row.characters[HEADLINE].rate) if row.characters else None,
            "text": row.text,
            "recognised": row.recognised,
        }
        for row in rows
    ]


def share(values: Any) -> float:
    values = list(values)
    return rounded(np.mean(values)) if values else 0.0


def rounded(value: Any) -> float:
    """Six digits: enough for any reader, and the same on every machine that adds in another order."""
    return round(float(value), 6)
