"""`evaluate --data-only DATA OUT`: is this data worth training on. Every clip against its text, both clips of a row against
each other.

In: a list or a data set, a speaker encoder and, where one is named, a recognizer. Out: OUT/data.json, OUT/rows.jsonl and
OUT/data.html with the worst 1 % of rows to listen to; of a ChatML list also the checks of `preprocess --validate-only`, in
OUT/validation. Wrong speaker labels are the main fault of cloning data: a row whose reference and target are less alike than
most strangers are is counted. Nothing is removed; a row that cannot be read counts as all wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shards.printable import printable
from shards.terminal import print_line
from shards.writer import write_bytes, write_json
from tools.evaluate.data_page import body
from tools.evaluate.dataset_items import dataset_items, folder_of, is_dataset
from tools.evaluate.items import Item, Items, read_items
from tools.evaluate.metric_passes import last, recognised_texts, scored_voices
from tools.evaluate.request import Plan, Request
from tools.evaluate.run import hold_plan
from tools.evaluate.scoring import Scores, Similarity, measured
from tools.evaluate.speaking import Spoken, speech_file, write_recordings
from tools.evaluate.systems import REFERENCE, EvaluateConfig, System, strangers
from tools.evaluate.utterances import NO_WAVE
from tools.evaluate.waves import failure_of
from tools.web_page.page import page
from train.evaluation.edits import Edits, character_edits, corpus, failed
from train.evaluation.text_protocols import HEADLINE, PROTOCOLS

WORST_SHARE = 0.01  # of the rows, and at least one
STRANGERS_QUANTILE = 0.95  # a row below this share of strangers' similarities is suspected
VALIDATED = ("ChatML list",)


class Clip(msgspec.Struct, frozen=True, kw_only=True):
    """A recording of a row against its text."""

    failure: str = ""  # missing, empty, silent or clipped
    error: str = ""
    duration_s: float = 0.0
    recognised: str | None = None
    characters: Edits | None = None  # by the headline's rules; None without a recognizer


class Row(msgspec.Struct, frozen=True, kw_only=True):
    item: str
    speaker: str
    text: str
    reference: Clip
    target: Clip | None  # None: the list names no recording
    agreement: dict[str, float] = {}  # similarity of reference and target, by encoder


def check_data(
    request: Request, config: EvaluateConfig, overrides: Iterable[str], config_path: Path | None
) -> dict[str, Any]:
    """Run, or go on with, a check in OUT; returns data.json. Raises PipelineError for what a person can fix."""
    from shards.folder_lock import hold_folder

    with hold_folder(request.out):
        items = all_items(request)
        system = System(name="real", kind="real")
        hold_plan(request.out, Plan(items=items, systems=[system], draws=1, sampling={"data only": True}))
        skipped: list[str] = []
        validation = validated(request, items, overrides, config_path, skipped)
        spoken, facts = recordings(request, config, items)
        identities: dict[str, Any] = {"similarity": [], "asr": None}
        voices = scored_voices(request, items, spoken, facts, identities, skipped)
        texts = recognised_texts(request, spoken, facts, identities, skipped, references=True)
        rows = [
            row_of(item, facts, texts, {name: found for name, (found, _) in voices.items()}) for item in items.items
        ]
        between = {name: strangers_similarity(items.items, vectors) for name, (_, vectors) in voices.items()}
        results = summed_up(items, rows, between, identities, skipped, validation)
        write_json(request.out / "data.json", results)
        write_bytes(request.out / "rows.jsonl", b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        write_bytes(request.out / "data.html", page("Data", body(results, rows, request.out)).encode())
    return results


def all_items(request: Request) -> Items:
    return (
        dataset_items([folder_of(request.data)], None, request.limit)
        if is_dataset(request.data)
        else read_items(request.data, request.limit)
    )


def validated(
    request: Request, items: Items, overrides: Iterable[str], config_path: Path | None, skipped: list[str]
) -> dict[str, Any] | None:
    """What `preprocess --validate-only` says of a ChatML list. However much it refuses, the check goes on."""
    if items.kind not in VALIDATED:
        why = "it is made of rows that passed them" if is_dataset(request.data) else "they read ChatML lists"
        skipped.append(f"checks of preprocess --validate-only: {why}")
        return None
    from preprocess.config import PreprocessConfig
    from preprocess.plan import Request as Job
    from preprocess.validate import validate
    from shards.config import read_config

    known = PreprocessConfig.__struct_fields__
    mine = [text for text in overrides if text.split(".")[0] in known]
    asked = read_config(PreprocessConfig, config_path, [*mine, "preprocess.max_reject_fraction=1"])
    source = (
        request.data
        if request.data.is_file()
        else next(path for name in ("chatml.json", "chatml.jsonl") if (path := request.data / name).is_file())
    )
    return validate(Job(data=source, out=request.out / "validation", limit=request.limit), asked)


def recordings(request: Request, config: EvaluateConfig, items: Items) -> tuple[dict[Any, Spoken], Scores]:
    rows = speech_file(request.out)
    try:
        write_recordings(items, config, request.out, rows, request.device)
    finally:
        rows.close()
    spoken = {key: rows.rows[key] for key in sorted(rows.rows)}
    return spoken, last(measured(spoken, request.out), spoken, "measured")


# --- rows -----------------------------------------------------------------------------------------------------------


def row_of(item: Item, facts: Scores, texts: Scores | None, voices: dict[str, dict[Any, Similarity]]) -> Row:
    alike = {}
    for name, found in voices.items():
        pair = found.get(("real", 0, item.id))
        alike[name] = pair.to_reference if pair else 0.0
    target = None if item.real is None else clip_of("real", item, item.text, facts, texts)
    return Row(
        item=item.id,
        speaker=item.speaker,
        text=item.text,
        reference=clip_of(REFERENCE, item, item.reference_text, facts, texts),
        target=target,
        agreement={} if target is None else alike,
    )


def clip_of(role: str, item: Item, text: str, facts: Scores, texts: Scores | None) -> Clip:
    row = facts.get((role, 0, item.id))
    about = row.facts if row else None
    failure = failure_of(about, None, None) if about else "missing"
    recognised = None if texts is None else (texts[role, 0, item.id].text or "" if (role, 0, item.id) in texts else "")
    characters = None
    if recognised is not None:
        rule = PROTOCOLS[HEADLINE]
        characters = character_edits(rule(text), rule(recognised))
        characters = failed(characters) if failure in NO_WAVE else characters
    return Clip(
        failure=failure,
        error=about.error if about else "no wave",
        duration_s=about.duration_s if about else 0.0,
        recognised=recognised,
        characters=characters,
    )


def strangers_similarity(items: list[Item], voices: Scores) -> list[float]:
    """Of every reference to the target of another speaker: what rows with a wrong label look like."""
    others = strangers(items)
    if others is None:  # one speaker only
        return []
    found = []
    for item, other in zip(items, others, strict=True):
        pair = [voices.get(key) for key in ((REFERENCE, 0, item.id), ("real", 0, items[other].id))]
        vectors = [np.array(row.vector) for row in pair if row is not None and row.vector is not None]
        if len(vectors) == 2:
            found.append(float(vectors[0] @ vectors[1]))
    return found


# --- figures --------------------------------------------------------------------------------------------------------


def summed_up(
    items: Items,
    rows: list[Row],
    between: dict[str, list[float]],
    identities: dict[str, Any],
    skipped: list[str],
    validation: dict[str, Any] | None,
) -> dict[str, Any]:
    clips = {"reference": [row.reference for row in rows], "target": [row.target for row in rows if row.target]}
    return {
        "format": 1,
        "data": {"kind": items.kind, "source": items.source, "rows": len(rows), "skipped": items.skipped},
        "speakers": len({row.speaker for row in rows}),
        "models": identities,
        "headline": f"cer {HEADLINE}",
        "not_measured": skipped,
        "validation": validation,
        "clips": {name: clip_figures(found) for name, found in clips.items() if found},
        "agreement": {name: agreement_figures(rows, name, alike) for name, alike in between.items()},
        "worst": worst(rows),
    }


def clip_figures(clips: list[Clip]) -> dict[str, Any]:
    failures: dict[str, int] = {}
    for clip in clips:
        if clip.failure:
            failures[clip.failure] = failures.get(clip.failure, 0) + 1
    parts = [clip.characters for clip in clips if clip.characters is not None]
    rates = [part.rate for part in parts]
    return {
        "clips": len(clips),
        "failures": failures,
        "cer": round(corpus(parts).rate, 6) if parts else None,
        "cer_of_the_worst_1_percent_from": round(float(np.quantile(rates, 1 - WORST_SHARE)), 6) if parts else None,
    }


def agreement_figures(rows: list[Row], name: str, between: list[float]) -> dict[str, Any]:
    alike = [row.agreement[name] for row in rows if name in row.agreement]
    limit = float(np.quantile(between, STRANGERS_QUANTILE)) if between else None
    suspected = [row.item for row in rows if limit is not None and row.agreement.get(name, 1.0) < limit]
    return {
        "rows": len(alike),
        "mean": round(float(np.mean(alike)), 6) if alike else None,
        "strangers_mean": round(float(np.mean(between)), 6) if between else None,
        "suspected_below": None if limit is None else round(limit, 6),
        "suspected": suspected,
    }


def badness(row: Row) -> tuple[float, ...]:
    """Clips that are no speech first, then texts that are not what is said, then voices that are two."""
    clips = [clip for clip in (row.reference, row.target) if clip]
    rate = max((clip.characters.rate for clip in clips if clip.characters), default=0.0)
    return float(any(clip.failure for clip in clips)), rate, -min(row.agreement.values(), default=1.0)


def worst(rows: list[Row]) -> dict[str, list[dict[str, Any]]]:
    """The worst 1 % by each measure, so that a list of bad texts does not hide the wrong voices."""
    count = max(1, round(WORST_SHARE * len(rows)))
    encoders = sorted({name for row in rows for name in row.agreement})
    orders: dict[str, list[Row]] = {"text": sorted(rows, key=badness, reverse=True)}
    for name in encoders:
        paired = [row for row in rows if name in row.agreement]
        orders[f"voice {name}"] = sorted(paired, key=lambda row, name=name: row.agreement[name])
    return {name: [short(row) for row in found[:count]] for name, found in orders.items()}


def short(row: Row) -> dict[str, Any]:
    def rate(clip: Clip | None) -> float | None:
        return round(clip.characters.rate, 6) if clip and clip.characters else None

    return {
        "item": row.item,
        "speaker": row.speaker,
        "text": row.text,
        "recognised": row.target.recognised if row.target else row.reference.recognised,
        "reference_cer": rate(row.reference),
        "target_cer": rate(row.target),
        "failures": [clip.failure for clip in (row.reference, row.target) if clip and clip.failure],
        "agreement": {name: round(value, 6) for name, value in row.agreement.items()},
    }


def show(results: dict[str, Any], out: Path) -> None:
    """What a person has to know, in lines on stderr."""
    for name, figures in results["clips"].items():
        cer = "not recognised" if figures["cer"] is None else f"CER {figures['cer']:.1%}"
        failures = ", ".join(f"{count} {what}" for what, count in figures["failures"].items()) or "none failed"
        print_line(f"{name} clips: {figures['clips']}, {failures}, {cer}")
    for name, figures in results["agreement"].items():
        if figures["rows"] and figures["suspected_below"] is not None:
            print_line(
                f"voices by {name}: reference and target {figures['mean']:.3f} alike, strangers {figures['strangers_mean']:.3f}; "
                f"{len(figures['suspected'])} of {figures['rows']} rows are less alike than most strangers: check their speaker"
            )
    for name, rows in results["worst"].items():
        for row in rows[:3]:
            print_line(f"worst by {name}: {row['item']} of {row['speaker']}: {printable(row['text'][:60])}")
    for line in results["not_measured"]:
        print_line(f"skipped: {line}")
    print_line(f"{out}/data.json: the figures; {out}/data.html: the worst with sound; {out}/rows.jsonl: every row")
