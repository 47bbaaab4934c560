"""JSON settings of models that come from anywhere: read as an object, and every value that is used checked.

In: a path. Out: a dictionary, a whole number or a finite one. Raises CheckpointError naming file and key, whatever the file
holds: a web page, a list, NaN, a folder, ten thousand brackets. The price of the bounds: a model with more than MAX_COUNT of
anything is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from shards.errors import CheckpointError
from shards.printable import excerpt, first_line

MAX_COUNT = 1 << 24  # of rows, columns, layers: nothing is built from a number that no model has


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a file; `what` it should be, for the error: "a model's config". Raises CheckpointError."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # bytes that are no text or no JSON are ValueErrors
        raise CheckpointError(f"{path}: not readable as {what}: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not readable as {what}: holds {shown(value)}, expected an object")
    return value


def part_of(settings: dict[str, Any], key: str, path: Path, is_needed: bool = False) -> dict[str, Any]:
    """The object under `key`; empty where there is none or null, unless it is needed. Raises CheckpointError."""
    value = settings.get(key)
    if value is None and not is_needed:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key} is {shown(value)}, expected an object")
    return value


def count_of(settings: dict[str, Any], key: str, path: Path, default: int | None = None, most: int = MAX_COUNT) -> int:
    """A whole number from 1 to `most`; `default` where there is none or null. Raises CheckpointError."""
    value = settings.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(f"{path}: {key} is {shown(value)}, expected a whole number from 1 to {most}")
    return value


def number_of(settings: dict[str, Any], key: str, path: Path, default: float) -> float:
    """A finite number above 0; `default` where there is none or null. Raises CheckpointError."""
    value = settings.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {key} is {shown(value)}, expected a number above 0")
    return value  # 4 stays 4: how it was written is part of a model's identity


def shown(value: Any) -> str:
    return "missing" if value is None else excerpt(json.dumps(value, ensure_ascii=False))
