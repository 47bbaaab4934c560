"""Rejected rows by reason, from OUT/rejects.jsonl: how many, what the reason means, and the first few as examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from preprocess.reasons import REASONS
from shards.errors import ShardError
from shards.writer import Reject

EXAMPLES = 3


def rejects_by_reason(folder: Path) -> dict[str, dict[str, Any]]:
    """reason -> count, meaning, examples; most frequent first. Raises ShardError for a damaged file."""
    path = folder / "rejects.jsonl"
    found: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return found
    decoder = msgspec.json.Decoder(Reject)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                reject = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ShardError(f"{path}: line {number}: no reject of ours: {error}; run `preprocess` again") from None
            part = found.setdefault(
                reject.reason, {"count": 0, "meaning": REASONS.get(reject.reason, ""), "examples": []}
            )
            part["count"] += 1
            if len(part["examples"]) < EXAMPLES:
                part["examples"].append(msgspec.to_builtins(reject))
    return dict(sorted(found.items(), key=lambda item: (-item[1]["count"], item[0])))
