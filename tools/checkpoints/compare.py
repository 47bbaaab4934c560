"""Checkpoints side by side: losses, evaluations, how far each has moved, and which one to take.

In: checkpoint folders, or runs. Out: a `Comparison`. The winner is chosen by what it sounds like where all were evaluated under
the same conditions (character error rate), else by held-out audio loss, and only among checkpoints judged by the same held-out
data; ties go to the earlier step. Norms and distances are of the updates scale * B * A.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shards.errors import CheckpointError
from shards.terminal import progress_bar
from tools.checkpoints.curves import read_curves
from tools.checkpoints.evaluations import Row, evaluations_of, rows_of, run_of
from tools.checkpoints.merge import choose_checkpoint
from tools.checkpoints.sound import require_sound, say_if_written, still_there
from tools.checkpoints.updates import Update, read_update
from train.run_folder.checkpoint_folders import AUDIO_LOSS, complete_checkpoints, read_metrics, read_step
from train.run_folder.identity import WHAT, Identity, read_identity

HELD_OUT_LOSS = f"eval/{AUDIO_LOSS}"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint."""

    name: str
    folder: str
    step: int
    held_out: dict[str, float]  # eval/... losses; empty where nothing was held out
    judged_on: str  # which held-out data; losses of others are not comparable
    evaluations: list[Row]
    norms: dict[str, float]  # of the update, by group
    uses_dora: bool


class Distance(msgspec.Struct, frozen=True):
    """Between the updates of two checkpoints."""

    first: str
    second: str
    relative: float  # ||D1 - D2|| / mean of both norms
    cosine: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    entries: list[Entry]
    distances: list[Distance]
    winner: str | None
    criterion: str
    curves: dict[str, list[tuple[float, float]]]  # held-out audio loss by run
    notes: list[str]


@dataclass(frozen=True)
class _Read:
    entry: Entry
    update: Update
    identity: Identity


def compare(paths: Sequence[Path], evaluations: Sequence[Path] = ()) -> Comparison:
    """One run: all its checkpoints. Several paths: of a run its best, else its newest. Raises PipelineError."""
    folders = chosen_folders(paths)
    read = []
    with progress_bar("reading", len(folders)) as done:
        for name, folder in names_of(folders).items():
            with still_there(folder):
                read.append(_read(folder, name, evaluations))
            done()
    entries = [part.entry for part in read]
    winner, criterion = choose(entries)
    runs = sorted({run for folder in folders if (run := run_of(folder))})
    curves = {name: read_curves(run, [HELD_OUT_LOSS])[HELD_OUT_LOSS] for name, run in names_of(runs).items()}
    notes = []
    if any(entry.uses_dora for entry in entries):
        notes.append(
            "of DoRA's checkpoints, norms and distances are of B * A alone, without the lengths that it learns too"
        )
    if len({entry.judged_on for entry in entries if entry.held_out}) > 1:
        notes.append("held-out losses are of different data: they stand side by side, and nothing is judged by them")
    notes += other_models(read)
    distances, unlike = distances_of(read)
    if unlike:
        notes.append(f"no distance for {unlike} pairs, which do not change the same modules of the same base")
    return Comparison(
        entries=entries,
        distances=distances,
        winner=winner.name if winner else None,
        criterion=criterion,
        curves={name: points for name, points in curves.items() if points},
        notes=notes,
    )


def chosen_folders(paths: Sequence[Path]) -> list[Path]:
    if len(paths) == 1 and not (paths[0] / "COMPLETE").is_file():
        say_if_written(paths[0])
        folders = list({folder.resolve(): folder for folder in complete_checkpoints(paths[0])}.values())  # links once
        if not folders:
            raise CheckpointError(
                f"{paths[0]}: no complete checkpoint here; give a RUN of `train`, or checkpoint folders"
            )
        return folders
    folders = [choose_checkpoint(path)[0] for path in paths]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise CheckpointError("the same checkpoint is named twice; give different ones")
    if len(folders) < 2:
        raise CheckpointError(f"{paths[0]}: one checkpoint has nothing to be compared with; give two or more, or a RUN")
    return folders


