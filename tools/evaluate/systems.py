"""The systems that stand side by side, and where each one's waves come from.

In: what was typed. Out: `System`s in the order of the report: real recordings (ceiling), base, tuned ones, waves of other
systems, shuffled speakers (floor). A shuffled item plays another speaker's recording in its place, so that its similarity is
that of strangers and its error rate that of a wrong text; both tell what the same measure gives for nothing.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import Literal

import msgspec

from preprocess.sound_edits import AudioSection
from preprocess.text import TextSection
from shards.config import FeaturesSection, ModelSection, SequenceSection, read_config
from shards.errors import CheckpointError, DataError
from shards.json_file import read_json_object
from shards.printable import file_name
from tools.evaluate.items import Item
from tools.evaluate.perturb import Perturbation
from tools.speaker import SpeakConfig
from train.config import TrainSection

Kind = Literal["real", "base", "tuned", "waves", "shuffled"]
REFERENCE = "reference"  # not a system: the prompt's own waves
WAVE_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")


class EvaluateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The sections of pipeline.toml that `evaluate` reads; `train` for what is held out."""

    model: ModelSection
    features: FeaturesSection
    sequence: SequenceSection
    text: TextSection
    audio: AudioSection
    train: TrainSection

    @property
    def speak(self) -> SpeakConfig:
        return SpeakConfig(
            model=self.model, features=self.features, sequence=self.sequence, text=self.text, audio=self.audio
        )


