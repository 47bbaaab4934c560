"""What an evaluation was asked for, and the plan that its folder holds to.

In: what was typed. Out: `Request`, and `Plan`, which is written to OUT/evaluation.json before the first wave.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from tools.evaluate.items import Items
from tools.evaluate.perturb import Perturbation
from tools.evaluate.systems import System


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
    train_data: list[Path] = []


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """evaluation.json."""

    items: Items
    systems: list[System]
    draws: int
    sampling: dict[str, Any]
