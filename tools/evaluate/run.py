"""The whole evaluation in its order: recordings, speech, scores, results. Each part goes on where it was stopped.

In: a `Request`. Out: OUT/results.json and its dictionary. OUT/evaluation.json fixes items, systems and draws before the first
wave, so that a later call cannot mix two evaluations in one folder; recognizers and encoders may change, their scores lie in
files of their own.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shards.errors import ConfigError, DataError
from shards.folder_lock import hold_folder
from shards.terminal import PLAIN_LINE_EVERY_S, print_line, progress_bar
from shards.writer import write_bytes, write_json
from tools.evaluate.dataset_items import dataset_items, is_dataset, training_overlap
from tools.evaluate.items import Items, read_items
from tools.evaluate.mos import load_predictor
from tools.evaluate.perturb import Perturbation
from tools.evaluate.results import summed_up
from tools.evaluate.row_file import Key
from tools.evaluate.scoring import (
    Scores,
    Similarity,
    measured,
    mos_score,
    scores_with,
    similarities,
    text_score,
    voice_score,
)
from tools.evaluate.speaking import Spoken, point_at_waves, speak, speech_file, write_recordings
from tools.evaluate.systems import (
    EvaluateConfig,
    System,
    base_system,
    perturbed_system,
    run_data,
    strangers,
    tuned_system,
    waves_system,
)
from tools.evaluate.utterances import Utterance, utterances_of
from train.evaluation.metric_models import NotInstalled
from train.evaluation.recognizers import load_recognizer
from train.evaluation.speaker_encoders import load_encoder

if TYPE_CHECKING:
    from train.model.generate import Sampling


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for."""

    data: Path
    out: Path
    models: list[Path] = []
    wave_folders: list[tuple[str, Path]] = []  # (name, folder) of --only-score
    with_base: bool = True
    draws: int = 1
    limit: int | None = None
    encoders: list[str] = []
    asr: str = "none"
    mos: list[str] = []
    perturbations: list[Perturbation] = []
    language: str = "ar"
    device: str = "cpu"
    train_data: Path | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """evaluation.json."""

    items: Items
    systems: list[System]
    draws: int
    sampling: dict[str, Any]


Result = tuple[dict[str, Any], list[Utterance], Plan]


def evaluate(request: Request, config: EvaluateConfig, sampling: Sampling) -> Result:
    """Run, or go on with, an evaluation in OUT. Raises PipelineError for what a person can fix."""
    with hold_folder(request.out):
        return _evaluate(request, config, sampling)