def names_of(folders: Sequence[Path]) -> dict[str, Path]:
    """The shortest ends of the paths that tell them apart."""
    length = 1
    names = [folder.resolve().name for folder in folders]
    while len(set(names)) < len(names):  # ends, as the paths are different, checked before
        length += 1
        names = ["/".join(folder.resolve().parts[-length:]) for folder in folders]
    return dict(zip(names, folders, strict=True))


def _read(folder: Path, name: str, named: Sequence[Path]) -> _Read:
    require_sound(folder)
    update, metrics, identity = read_update(folder), read_metrics(folder), read_identity(folder)
    settings = identity.settings
    held_out = {
        name: float(value)
        for name, value in metrics.items()
        if name.startswith("eval/") and isinstance(value, int | float) and math.isfinite(value)
    }
    data = identity.validation_digest or (
        f"{identity.dataset_digest} {settings.get('train.validation_fraction')} {settings.get('train.seed')}"
    )
    entry = Entry(
        name=name,
        folder=str(folder),
        step=read_step(folder),
        held_out=held_out,
        judged_on=f"{data} {settings.get('sequence.layout')} {identity.model.codec}",
        evaluations=rows_of(folder, evaluations_of(run_of(folder), named)),
        norms={group: squares**0.5 for group, squares in sorted(update.squares().items())},
        uses_dora=update.uses_dora,
    )
    return _Read(entry, update, identity)


def other_models(read: Sequence[_Read]) -> list[str]:
    """A note for each file that not all were trained on: base, tokenizer, codec, Whisper tower."""
    found = []
    for part, what in WHAT.items():
        prints = {one.entry.name: getattr(one.identity.model, part)[:16] or "none" for one in read}
        if len(set(prints.values())) > 1:
            named = ", ".join(f"{name} {value}" for name, value in prints.items())
            found.append(
                f"trained on different files as {what}: {named}; what differs between them is not training alone"
            )
    return found


def choose(entries: Sequence[Entry]) -> tuple[Entry | None, str]:
    """(the winner, by what). The lowest value; of equal ones the earlier step."""
    for conditions in [row.conditions for row in entries[0].evaluations]:
        found = {entry.name: cer_under(entry, conditions) for entry in entries}
        if all(value is not None for value in found.values()):
            best = min(entries, key=lambda entry: (found[entry.name], entry.step))
            words = f"{conditions[2]} of {conditions[3]} items by {conditions[1] or 'no recognizer'}"
            return best, f"lowest {words}; ties to the earlier step"
    losses = {entry.name: entry.held_out.get(HELD_OUT_LOSS) for entry in entries}
    if all(value is not None for value in losses.values()) and len({entry.judged_on for entry in entries}) == 1:
        best = min(entries, key=lambda entry: (losses[entry.name], entry.step))
        return best, "lowest held-out audio loss; ties to the earlier step"
    return None, (
        "none: not all were evaluated under the same conditions (`evaluate`, --evaluation FOLDER), nor judged by the same "
        "held-out data"
    )


def cer_under(entry: Entry, conditions: Any) -> float | None:
    return next((row.cer for row in entry.evaluations if row.conditions == conditions), None)


def distances_of(read: Sequence[_Read]) -> tuple[list[Distance], int]:
    """(of every pair that changes the same modules, number of the others)."""
    pairs = list(itertools.combinations(read, 2))
    found = []
    with progress_bar("distances", len(pairs)) as done:
        for first, second in pairs:
            found.append(distance(first, second))
            done()
    known = [part for part in found if part]
    return known, len(found) - len(known)


def distance(first: _Read, second: _Read) -> Distance | None:
    """None where they do not change the same modules of the same base."""
    if first.identity.model.base != second.identity.model.base:
        return None
    product = first.update.product(second.update)
    if product is None:
        return None
    squares = [sum(value**2 for value in part.entry.norms.values()) for part in (first, second)]
    norms = [value**0.5 for value in squares]
    apart = max(0.0, sum(squares) - 2 * product) ** 0.5
    mean = sum(norms) / 2
    cosine = product / (norms[0] * norms[1]) if all(norms) else 0.0
    return Distance(first.entry.name, second.entry.name, apart / mean if mean else 0.0, cosine)
