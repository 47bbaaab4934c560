"""A model card: what a run knows of itself, for people and for the hub.

In: a checkpoint, and the run it lies in where there is one. Out: Markdown with the metadata block that the hub reads, and the
curves as an SVG beside it. No path of the machine stands in it: a base, codec or tower that is a folder here is named by its
fingerprint. What is not known is said to be unknown, because a card of empty headings is what everybody skips.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards.config import ModelSection, parse_toml
from shards.errors import CheckpointError, PipelineError
from shards.manifest import Dataset, read_dataset
from shards.printable import printable, redact
from tools.checkpoints.curves import line_chart, read_curves
from tools.checkpoints.evaluations import Row, evaluations_of, rows_of, run_of
from tools.evaluate.systems import run_data
from train.data.data_sets import joint_digest
from train.run_folder.checkpoint_folders import read_metrics, read_step
from train.run_folder.identity import Identity, read_identity

Kind = Literal["adapter", "merged"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LICENCE_FILE = {  # of bases whose licence is known, in their own repositories
    ModelSection().base: f"https://huggingface.co/{ModelSection().base}/blob/main/LICENSE"
}
# Names of files and folders, or without effect on the model; the base and its data have lines of their own.
NOT_SHOWN = frozenset(
    {
        "train.data",
        "train.validation_data",
        "train.cache_dir",
        "train.cache_gb",
        "train.tensorboard",
        "train.num_workers",
    }
)
SECTIONS = ("sequence", "text", "lora", "loss", "train")
LANGUAGE = "ar"
AVERAGE = "average.json"


@dataclass(frozen=True)
class Facts:
    """All that the card says."""

    kind: Kind
    step: int
    model: dict[str, Any]  # section of config.toml
    settings: dict[str, Any]  # "section.key" -> value
    identity: Identity
    data: list[Dataset]  # empty where they are not here any more
    metrics: dict[str, Any]
    rows: list[Row]
    curves: str  # SVG; "" without
    averaged: str = ""  # of what, where it is an average

    @property
    def base_id(self) -> str:
        """Of the hub; "" for a folder."""
        name = str(self.model.get("base", ""))
        return name if HUB_ID.fullmatch(name) and not Path(name).exists() else ""


def gather(checkpoint: Path, kind: Kind, evaluations: Sequence[Path] = ()) -> Facts:
    """Facts of a checkpoint folder. Raises CheckpointError for one that is not readable."""
    run = run_of(checkpoint)
    try:
        config = parse_toml((checkpoint / "config.toml").read_text(encoding="utf-8"))
        settings = {f"{name}.{key}": value for name in SECTIONS for key, value in config.get(name, {}).items()}
        model = dict(config["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint}/config.toml: not readable: {error}; give a sound checkpoint") from None
    identity = read_identity(checkpoint)
    curves = read_curves(run, ("loss/audio_loss", "eval/audio_loss")) if run else {}
    names = {"loss/audio_loss": "training", "eval/audio_loss": "held out"}
    return Facts(
        kind=kind,
        step=read_step(checkpoint),
        model=model,
        settings=settings,
        identity=identity,
        data=data_of(run, identity, settings.get("train.data", [])) if run else [],
        metrics=read_metrics(checkpoint),
        rows=rows_of(checkpoint, evaluations_of(run, evaluations)),
        curves=line_chart("audio loss", {names[name]: points for name, points in curves.items()}),
        averaged=averaged_of(checkpoint),
    )


def averaged_of(checkpoint: Path) -> str:
    """What `checkpoints average` made it of; "" for what training wrote. Raises CheckpointError."""
    if not (checkpoint / AVERAGE).is_file():
        return ""
    try:
        report = json.loads((checkpoint / AVERAGE).read_text(encoding="utf-8"))
        names = ", ".join(f"{source['name']} (step {source['step']})" for source in report["sources"])
        return (
            f"the updates of {names}, cut back to rank {report['rank']}, which lost {report['error']:.2%} of its norm"
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint / AVERAGE}: not readable: {error}; average them again") from None


def data_of(run: Path, identity: Identity, sources: Sequence[dict[str, Any]]) -> list[Dataset]:
    """The data sets that it was trained on, where they are still here and still the same. sources: train.data."""
    try:
        folders = [Path(source["path"]) for source in sources] or [run_data(run)]
        found = [read_dataset((folder / "dataset.json").read_bytes(), str(folder)) for folder in folders]
    except (PipelineError, OSError, ValueError, LookupError, TypeError):
        return []
    return found if joint_digest([dataset.digest for dataset in found]) == identity.dataset_digest else []


# --- the card -------------------------------------------------------------------------------------------------------


def card(facts: Facts, curves_name: str = "curves.svg") -> str:
    """Markdown. `curves_name`: of the SVG that lies beside it."""
    parts = [
        metadata(facts),
        f"# Higgs Audio v2, {'merged with a' if facts.kind == 'merged' else 'a'} LoRA for Arabic voice cloning\n",
        "It speaks a text in the voice of a reference clip that it has never heard. Trained with higgs-voice-pipeline.\n",
        *([f"An average: {words(facts.averaged)}.\n"] if facts.averaged else []),
        "## Base\n\n" + table(("what", "which"), base_rows(facts)),
        "## Data\n\n" + table(("what", "value"), data_rows(facts)),
        "## Configuration\n\n"
        + table(
            ("key", "value"), [(key, shown(value)) for key, value in facts.settings.items() if key not in NOT_SHOWN]
        ),
        "## Training\n\n" + training(facts, curves_name),
        "## Evaluation\n\n" + evaluation(facts.rows),
        "## Speak\n\n" + speak(facts),
        "## Licence\n\n" + licence(facts),
        "## Consent\n\n"
        "This model imitates voices. Use it only with the voice of somebody who has agreed to that, say where it is heard that "
        "the speech is synthetic, and do not use it to deceive or to impersonate. Whether the people in the training data have "
        "agreed is not recorded by the program: whoever publishes this model must know it and say so here.\n",
    ]
    return "\n".join(parts)


def metadata(facts: Facts) -> str:
    """The block that the hub reads; values are JSON, which is YAML."""
    known = LICENCE_FILE.get(facts.base_id)
    is_merged = facts.kind == "merged"
    tags = ["text-to-speech", "voice-cloning", "higgs-audio-v2", "lora"]
    if facts.base_id and not is_merged:
        tags.append(f"base_model:adapter:{facts.base_id}")
    values: dict[str, Any] = {"license": "other"}
    if known:
        values |= {"license_name": f"{facts.base_id.split('/')[1]}-licence", "license_link": known}
    values |= {"language": [LANGUAGE], "library_name": "transformers" if is_merged else "peft"}
    values |= {"pipeline_tag": "text-to-speech", "tags": tags}
    if facts.base_id:
        values |= {"base_model": facts.base_id, "base_model_relation": "finetune" if is_merged else "adapter"}
    if results := [result for row in facts.rows for result in index_of(row)]:
        values["model-index"] = [{"name": f"step {facts.step}", "results": results}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(["---", *lines, "---", ""])


def index_of(row: Row) -> list[dict[str, Any]]:
    """A row as the hub's model-index wants it."""
    found = [("cer", "CER", row.cer), ("wer", "WER", row.wer)]
    metrics = [
        {"type": kind, "name": f"{name}, {row.protocol}", "value": value}
        for kind, name, value in found
        if value is not None
    ]
    metrics += [{"type": "similarity", "name": name, "value": value} for name, value in row.similarity.items()]
    if not metrics:
        return []
    task = {"type": "text-to-speech", "name": "voice cloning"}
    return [{"task": task, "dataset": {"type": "private", "name": words(row.name)}, "metrics": metrics}]


