"""Which rows of which evaluations are of a checkpoint.

In: folders that `evaluate` wrote: those named, and RUN/evaluations/NAME without being named. Out: `Row`s of one checkpoint. A row
belongs to it by what spoke, not by where it lay: the sha256 that `evaluate` keeps of base and adapter, or for a merged
folder the checkpoint that its higgs_voice.json names. The price: an adapter's row needs its base here to be known again, else it
is known by its path.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from shards.artifacts import weights_fingerprint
from shards.config import read_config
from shards.errors import DataError, PipelineError
from tools.checkpoints.merge import CheckpointConfig
from tools.speaker import read_voice
from train.run_folder.checkpoint_folders import read_step

log = logging.getLogger("checkpoints")
FOLDER = "evaluations"  # of a RUN
HEADLINE = "strict"
Evaluations = Sequence[tuple[Path, dict[str, Any]]]  # (folder, results.json)


class Difference(msgspec.Struct, frozen=True):
    """From the base model, with its interval."""

    metric: str
    value: float
    low: float | None
    high: float | None
    verdict: str


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One system of an evaluation."""

    name: str  # of the evaluation: its folder's
    data: str  # what was said; rows of other data or recognizers are not comparable
    recognizer: str
    items: int
    speakers: int
    protocol: str
    cer: float | None
    wer: float | None
    similarity: dict[str, float]
    failures: float
    differences: list[Difference]

    @property
    def conditions(self) -> tuple[str, str, str, int]:
        """Only rows with the same can be held against one another."""
        return self.data, self.recognizer, self.protocol, self.items


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint lies in, if it does."""
    parents = checkpoint.resolve().parents
    return parents[1] if len(parents) > 1 and (parents[1] / "metrics.jsonl").is_file() else None


def evaluations_of(run: Path | None, named: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, results.json). Raises DataError for a named folder without; one of the RUN's own that is damaged is logged."""
    found = [(folder, read_results(folder)) for folder in named]
    for path in sorted(run.glob(f"{FOLDER}/*/results.json")) if run else []:
        try:
            found.append((path.parent, read_results(path.parent)))
        except DataError as error:
            log.warning("skipped: %s", error)
    return found


def read_results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        if isinstance(found["systems"], list) and isinstance(found["scores"], dict) and isinstance(found["data"], dict):
            return found
    except (OSError, KeyError, msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"{path}: not readable: {error}; give a folder that `evaluate` wrote") from None
    raise DataError(f"{path}: not the results of an evaluation; give a folder that `evaluate` wrote")


def rows_of(checkpoint: Path, evaluations: Evaluations) -> list[Row]:
    """The rows of the checkpoint in `checkpoint`, in the order of the evaluations. Raises DataError for damaged ones."""
    if not evaluations:
        return []
    own = weights_of(checkpoint)
    found = []
    for folder, results in evaluations:
        try:
            found += [
                row_of(folder, results, system["name"])
                for system in results["systems"]
                if system["name"] in results["scores"] and is_of(system, checkpoint, own)
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder}/results.json: not as `evaluate` writes it: {error!r}; evaluate anew") from None
    return found


def weights_of(checkpoint: Path) -> str:
    """What `evaluate` calls the weights of base and this adapter; "" where the base is not here."""
    try:
        config = read_config(CheckpointConfig, checkpoint / "config.toml")
        base = folder_here(config.model.base, config.model.revision)
        if base is None:
            return ""
        adapter = (checkpoint / "adapter" / "adapter_model.safetensors").read_bytes()
    except (PipelineError, OSError):
        return ""
    return hashlib.sha256(weights_fingerprint(base).encode() + adapter).hexdigest()


def folder_here(name: str, revision: str) -> Path | None:
    """A model's folder, if it need not be fetched."""
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def is_of(system: dict[str, Any], checkpoint: Path, weights: str) -> bool:
    if system.get("kind") != "tuned":
        return False
    if system.get("adapter"):
        if weights and system.get("weights"):
            return system["weights"] == weights
        return Path(system["adapter"]).resolve() == (checkpoint / "adapter").resolve()
    try:
        voice = read_voice(Path(system["model"]))
    except PipelineError as error:
        log.warning("skipped: %s", error)
        return False
    if voice is None:
        return False
    return Path(voice.adapter).resolve() == (checkpoint / "adapter").resolve() and voice.step == read_step(checkpoint)


def row_of(folder: Path, results: dict[str, Any], system: str) -> Row:
    scores, data, models = results["scores"][system], results["data"], results["models"]
    asr = models.get("asr")
    return Row(
        name=folder.name,
        data=f"{data['kind']} {data['source']}",
        recognizer=Path(str(asr.get("name", ""))).name if asr else "",
        items=data["items"],
        speakers=data["speakers"],
        protocol=results.get("headline", f"cer {HEADLINE}"),
        cer=scores["cer"][HEADLINE]["corpus"] if "cer" in scores else None,
        wer=scores["wer"][HEADLINE]["corpus"] if "wer" in scores else None,
        similarity={name: pair["to_reference"] for name, pair in scores["similarity"].items()},
        failures=scores["failures"]["share"],
        differences=[
            Difference(row["metric"], row["difference"], row["low"], row["high"], row["words"])
            for row in results["comparisons"]
            if row["first"] == system and row["second"] == "base"
        ],
    )
