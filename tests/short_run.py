"""What tests of short runs read from them; the runs' data and settings are fixtures of conftest."""

from __future__ import annotations

import json
from pathlib import Path


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total_loss"] for line in lines}