def base_rows(facts: Facts) -> list[tuple[str, str]]:
    files = facts.identity.model
    return [
        ("base", named(facts.model, "base", "revision", files.base)),
        ("codec", named(facts.model, "codec", "codec_revision", files.codec)),
        ("tokenizer", f"fingerprint `{files.tokenizer[:16]}`"),
        ("Whisper tower", f"fingerprint `{files.whisper[:16]}`" if files.whisper else "none beside the base"),
    ]


def named(model: dict[str, Any], key: str, revision_key: str, fingerprint: str) -> str:
    name, revision = str(model.get(key, "")), str(model.get(revision_key, ""))
    if HUB_ID.fullmatch(name) and not Path(name).exists():
        link = f"[{name}](https://huggingface.co/{name})"
        return f"{link}, revision `{words(revision) or 'main'}`, fingerprint `{fingerprint[:16]}`"
    return f"a local copy, fingerprint `{fingerprint[:16]}`"


def data_rows(facts: Facts) -> list[tuple[str, str]]:
    data, settings = facts.data, facts.settings
    rows = [("digest", f"`{facts.identity.dataset_digest[:16] or 'none'}`")]
    if sources := settings.get("train.data"):
        weights = [str(source.get("weight", "none")) for source in sources]
        rows.append(("data sets together", f"{len(sources)}, weights {', '.join(weights)}"))
    if data:
        hours = [sum(part.target_hours for part in data), sum(part.reference_hours for part in data)]
        rows += [
            ("samples", f"{sum(part.num_samples for part in data)} of {sum(part.num_rows for part in data)} rows"),
            ("hours", f"{hours[0]:.2f} to learn, {hours[1]:.2f} of references"),
            ("speakers", str(len({name for part in data for name in part.speakers}))),
            ("tokens of text", str(sum(part.num_text_tokens for part in data))),
        ]
    else:
        rows.append(("hours, speakers", "not known here: the data set was not beside the run when this was written"))
    if facts.identity.validation_digest:
        rows.append(("held out", f"another data set, digest `{facts.identity.validation_digest[:16]}`"))
    elif fraction := settings.get("train.validation_fraction"):
        rows.append(("held out", f"whole speakers, {fraction:g} of the samples, seed {settings.get('train.seed')}"))
    else:
        rows.append(("held out", "nothing"))
    return rows