class System(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    kind: Kind
    model: str = ""  # folder or hub id
    adapter: str = ""
    folder: str = ""  # of waves
    weights: str = ""  # sha256 name of what speaks
    perturb: str = ""  # what its references go through

    @property
    def speaks(self) -> bool:
        return self.kind in ("base", "tuned")

    def is_model_of(self, other: System) -> bool:
        """Whether `other` is this model with perturbed references."""
        return self.kind == other.kind and (self.model, self.adapter) == (other.model, other.adapter)


def perturbed_system(system: System, perturbation: Perturbation) -> System:
    """The same model with other references: a system of its own, held against the one it is of."""
    return msgspec.structs.replace(system, name=f"{system.name} +{perturbation.name}", perturb=perturbation.name)


def base_system(config: EvaluateConfig) -> System:
    """The model that training begins with, without an adapter. Raises ConfigError where it is not to be had."""
    from shards.artifacts import resolve, weights_fingerprint

    folder = resolve(config.model.base, config.model.revision, "model.base (leave the base out with --no-base)")
    return System(name="base", kind="base", model=config.model.base, weights=weights_fingerprint(folder))


def tuned_system(path: Path, config: EvaluateConfig, name: str) -> System:
    """A merged folder, an adapter, a checkpoint, or a run (its best checkpoint, else its newest)."""
    from shards.artifacts import resolve, weights_fingerprint

    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a merged model, a RUN, a checkpoint or an adapter folder")
    adapter = adapter_of(path)
    if adapter:
        base = resolve(config.model.base, config.model.revision, "model.base")
        weights = adapter / "adapter_model.safetensors"
        if not weights.is_file():
            raise CheckpointError(f"{weights}: no such file; the adapter is incomplete")
        sha256 = hashlib.sha256(weights_fingerprint(base).encode() + weights.read_bytes()).hexdigest()
        return System(name=name, kind="tuned", model=config.model.base, adapter=str(adapter), weights=sha256)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no model here; give a merged model, a RUN, a checkpoint or an adapter folder")
    return System(name=name, kind="tuned", model=str(path), weights=weights_fingerprint(path))


def adapter_of(path: Path) -> Path | None:
    """The adapter folder that a run, a checkpoint or an adapter folder means; None for a model."""
    from tools.checkpoints.merge import find_checkpoint
    from train.run_folder.checkpoint_folders import best_checkpoint

    if (path / "adapter_config.json").is_file():
        return path
    if (path / "adapter").is_dir():
        return path / "adapter"
    if (path / "checkpoints").is_dir():
        return (best_checkpoint(path) or find_checkpoint(path)) / "adapter"
    return None


def config_of(path: Path) -> Path | None:
    """config.toml of a run or a checkpoint, or of the checkpoint an adapter lies in."""
    found = [folder / "config.toml" for folder in (path, path.parent) if (folder / "config.toml").is_file()]
    return found[0] if found and adapter_of(path) else None


def is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir() and (path / "config.toml").is_file()


def run_of(path: Path) -> Path | None:
    """The run that a path is: itself, or that of a checkpoint or adapter in it; None for what is of no run here."""
    folders = (path.resolve(), *path.resolve().parents[:3])
    return next((folder for folder in folders if is_run(folder) and (folder / "environment.json").is_file()), None)


def run_section(run: Path) -> TrainSection:
    """[train] as the run was started with it, whatever this command's configuration says."""
    return read_config(EvaluateConfig, run / "config.toml").train


def run_data_sets(run: Path, section: TrainSection) -> list[Path]:
    """The data sets that a run was trained on together. Raises DataError for those that are not here."""
    named = [Path(source.path) for source in section.data]
    if missing := [folder for folder in named if not (folder / "dataset.json").is_file()]:
        raise DataError(f"{run}: its data set {missing[0]} is not here; give another data set folder as DATA")
    return named or [run_data(run)]


def run_data(run: Path) -> Path:
    """The data set that a run was trained on, as its latest start was typed. Raises DataError."""
    command = read_json_object(run / "environment.json", "what a run was started with").get("command", "")
    try:
        words = shlex.split(command)[1:]
    except (ValueError, AttributeError, TypeError):  # an open quote; no text at all
        words = []
    for word in words:
        if (Path(word) / "dataset.json").is_file():
            return Path(word)
    raise DataError(f"{run}: its environment.json names no data set that is here; give the data set folder as DATA")


def read_evaluate_config(path: Path | None, overrides: tuple[str, ...], models: tuple[Path, ...]) -> EvaluateConfig:
    """The configuration: of the run that a model is of, where none is named."""
    if path is None:
        path = next((found for found in map(config_of, models) if found), None)
    return read_config(EvaluateConfig, path, overrides)


def waves_system(name: str, folder: Path) -> System:
    if not folder.is_dir():
        raise DataError(f"--only-score {folder}: no such folder; give a folder of waves named like the items")
    return System(name=name, kind="waves", folder=str(folder))


def find_wave(folder: Path, item_id: str) -> Path:
    """FOLDER/ID.wav or one of the other kinds; ID.wav where there is none. An id cannot lead out of the folder."""
    for suffix in WAVE_SUFFIXES:
        path = folder / f"{item_id}{suffix}"
        try:
            if path.resolve().is_relative_to(folder.resolve()) and path.is_file():
                return path
        except (OSError, ValueError):  # longer than any name, or with a NUL: somebody's id, no file
            return folder / f"{file_name(item_id)}.wav"
    return folder / f"{Path(item_id).name}.wav"


def strangers(items: list[Item]) -> list[int] | None:
    """For every item the next one of another speaker; None where all items are of one speaker."""
    if len({item.speaker for item in items}) < 2:
        return None
    found = []
    for number, item in enumerate(items):
        step = next(s for s in range(1, len(items)) if items[(number + s) % len(items)].speaker != item.speaker)
        found.append((number + step) % len(items))
    return found


def other_clips(items: list[Item]) -> list[int | None]:
    """For every item another one of its speaker whose recording is neither its own nor its reference; None without one."""
    by_speaker: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        by_speaker.setdefault(item.speaker, []).append(number)
    found: list[int | None] = []
    for number, item in enumerate(items):
        own = {(item.reference, item.reference_segment), (item.real, item.real_segment)}
        mine = by_speaker[item.speaker]
        place = mine.index(number)
        others = (mine[(place + step) % len(mine)] for step in range(1, len(mine)))
        found.append(
            next((o for o in others if items[o].real and (items[o].real, items[o].real_segment) not in own), None)
        )
    return found
