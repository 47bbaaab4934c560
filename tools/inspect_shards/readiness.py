"""Is there enough to train on, and with which settings to begin: the data set held against what others report.

In: dataset.json, its figures, the training section, a run if one is given. Out: sentences and suggested values. What stands in
ELSEWHERE are single reports about other models, not repeated by us, and few say how many speakers; a rate of training is only
given where one was measured, else it is "unknown".
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards.errors import ShardError
from shards.manifest import Dataset
from train.config import TrainSection

SECONDS_PER_CLIP = 5.4  # where a report counts clips only: 15 h for 10,000 of them, an estimate of ours


class Report(NamedTuple):
    """What somebody reported of a fine-tuning."""

    hours: float
    what: str
    where: str  # repository and issue
    clips: int = 0  # not 0: the hours are our estimate

    def __str__(self) -> str:
        hours = f"{self.hours:g} h"
        if self.clips:
            hours = f"about {self.hours:g} h (estimated of {self.clips:,} clips)"
        return f"{hours}: {self.what} ({self.where})"


def of_clips(clips: int, what: str, where: str) -> Report:
    return Report(round(clips * SECONDS_PER_CLIP / 3600), what, where, clips)


ELSEWHERE = (
    Report(4.6, "Saudi, 4,286 clips, Chatterbox fine-tuned in part: released", "Sada-TTS v1.2"),
    Report(
        5.0,
        "Arabic of one speaker, F5-TTS, some 1,000 epochs: samples were good on the way, the end is not intelligible",
        "SWivid/F5-TTS issue 715",
    ),
    of_clips(6_500, "Arabic, Orpheus: only sentences that it has seen", "canopyai/Orpheus-TTS issue 110"),
    of_clips(
        10_000,
        "Arabic, Qwen3-TTS: good from the first epoch, digits between Arabic words wrong",
        "QwenLM/Qwen3-TTS issue 179",
    ),
    Report(50.0, "LoRA on Chatterbox, one epoch with 1e-5: enough", "viterbox issue 3"),
    Report(
        1000.0,
        "Darija in clips of 1-5 s, XTTS: the loss rose after a few epochs",
        "anhnh2002/XTTSv2-Finetuning-for-New-Languages issue 28",
    ),
)
FEW_HOURS = 5.0
SOME_HOURS = 50.0
MIN_STEPS = 300
STEPS_PER_EPOCH = 100
RUN_RATE = "metrics/tokens_per_second"


def readiness(
    record: Dataset,
    index: np.ndarray,
    shares: dict[str, float],
    sound: dict[str, float],
    section: TrainSection,
    run: Path | None,
) -> dict[str, Any]:
    """Rows for a person, in order."""
    tokens = num_tokens(index)
    suggested = suggestion(record.target_hours, len(record.speakers), tokens, section)
    rate = measured_rate(run)
    gpus = found_gpus()
    hours: Any = "unknown: no rate was measured; train a few steps here and name that RUN with --run"
    if rate:
        hours = round(suggested["steps"] * suggested["tokens_per_step"] / rate / 3600, 2)
    return {
        "hours": record.target_hours,
        "speakers": len(record.speakers),
        "nearest_elsewhere": nearest(record.target_hours),
        "tokens_per_epoch": tokens,
        **suggested,
        "gpus": gpus or "none found",
        "tokens_per_second": rate or "unknown",
        "measured_on": measured_on(run) if run and rate else "nothing",
        "expected_hours": hours,
        "warnings": warnings(record, index, shares, sound),
    }


def num_tokens(index: np.ndarray) -> int:
    """About what an epoch is long: texts, frames with the delay of codebooks, and the turns around them."""
    columns = ("num_reference_text_tokens", "num_target_text_tokens", "reference_frames", "target_frames")
    return sum(int(index[column].sum(dtype=np.int64)) for column in columns) + 60 * len(index)


def suggestion(hours: float, num_speakers: int, tokens: int, section: TrainSection) -> dict[str, Any]:
    """Values to begin with, of the sections that train reads."""
    budget = section.batch_tokens if isinstance(section.batch_tokens, int) else 16384
    packs = section.packs_per_step
    while packs > 1 and tokens < STEPS_PER_EPOCH * packs * budget:
        packs //= 2
    per_step = packs * budget
    epochs = section.num_epochs
    steps = max(MIN_STEPS, -(-tokens * epochs // per_step))
    rate, why = 1e-4, "the default; at the upper end of what is published for cloning"
    if hours < FEW_HOURS or num_speakers == 1:
        rate, why = (
            2e-5,
            "little data: Higgs v2 was cured of bad output by 1e-5 to 3e-5 (boson-ai/higgs-audio issue 94)",
        )
    elif hours < SOME_HOURS:
        rate, why = 5e-5, "between the published: LoRAs of Chatterbox 1e-5, of CSM 2e-4 (a demo)"
    return {
        "steps": int(steps),
        "passes": round(steps * per_step / max(1, tokens), 1),
        "packs_per_step": packs,
        "tokens_per_step": per_step,
        "learning_rate": rate,
        "learning_rate_because": why,
        "command": f"--set train.max_steps={steps} --set train.packs_per_step={packs} --set train.learning_rate={rate:g}",
    }


def nearest(hours: float) -> list[str]:
    """The two reports whose hours are nearest by ratio."""
    ranked = sorted(ELSEWHERE, key=lambda report: abs(np.log(report.hours / max(hours, 1e-3))))
    return [str(report) for report in sorted(ranked[:2])]


def measured_rate(run: Path | None) -> float | None:
    """Median tokens per second of a run's later half. Raises ShardError for a folder that is no run."""
    if run is None:
        return None
    path = run / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ShardError(
            f"{path}: no measured rate: {error}; give the RUN folder of `train`, or leave --run out"
        ) from None
    rates = [line[RUN_RATE] for line in lines if isinstance(line, dict) and isinstance(line.get(RUN_RATE), int | float)]
    return round(statistics.median(rates[len(rates) // 2 :]), 1) if rates else None


def measured_on(run: Path) -> str:
    """The device and the model of a run, as it wrote them down itself."""
    try:
        facts = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        device, ranks = str(facts["device"]), int(facts["ranks"])
    except (OSError, ValueError, LookupError, TypeError):
        return "an unknown device"
    return f"{ranks} x {device}"


def found_gpus() -> list[str]:
    """Names by nvidia-smi: torch would take three seconds to tell."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return []
    try:
        asked = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in asked.stdout.splitlines() if line.strip()] if asked.returncode == 0 else []


def warnings(record: Dataset, index: np.ndarray, shares: dict[str, float], sound: dict[str, float]) -> list[str]:
    """What a person would like to know before the first step."""
    found: list[str] = []
    num = max(1, record.num_samples)
    if not record.num_samples:
        return ["no sample: nothing can be trained"]
    if record.target_hours < FEW_HOURS:
        found.append(
            f"{record.target_hours:.2f} h of targets is little: with 5 h one report ends unintelligible "
            "(SWivid/F5-TTS issue 715), with 4.6 h another was released (Sada-TTS v1.2)"
        )
    top = max(record.speakers.values(), default=0) / num
    if len(record.speakers) == 1:
        found.append("one speaker: the model learns this voice, not cloning; nobody can be held out")
    elif top > 0.5:
        found.append(f"the largest speaker has {top:.0%} of the samples: other voices drift towards it")
    elif len(record.speakers) < 10:
        found.append(f"{len(record.speakers)} speakers: too few to say anything about new voices")
    short = float((index["target_frames"] < 75).mean())
    if short > 0.5:
        found.append(f"{short:.0%} of the targets are below 3 s: longer speech is then rarely learned")
    if shares.get("texts_with_digits", 0.0) > 0.02:
        found.append(
            f"{shares['texts_with_digits']:.0%} of the texts hold digits: write them as words, they are said wrong"
        )
    if 0.1 < shares.get("texts_diacritised", 0.0) < 0.9:
        found.append(
            f"{shares['texts_diacritised']:.0%} of the texts have diacritics, the others none: two ways to read"
        )
    if shares.get("texts_with_latin", 0.0) > 0.1:
        found.append(f"{shares['texts_with_latin']:.0%} of the texts hold Latin letters")
    for code, count in record.warnings.items():
        name = code.removeprefix("reference_").removeprefix("target_")
        if name in ("narrow_band", "noisy", "channels_cancel", "low_sample_rate", "clipped") and count > 0.1 * num:
            found.append(f"{code}: {count / num:.0%} of the samples")
    if not sound:
        found.append("bandwidth and noise were not measured (made by an older version): preprocess again to know them")
    lost = sum(record.rejects.values())
    if lost > 0.05 * max(1, record.num_rows):
        found.append(f"{lost} of {record.num_rows} rows were rejected")
    return found
