"""The whole evaluation in its order: recordings, speech, scores, results. Each part goes on where it was stopped.

In: a `Request`. Out: OUT/results.json and its dictionary. OUT/evaluation.json fixes items, systems and draws before the first
wave, so that a later call cannot mix two evaluations in one folder; recognizers and encoders may change, their scores lie in
files of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from shards.errors import ConfigError, DataError, PipelineError
from shards.folder_lock import hold_folder
from shards.terminal import print_line
from shards.writer import write_bytes, write_json
from tools.evaluate.dataset_items import dataset_items, folder_of, is_dataset, training_overlap
from tools.evaluate.items import Items, read_items
from tools.evaluate.metric_passes import last, predicted_mos, recognised_texts, scored_voices
from tools.evaluate.request import Plan, Request
from tools.evaluate.results import summed_up
from tools.evaluate.row_file import Key
from tools.evaluate.scoring import measured
from tools.evaluate.speaking import Spoken, point_at_waves, speak, speech_file, write_recordings
from tools.evaluate.systems import (
    EvaluateConfig,
    System,
    base_system,
    is_run,
    perturbed_system,
    run_data_sets,
    run_of,
    run_section,
    strangers,
    tuned_system,
    waves_system,
)
from tools.evaluate.utterances import Utterance, utterances_of

if TYPE_CHECKING:
    from train.config import TrainSection
    from train.model.generate import Sampling


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
    trained_on, section = training_of(request, config)
    items = items_of(request, config)
    if trained_on:
        return items, training_overlap(items, trained_on, section)
    if items.kind.startswith("held-out"):
        return items, f"unseen if {items.source} was the training data: {items.kind}"
    return items, "not checked whether training has seen these speakers; name its data set with --train-data SHARDS"


def training_of(request: Request, config: EvaluateConfig) -> tuple[list[Path], TrainSection]:
    """The data sets of --train-data, else those of the runs that models are of, and how training divides them."""
    if request.train_data:
        return [folder_of(path) for path in request.train_data], config.train
    for run in filter(None, map(run_of, (*request.models, request.data))):
        try:
            section = run_section(run)
            return run_data_sets(run, section), section
        except PipelineError as error:
            print_line(f"skipped: whether training has seen these speakers: {error}")
    return [], config.train


def items_of(request: Request, config: EvaluateConfig) -> Items:
    """Of a RUN what it held out, as it wrote down itself; of a data set what the configuration holds out of it."""
    data, section = request.data, config.train
    if is_run(data):
        section = run_section(data)
        if section.validation_data:
            return dataset_items([Path(section.validation_data)], None, request.limit)
        if not section.validation_fraction:
            raise DataError(f"{data}: this run held nothing out (train.validation_fraction = 0); give other data")
        return dataset_items(run_data_sets(data, section), section, request.limit)
    if not is_dataset(data):
        return read_items(data, request.limit)
    folder = folder_of(data)
    together = [Path(source.path) for source in section.data]
    is_one_of_them = folder.resolve() in {path.resolve() for path in together}
    return dataset_items([folder], section, request.limit, together if is_one_of_them else ())


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