def training(facts: Facts, curves_name: str) -> str:
    losses = {name: value for name, value in facts.metrics.items() if "loss" in name and isinstance(value, int | float)}
    text = f"{facts.step} optimizer steps.\n\n"
    if facts.curves:
        text += f"![audio loss over steps, training and held out]({curves_name})\n\n"
    if losses:
        text += table(("at this step", "value"), [(name, f"{value:.4f}") for name, value in sorted(losses.items())])
    return text


def evaluation(rows: list[Row]) -> str:
    if not rows:
        return (
            "Not evaluated. `evaluate RUN DATA RUN/evaluations/NAME` measures errors and similarity beside the base.\n"
        )
    lines = []
    for row in rows:
        figures = [
            ("CER", percent(row.cer)),
            ("WER", percent(row.wer)),
            *((f"similarity ({name})", f"{value:.3f}") for name, value in row.similarity.items()),
            ("failures", percent(row.failures)),
        ]
        figures = [figure for figure in figures if figure[1] != "-"]
        figures += [
            (
                f"{difference.metric}, difference from the base",
                in_words(difference.value, difference.low, difference.high, difference.verdict),
            )
            for difference in row.differences
        ]
        about = (
            f"{row.items} items of {row.speakers} speakers; protocol {words(row.protocol)}; recognizer "
            f"{words(row.recognizer) or 'none'}."
        )
        lines.append(f"### {words(row.name)}\n\n{about}\n\n" + table(("metric", "value"), figures))
    return "\n".join(lines)


def in_words(value: float, low: float | None, high: float | None, verdict: str) -> str:
    interval = "" if low is None or high is None else f" [{low:+.4f}, {high:+.4f}]"
    return f"{value:+.4f}{interval}: {verdict}"


def speak(facts: Facts) -> str:
    base = facts.base_id or "BASE"
    model = "THIS_FOLDER" if facts.kind == "merged" else f"{base} --adapter THIS_FOLDER/adapter"
    adapter = "" if facts.kind == "merged" else ', adapter="THIS_FOLDER/adapter"'
    name = "THIS_FOLDER" if facts.kind == "merged" else base
    return speak_lines(model, adapter, name)


def speak_lines(model: str, adapter: str, name: str = "THIS_FOLDER") -> str:
    """`model`: of the command line; `name`, `adapter`: of Python."""
    options = '--reference voice.wav --reference-text "what is said in voice.wav" --text "..." --out speech.wav'
    return (
        f"```sh\nspeak {model} {options}\n```\n\n"
        "```python\nfrom tools.inference import HiggsAudioInference\n"
        f'voice = HiggsAudioInference("{name}"{adapter})\n'
        'speech = voice.generate_speech("voice.wav", "...", reference_text="what is said in voice.wav")\n```\n'
    )


def licence(facts: Facts) -> str:
    return licence_of(facts.base_id)


def licence_of(base_id: str) -> str:
    link = LICENCE_FILE.get(base_id)
    if link:
        return f"What is made from {base_id} is under [its licence]({link}): read it before you publish or sell.\n"
    return "The licence of the base holds for what is made from it; which one that is, is not known to the program.\n"


# --- pieces ---------------------------------------------------------------------------------------------------------


def table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(headings)} |", f"|{' --- |' * len(headings)}"]
    lines += [f"| {' | '.join(words(value) for value in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def words(text: str) -> str:
    """Text of others in a line of Markdown."""
    return printable(redact(str(text))).replace("|", "\\|").replace("<", "&lt;")


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
