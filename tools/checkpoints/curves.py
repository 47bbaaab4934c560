"""Lines in a plot, as one SVG that needs nothing else: no script, no font, no request.

In: points by name of the line. Out: SVG text. Points that are not finite are skipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.web_page.charts import round_ticks
from tools.web_page.page import escaped

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 320, 56, 40, 28, 200
COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#a16207", "#be123c", "#0f766e", "#475569")

Points = Sequence[tuple[float, float]]


def line_chart(title: str, lines: Mapping[str, Points], x_label: str = "step") -> str:
    """An SVG; "" where no line has a point."""
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in lines.items()
    }
    finite = {name: points for name, points in finite.items() if points}
    everything = [point for points in finite.values() for point in points]
    if not everything:
        return ""
    (x_low, x_high), (y_low, y_high) = (span([point[axis] for point in everything]) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - TOP),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="sans-serif" font-size="12"><title>{escaped(title)}</title>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/><text x="{LEFT}" y="18">{escaped(title)}</text>'
    ]
    for value in round_ticks(y_low, y_high):
        _, y = place(x_low, value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for value in round_ticks(x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{value:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escaped(x_label)}</text>'
    )
    for number, (name, points) in enumerate(finite.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [place(x, y) for x, y in points]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(places) <= 60:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
        y = TOP + 16 * number + 8
        parts.append(
            f'<rect x="{WIDTH - RIGHT + 10}" y="{y - 8}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{WIDTH - RIGHT + 26}" y="{y + 1}">{escaped(name[:28])}</text>'
        )
    return "".join([*parts, "</svg>\n"])


def span(values: list[float]) -> tuple[float, float]:
    """(lowest, highest), never the same."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def read_curves(run: Path, names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of each metric in RUN/metrics.jsonl; a line that was cut off is skipped."""
    path = run / "metrics.jsonl"
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            step = values.get("step") if isinstance(values, dict) else None
            for name in names:
                value = values.get(name) if isinstance(values, dict) else None
                if isinstance(step, int) and isinstance(value, int | float):
                    found[name].append((float(step), float(value)))
    return found
