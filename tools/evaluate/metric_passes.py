"""Each metric model's pass over the waves: speaker encoders, a recognizer, MOS predictors.

In: rows of waves. Out: a row of scores for each. One model is in memory at a time; what is not installed is added to `skipped`
with the line that installs it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sized
from typing import Any

import msgspec

from shards.terminal import print_line, progress_bar
from tools.evaluate.items import Items
from tools.evaluate.mos import load_predictor
from tools.evaluate.request import Plan, Request
from tools.evaluate.row_file import Key
from tools.evaluate.scoring import (
    Faults,
    Scores,
    Similarity,
    mos_score,
    scores_with,
    similarities,
    text_score,
    voice_score,
)
from tools.evaluate.speaking import Spoken
from train.evaluation.metric_models import NotInstalled
from train.evaluation.recognizers import load_recognizer
from train.evaluation.speaker_encoders import load_encoder


def scored_voices(
    request: Request,
    items: Items,
    spoken: dict[Key, Spoken],
    facts: Scores,
    identities: dict[str, Any],
    skipped: list[str],
) -> dict[str, tuple[dict[Key, Similarity], Scores]]:
    """By encoder: the similarity of every wave, and its vector."""
    found: dict[str, tuple[dict[Key, Similarity], Scores]] = {}
    for name in request.encoders:
        try:
            encoder = load_encoder(name)
        except NotInstalled as error:
            skipped.append(f"similarity by {error}")
            continue
        faults: Faults = {}
        scored = scores_with("similarity", encoder.identity, voice_score(encoder), spoken, facts, request.out, faults)
        vectors: Scores = last(scored, spoken, f"voices by {name}")
        if is_lost(f"similarity by {name}", faults, vectors, spoken, skipped):
            continue
        found[encoder.identity.name] = similarities(items.items, spoken, vectors), vectors
        identities["similarity"].append(msgspec.to_builtins(encoder.identity))
        del encoder, scored
        gc.collect()
    if not request.encoders:
        skipped.append("similarity: no encoder was named with --similarity")
    return found


def recognised_texts(
    request: Request,
    spoken: dict[Key, Spoken],
    facts: Scores,
    identities: dict[str, Any],
    skipped: list[str],
    references: bool = False,
) -> Scores | None:
    """What is said in every wave, of references only if asked; None without a recognizer."""
    try:
        recognizer = load_recognizer(request.asr, request.language, request.device)
    except NotInstalled as error:
        skipped.append(f"CER and WER by {error}")
        return None
    if recognizer is None:
        skipped.append("CER and WER: no recognizer; name a local one, --asr faster-whisper:FOLDER or whisper:FOLDER")
        return None
    said = {key: row for key, row in spoken.items() if references or key[0] != "reference"}
    faults: Faults = {}
    scored = scores_with("asr", recognizer.identity, text_score(recognizer), said, facts, request.out, faults)
    texts: Scores = last(scored, said, "recognised")
    if is_lost(f"CER and WER by {request.asr}", faults, texts, said, skipped):
        return None
    identities["asr"] = msgspec.to_builtins(recognizer.identity)
    return texts


def predicted_mos(
    request: Request,
    plan: Plan,
    spoken: dict[Key, Spoken],
    facts: Scores,
    identities: dict[str, Any],
    skipped: list[str],
) -> list[Scores]:
    """Only where there is a recording to differ from: what these models say by itself means nothing here."""
    kinds = {system.kind for system in plan.systems}
    if request.mos and "real" not in kinds:
        skipped.append("MOS predictors: they are shown as a difference to the real recording, and the list names none")
        return []
    plain = {system.name for system in plan.systems if system.kind != "shuffled"}
    waves = {key: row for key, row in spoken.items() if key[0] in plain}
    found = []
    for name in request.mos:
        try:
            predictor = load_predictor(name, request.device)
        except NotInstalled as error:
            skipped.append(f"MOS by {error}")
            continue
        faults: Faults = {}
        scored = scores_with("mos", predictor.identity, mos_score(predictor), waves, facts, request.out, faults)
        values: Scores = last(scored, waves, f"MOS by {name}")
        if is_lost(f"MOS by {name}", faults, values, waves, skipped):
            continue
        found.append(values)
        identities["mos"].append(msgspec.to_builtins(predictor.identity))
        del predictor, scored
        gc.collect()
    if not request.mos:
        skipped.append("MOS predictors: none was named with --mos")
    return found


def is_lost(what: str, faults: Faults, scores: Scores, waves: dict[Key, Spoken], skipped: list[str]) -> bool:
    """Whether a metric scored nothing and raised, so that it is skipped; its faults stand in `skipped` either way."""
    if not faults:
        return False
    (system, draw, item), fault = next(iter(faults.items()))
    first = f"the first, {system}, draw {draw}, item {item}: {fault}"
    if not any(key in waves for key in scores):
        skipped.append(f"{what}: it failed on all {len(faults)} waves; {first}")
        return True
    skipped.append(
        f"{what}: it failed on {len(faults)} of {len(waves)} waves, which counts against their systems; the same command tries "
        f"again; {first}"
    )
    return False


def last(steps: Iterable[Any], total: Sized, what: str) -> Any:
    """Run to the end, with a bar on a terminal and a line now and then elsewhere.

    Returns what the last step has yielded as its second part, or an empty dictionary.
    """
    found: Any = {}
    number = 0
    with progress_bar(what, len(total)) as advance:
        for number, step in enumerate(steps, 1):  # noqa: B007 - said at the end
            found = step[1] if isinstance(step, tuple) else step
            advance()
    if number:
        print_line(f"{what} {number}/{len(total)}")
    return found
