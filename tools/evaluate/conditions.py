"""`--fail-if "cer > 0.1"`: conditions under which the command ends with exit status 1, for scripts and CI.

In: text of the form METRIC < or > NUMBER. Out: sentences about the systems for which it holds. A metric that was not measured
fails too: a check that cannot look must not pass.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from shards.errors import ConfigError
from train.evaluation.text_protocols import HEADLINE

FORM = re.compile(r"\s*([a-z_]+)\s*(<=|>=|<|>)\s*(-?[0-9.]+(?:e-?[0-9]+)?)\s*(%?)\s*")
METRICS = (
    "cer",
    "wer",
    "similarity",
    "similarity_share",
    "failures",
    "cer_difference",
    "similarity_difference",
    "p_worse",
)
HOLDS = {"<": float.__lt__, "<=": float.__le__, ">": float.__gt__, ">=": float.__ge__}


class Condition(msgspec.Struct, frozen=True):
    metric: str
    sign: str
    limit: float


def parse_condition(text: str) -> Condition:
    """Raises ConfigError for what is no condition."""
    found = FORM.fullmatch(text)
    if not found or found[1] not in METRICS:
        raise ConfigError(f"--fail-if {text!r}: expected METRIC > NUMBER; metrics: {', '.join(METRICS)}")
    try:
        limit = float(found[3]) / (100 if found[4] else 1)
    except ValueError:
        raise ConfigError(f"--fail-if {text!r}: {found[3]!r} is no number") from None
    return Condition(found[1], found[2], limit)


def broken(conditions: list[Condition], results: dict[str, Any]) -> list[str]:
    """A sentence for every condition that holds for a system under test."""
    plain = [system for system in results["systems"] if not system["perturb"]]
    tested = [system["name"] for system in plain if system["kind"] in ("tuned", "waves")]
    tested = tested or [system["name"] for system in plain if system["kind"] == "base"]
    sentences = []
    for condition in conditions:
        for name in tested or ["real"]:
            value = value_of(condition.metric, name, results)
            if value is None or not math.isfinite(value):
                sentences.append(f"{name}: {condition.metric} was not measured, and --fail-if asks for it")
            elif HOLDS[condition.sign](float(value), condition.limit):
                sentences.append(f"{name}: {condition.metric} is {value:g}, {condition.sign} {condition.limit:g}")
    return sentences


def value_of(metric: str, name: str, results: dict[str, Any]) -> float | None:
    """A system's value; of similarities those by the first encoder, of differences those to the base."""
    scores = results["scores"].get(name, {})
    encoder = next(iter(scores.get("similarity", {})), None)
    against_base = {
        row["metric"]: row for row in results["comparisons"] if row["first"] == name and row["second"] == "base"
    }
    alike = scores["similarity"][encoder] if encoder else {}
    headline = against_base.get("cer") or against_base.get(f"similarity {encoder}")
    found = {
        "cer": scores.get("cer", {}).get(HEADLINE, {}).get("corpus"),
        "wer": scores.get("wer", {}).get(HEADLINE, {}).get("corpus"),
        "similarity": alike.get("to_reference"),
        "similarity_share": alike.get("share_of_the_way"),
        "failures": scores.get("failures", {}).get("share"),
        "cer_difference": against_base.get("cer", {}).get("difference"),
        "similarity_difference": against_base.get(f"similarity {encoder}", {}).get("difference"),
        "p_worse": headline["p_worse"] if headline else None,
    }
    return found[metric]