def _evaluate(request: Request, config: EvaluateConfig, sampling: Sampling) -> Result:
    items, seen = open_items(request, config)
    plan = fixed_plan(request, config, items, sampling)
    print_line(seen)
    for line in items.skipped[:5]:
        print_line(f"skipped: {line}")
    if len(items.skipped) > 5:
        print_line(f"skipped: {len(items.skipped) - 5} more; all stand in {request.out}/results.json")
    spoken = spoken_rows(request, config, plan, sampling)
    facts = last(measured(spoken, request.out), spoken, "measured")
    skipped: list[str] = []
    identities: dict[str, Any] = {"similarity": [], "asr": None, "mos": []}
    scored = scored_voices(request, items, spoken, facts, identities, skipped)
    voices = {name: alike for name, (alike, _) in scored.items()}
    texts = recognised_texts(request, spoken, facts, identities, skipped)
    mos = predicted_mos(request, plan, spoken, facts, identities, skipped)
    rows = utterances_of(plan.items.items, plan.systems, plan.draws, spoken, facts, texts, voices, mos)
    about = {
        "seen": seen,
        "data": {
            "kind": items.kind,
            "source": items.source,
            "items": len(items.items),
            "speakers": len({item.speaker for item in items.items}),
            "skipped": items.skipped,
        },
        "draws": plan.draws,
        "sampling": plan.sampling,
    }
    skipped += absent_parts(plan) + unreadable(spoken)
    results = summed_up(rows, plan.systems, identities, skipped, about)
    write_json(request.out / "results.json", results)
    write_bytes(request.out / "utterances.jsonl", b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    return results, rows, plan


# --- what is evaluated ----------------------------------------------------------------------------------------------


def open_items(request: Request, config: EvaluateConfig) -> tuple[Items, str]:
    """The items, and the first line of the report: whether training has seen them."""
    data, section = request.data, config.train
    fraction = section.validation_fraction
    if (data / "checkpoints").is_dir() and (data / "config.toml").is_file():
        data = Path(section.validation_data) if section.validation_data else run_data(data)
        if not fraction and not section.validation_data:
            raise DataError(
                f"{request.data}: this run held nothing out (train.validation_fraction = 0); give other data"
            )
    if not is_dataset(data):
        items = read_items(data, request.limit)
    else:
        items = dataset_items(data, fraction, section.seed, request.limit)
    if request.train_data:
        return items, training_overlap(items, request.train_data, fraction, section.seed)
    if items.kind.startswith("held-out"):
        return items, f"unseen if {items.source} was the training data: {items.kind}"
    return items, "not checked whether training has seen these speakers; name its data set with --train-data SHARDS"


def fixed_plan(request: Request, config: EvaluateConfig, items: Items, sampling: Sampling) -> Plan:
    """What evaluation.json fixes. Raises DataError when OUT holds another one."""
    import dataclasses

    plan = Plan(
        items=items,
        systems=chosen_systems(request, config, items),
        draws=request.draws,
        sampling=dataclasses.asdict(sampling),
    )
    hold_plan(request.out, plan)
    return plan


def hold_plan(out: Path, plan: Plan) -> None:
    """Fix `plan` in OUT. Raises DataError when OUT holds another one."""
    path = out / "evaluation.json"
    if not path.is_file():
        write_json(path, plan)
        return
    try:
        old = msgspec.json.decode(path.read_bytes(), type=Plan)
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: not readable: {error}; give a new OUT") from None
    changed = [name for name in plan.__struct_fields__ if getattr(old, name) != getattr(plan, name)]
    if changed:
        raise DataError(f"{out}: holds an evaluation of other {' and '.join(changed)}; give a new OUT")


def chosen_systems(request: Request, config: EvaluateConfig, items: Items) -> list[System]:
    systems: list[System] = []
    if any(item.real for item in items.items):
        systems.append(System(name="real", kind="real"))
    if request.with_base:
        systems.append(base_system(config))
    for number, path in enumerate(request.models):
        name = "tuned" if len(request.models) == 1 else f"tuned {number + 1} ({path.name})"
        systems.append(tuned_system(path, config, name))
    systems += [
        perturbed_system(system, perturbation)
        for perturbation in request.perturbations
        for system in list(systems)
        if system.speaks
    ]
    systems += [waves_system(name, folder) for name, folder in request.wave_folders]
    if strangers(items.items):
        systems.append(System(name="shuffled", kind="shuffled"))
    names = [system.name for system in systems]
    doubled = {name for name in names if names.count(name) > 1} | ({"reference"} & set(names))
    if doubled:
        raise ConfigError(f"--only-score: the name {min(doubled)!r} is taken; give another one with NAME=FOLDER")
    return systems


def absent_parts(plan: Plan) -> list[str]:
    """What could not stand in the report, and why."""
    kinds = {system.kind for system in plan.systems}
    found = []
    if "real" not in kinds:
        found.append("real recordings (ceiling), duration ratio: the list names none")
    if "base" not in kinds:
        found.append("base model: skipped with --no-base, so nobody knows whether tuning helped")
    if "shuffled" not in kinds:
        found.append("shuffled speakers (floor): all items are of one speaker")
    return found


def unreadable(spoken: dict[Key, Spoken]) -> list[str]:
    """References and recordings that could not be read: the list's fault, though every system pays for it."""
    return [
        f"item {item}: its {'recording' if role == 'real' else role} could not be read, which counts against every system: "
        f"{row.error}"
        for (role, _, item), row in spoken.items()
        if role in ("real", "reference") and row.error
    ]


# --- the parts ------------------------------------------------------------------------------------------------------


def spoken_rows(request: Request, config: EvaluateConfig, plan: Plan, sampling: Sampling) -> dict[Key, Spoken]:
    """Every wave's row, in an order that does not depend on when it was made."""
    rows = speech_file(request.out)
    try:
        write_recordings(plan.items, config, request.out, rows, request.device)
        for system in plan.systems:
            if system.kind in ("waves", "shuffled"):
                point_at_waves(system, plan.items.items, rows)
        for systems in of_one_model(plan.systems):
            total = range(len(plan.items.items) * plan.draws * len(systems))
            spoken = speak(systems, plan.items, config, request.out, rows, sampling, plan.draws, request.device)
            last(spoken, total, f"{systems[0].name}: spoken")
    finally:
        rows.close()
    return {key: rows.rows[key] for key in sorted(rows.rows)}


def of_one_model(systems: list[System]) -> list[list[System]]:
    """The systems that speak, each model's together: the plain one and those with perturbed references."""
    found: dict[tuple[str, str], list[System]] = {}
    for system in systems:
        if system.speaks:
            found.setdefault((system.model, system.adapter), []).append(system)
    return list(found.values())


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
        scored = scores_with("similarity", encoder.identity, voice_score(encoder), spoken, facts, request.out)
        vectors: Scores = last(scored, spoken, f"voices by {name}")
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
    identities["asr"] = msgspec.to_builtins(recognizer.identity)
    said = {key: row for key, row in spoken.items() if references or key[0] != "reference"}
    return last(
        scores_with("asr", recognizer.identity, text_score(recognizer), said, facts, request.out), said, "recognised"
    )


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
    heard = {key: row for key, row in spoken.items() if key[0] in plain}
    found = []
    for name in request.mos:
        try:
            predictor = load_predictor(name, request.device)
        except NotInstalled as error:
            skipped.append(f"MOS by {error}")
            continue
        scored = scores_with("mos", predictor.identity, mos_score(predictor), heard, facts, request.out)
        found.append(last(scored, heard, f"{name}: heard"))
        identities["mos"].append(msgspec.to_builtins(predictor.identity))
        del predictor, scored
        gc.collect()
    if not request.mos:
        skipped.append("MOS predictors: none was named with --mos")
    return found


def last(steps: Iterable[Any], total: Sized, what: str) -> Any:
    """Run to the end, with a bar on a terminal and a line now and then elsewhere.

    Returns what the last step has yielded as its second part, or an empty dictionary.
    """
    found: Any = {}
    shown, number = time.monotonic(), 0
    with progress_bar(what, len(total)) as advance:
        for number, step in enumerate(steps, 1):
            found = step[1] if isinstance(step, tuple) else step
            advance()
            if time.monotonic() - shown > PLAIN_LINE_EVERY_S and not sys.stderr.isatty():
                shown = time.monotonic()
                print_line(f"{what} {number}/{len(total)}")
    if number:
        print_line(f"{what} {number}/{len(total)}")
    return found
