"""`bench train --protocol`: one device's ceilings, our step one change a row, and the baseline beside it, in a set time.

In: sizes and a budget of seconds. Out: a JSON file, written anew before and after each row, so that a run that is cut still
tells; and a table. A row that does not fit into the time left is listed with the reason, one that needs CUDA says so elsewhere,
and running out of memory is a row's result. Rows stand in the order of their worth, because the last are the ones cut. All run
in this process around one copy of the frozen weights: a process each would take longer to start than to measure.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from shards.printable import first_line
from shards.terminal import print_line, print_table
from shards.writer import write_json
from tools.bench.protocol_rows import Row, Settings, rows_of, share
from train.world import join, leave

NEEDS_CUDA = "not measured: needs CUDA"
# Seconds that a row may take before it is known, by device: nothing is begun that would not end in time.
GUESS_S = {"cuda": {"compiled": 50.0, "eager": 15.0}, "cpu": {"compiled": 1.0, "eager": 1.0}}


def bench(settings: Settings, out: Path) -> dict[str, Any]:
    """Measure row after row; returns what is written to `out`."""
    figures: dict[str, Any] = {
        "machine": device_name(settings.device),
        "torch": str(torch.__version__),
        "settings": asdict(settings),
        "state": "making the weights",
        "rows": [],
    }
    clock = Clock(settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, figures)
    torch.set_num_threads(settings.threads)
    world = join(settings.device)
    try:
        for row in rows_of(share(settings, world), settings, clock.left, figures):
            figures["state"] = f"running: {row.stage}, {row.name}"
            figures["elapsed_s"] = clock.elapsed()
            write_json(out, figures)
            print_line(figures["state"])
            found = result_of(row, settings, clock, figures.get("ceilings"))
            figures["rows"].append({"stage": row.stage, "name": row.name, **found})
    finally:
        leave()
    figures["state"], figures["elapsed_s"] = "finished", clock.elapsed()
    figures["gain_over_best_padded"] = gain(figures["rows"])
    write_json(out, figures)
    print_rows(figures, out)
    return figures


class Clock:
    """Of the whole run; and how long a row of a kind takes, which the rows before it have shown."""

    def __init__(self, settings: Settings) -> None:
        self._started = time.monotonic()
        self._seconds = settings.seconds
        self._guess_s = dict(GUESS_S[settings.device])

    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def left(self) -> float:
        return self._seconds - self.elapsed()

    def needed(self, kind: str) -> float:
        return self._guess_s[kind]

    def learn(self, kind: str, took_s: float) -> None:
        self._guess_s[kind] = took_s


def result_of(row: Row, settings: Settings, clock: Clock, ceilings: dict[str, Any] | None = None) -> dict[str, Any]:
    """The row's figures, or why there are none."""
    if row.needs_cuda and settings.device != "cuda":
        return {"not_measured": NEEDS_CUDA}
    if clock.left() < clock.needed(row.kind):
        return {
            "not_measured": f"no time: {clock.left():.0f} s left of {settings.seconds:.0f}, about "
            f"{clock.needed(row.kind):.0f} needed"
        }
    started = clock.elapsed()
    try:
        found: dict[str, Any] = row.measure()
    except torch.OutOfMemoryError as error:
        found = {"out_of_memory": first_line(error)}
    except (
        Exception
    ) as error:  # of one variant, on a machine that nobody has seen: the others are still worth measuring
        found = {"failed": f"{type(error).__name__}: {first_line(error)}"}
    took_s = clock.elapsed() - started
    if "samples_per_s" in found:
        clock.learn(row.kind, took_s)
        if row.predict and ceilings:
            found["predicted_step_ms"] = 1e3 * row.predict(found, ceilings)
    return {**found, "took_s": took_s}


# --- telling ----------------------------------------------------------------------------------------------------------


def gain(rows: list[dict[str, Any]]) -> float | None:
    """Our best row over the baseline's best; None where one of them was not measured."""
    ours = [row["samples_per_s"] for row in rows if "samples_per_s" in row and row["stage"] != "baseline"]
    theirs = [row["samples_per_s"] for row in rows if "samples_per_s" in row and row["stage"] == "baseline"]
    return max(ours) / max(theirs) if ours and theirs else None


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def print_rows(figures: dict[str, Any], out: Path) -> None:
    settings = figures["settings"]
    ceiling = figures.get("ceilings", {}).get("matmul_tflops")
    lines: list[tuple[str, ...]] = []
    for row in figures["rows"]:
        if "samples_per_s" not in row:
            said = row.get("not_measured") or row.get("failed") or row.get("out_of_memory") or "in the JSON file"
            lines.append((row["stage"], row["name"], said, "", "", "", ""))
            continue
        peak, predicted = row["peak_gb"], row.get("predicted_step_ms")
        lines.append(
            (
                row["stage"],
                row["name"],
                f"{row['samples_per_s']:.2f}",
                f"{row['step_ms']:.0f}",
                f"{predicted:.0f}" if predicted else "",
                f"{row['useful_tflops'] / ceiling:.0%}" if ceiling else "",
                f"{peak:.1f} GB" if peak else "",
            )
        )
    title = f"bench train: {settings['size']} size, rank {settings['rank']}, {settings['batch_tokens']} tokens"
    title += f"; {figures['machine']}"
    headings = ("stage", "row", "samples/s", "ms/step", "predicted", "of matmul rate", "peak memory")
    print_table(lines, headings=headings, title=title, to_stdout=True, width=None if sys.stdout.isatty() else 130)
    if figures["gain_over_best_padded"]:
        print_line(f"the best of ours is {figures['gain_over_best_padded']:.2f} x the best of the baseline")
    print_line(f"{figures['elapsed_s']:.0f} s; written to {out}")
