"""What `bench data` measures: planning, and feeding packs to training, against the plain ways of doing it.

In: numbers of rows and samples. Out: a table and a JSON file. Planning: seconds, peak memory and fill for generated indexes.
Loading: the sides of `tools/bench/loading.py`. Every side runs in a process of its own, in rounds, and times itself from its
first batch on.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.terminal import print_line, print_table
from tools.bench.loading import frames, write_data

CODE = "import json, sys; from tools.bench import {file} as b; print('RESULT', json.dumps(b.{name}(*sys.argv[1:])), flush=True)"
PLAN_ROWS = CODE.format(file="data", name="plan_rows")


@dataclass(frozen=True)
class Settings:
    rows: list[int]
    samples: int
    batch_tokens: int
    rounds: int


def bench(settings: Settings, out: Path) -> dict[str, Any]:
    """Measure everything, print the table, write the JSON file."""
    from preprocess.workers import usable_cores
    from shards.writer import write_json
    from tools.bench.preprocess import run

    figures: dict[str, Any] = {
        "machine": f"{usable_cores()} usable cores, {platform.processor() or platform.machine()}"
    }
    figures["settings"] = dict(settings.__dict__)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        figures["planning"] = {
            str(rows): run(PLAN_ROWS, work / "index.npy", rows, settings.batch_tokens).result for rows in settings.rows
        }
        write_data(work, settings.samples)
        rounds: dict[str, list[dict[str, float]]] = {}
        for _ in range(settings.rounds):  # in turn, so that a change of the machine's speed meets all of them
            for kind in ("plan", "stream", "padded", "online"):
                rounds.setdefault(kind, []).append(
                    run(CODE.format(file="loading", name=f"load_{kind}"), work, settings.batch_tokens).result
                )
    figures["loading"] = {
        kind: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for kind, results in rounds.items()
    }
    plan = figures["loading"]["plan"]
    figures["ratios"] = {
        f"plan_over_{kind}": plan["samples_per_s"] / figures["loading"][kind]["samples_per_s"]
        for kind in ("stream", "padded", "online")
    }
    write_json(out, figures)
    print_figures(figures, out)
    return figures


# --- planning -------------------------------------------------------------------------------------------------------


def plan_rows(path: str, rows: str, batch_tokens: str) -> dict[str, float]:
    """Plan one epoch of a generated index, memory-mapped from a file. Runs in a process of its own."""
    from shards.index import INDEX_DTYPE, read_index
    from train.data.plan import Planner, PlanSettings

    count = int(rows)
    index = np.lib.format.open_memmap(path, "w+", INDEX_DTYPE, (count,))
    part = index
    rng = np.random.default_rng(0)
    for start in range(0, count, 1 << 20):
        part = index[start : start + (1 << 20)]
        part["shard"] = np.arange(start, start + len(part)) // 1024
        for name in ("reference_frames", "target_frames"):
            part[name] = frames(rng, len(part))
        part["num_target_text_tokens"] = rng.poisson(120, len(part))
    index.flush()
    del index, part  # pages of a written map would count
    before_mb = resident_mb("VmRSS")
    started = time.monotonic()
    planner = Planner(read_index(Path(path)), lengths, PlanSettings(0, int(batch_tokens), 8))
    scanned_s = time.monotonic() - started
    num_packs = planner.num_packs(0)
    return {
        "scan_s": scanned_s,
        "plan_s": time.monotonic() - started - scanned_s,
        "fill": planner.num_tokens / (num_packs * int(batch_tokens)),
        "peak_mb": resident_mb("VmHWM"),  # pages of the mapped index included: the system takes them back when it wants
        "before_mb": before_mb,
        "index_mb": Path(path).stat().st_size / 1e6,
        "padded_useful": padded_share(read_index(Path(path)), int(batch_tokens)),
        "num_packs": num_packs,
        "num_windows": planner.num_windows(0),
    }


def lengths(rows: np.ndarray) -> np.ndarray:
    return rows["num_target_text_tokens"].astype(np.int64) + rows["reference_frames"] + rows["target_frames"] + 18


def padded_share(index: np.ndarray, batch_tokens: int) -> float:
    """Share of useful tokens in random batches padded to their longest, as many samples a batch as a pack holds."""
    tokens = lengths(np.array(index[:100_000]))
    size = max(1, int(batch_tokens / tokens.mean()))
    batches = np.random.default_rng(0).permutation(tokens)[: len(tokens) // size * size].reshape(-1, size)
    return float(batches.sum() / (batches.max(axis=1) * size).sum())


def resident_mb(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


# --- printing -------------------------------------------------------------------------------------------------------


def print_figures(figures: dict[str, Any], out: Path) -> None:
    budget = figures["settings"]["batch_tokens"]
    title = f"bench data: {figures['machine']}, packs of {budget} tokens"
    rows: list[tuple[str, ...]] = []
    for num_rows, plan in figures["planning"].items():
        rows.append(
            (
                f"plan {int(num_rows):,} rows",
                f"{plan['scan_s'] + plan['plan_s']:.2f} s, {plan['peak_mb'] - plan['before_mb']:.0f} MB at most, "
                f"{plan['index_mb']:.0f} MB of them the mapped index; {plan['fill']:.1%} full",
                f"{plan['num_windows']} windows; random padded batches {plan['padded_useful']:.1%} useful",
            )
        )
    names = {
        "plan": "plan",
        "stream": "stream",
        "padded": "random padded batches",
        "online": "encoding on line (tiny codec)",
    }
    for kind, name in names.items():
        values = figures["loading"][kind]
        ratio = "" if kind == "plan" else f"plan is {figures['ratios'][f'plan_over_{kind}']:.2f} x"
        memory = f", worker {values['worker_mb']:.0f} MB of its own" if "worker_mb" in values else ""
        useful = "" if kind == "online" else f", {values['useful_tokens']:.1%} useful tokens"
        rows.append((f"{name}, one process", f"{values['samples_per_s']:.0f} samples/s{useful}{memory}", ratio))
    print_table(rows, headings=("what", "figure", "beside it"), title=title, to_stdout=True)
    print_line(f"written to {out}")
