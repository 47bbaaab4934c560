"""Figures for a page: bars and histograms as SVG, spectrograms as PNG. In: numbers. Out: markup without any request."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from tools.web_page.page import escaped

WIDTH, HEIGHT, FOOT, HEAD = 420, 150, 34, 16
BAR_HEIGHT = 18


def svg_histogram(
    title: str, unit: str, edges: Sequence[float], counts: Sequence[int], limits: dict[str, float]
) -> str:
    """Bars over `edges` [n + 1]; a limit that lies among them is a dashed line with its name."""
    low, high, most = edges[0], edges[-1], max([*counts, 1])
    scale = WIDTH / (high - low or 1)
    parts = []
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        tall = HEIGHT * count / most
        parts.append(
            f'<rect x="{(left - low) * scale:.1f}" y="{HEAD + HEIGHT - tall:.1f}" width="{(right - left) * scale - 1:.1f}" '
            f'height="{tall:.1f}"><title>{left:g} to {right:g} {escaped(unit)}: {count}</title></rect>'
        )
    for name, value in limits.items():
        if low <= value <= high:
            x = (value - low) * scale
            anchor = "end" if x > WIDTH / 2 else "start"
            parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{HEAD - 2}" y2="{HEAD + HEIGHT}"/>')
            parts.append(
                f'<text class="limit" x="{x:.1f}" y="{HEAD - 4}" text-anchor="{anchor}">{escaped(name)} {value:g}</text>'
            )
    for at in round_ticks(low, high):
        x = (at - low) * scale
        anchor = "start" if x < 10 else "end" if x > WIDTH - 10 else "middle"
        parts.append(f'<text x="{x:.0f}" y="{HEAD + HEIGHT + 14}" text-anchor="{anchor}">{at:g}</text>')
    label = f'<text x="{WIDTH / 2:.0f}" y="{HEAD + HEIGHT + 29}" text-anchor="middle">{escaped(unit)}; tallest: {most}</text>'
    size = f'viewBox="-4 0 {WIDTH + 8} {HEAD + HEIGHT + FOOT}" width="{WIDTH + 8}"'
    drawn = "".join(parts) + label
    return f'<figure><figcaption>{escaped(title)}</figcaption><svg {size} role="img">{drawn}</svg></figure>'


def round_ticks(low: float, high: float) -> list[float]:
    """Three to ten round numbers from `low` to `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3)) if high > low else 1.0
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) < 9)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) + 0.0 for number in range(first, last + 1)]


def svg_bars(title: str, values: dict[str, float], unit: str) -> str:
    """One horizontal bar per name, in the order given."""
    most = max([*values.values(), 1e-12])
    parts = []
    for place, (name, value) in enumerate(values.items()):
        y, long = place * BAR_HEIGHT, 220 * value / most
        parts.append(f'<text x="150" y="{y + 13}" text-anchor="end">{escaped(shortened(name))}</text>')
        parts.append(f'<rect x="156" y="{y + 2}" width="{long:.1f}" height="{BAR_HEIGHT - 4}"/>')
        parts.append(f'<text x="{160 + long:.1f}" y="{y + 13}">{value:.4g}</text>')
    size = f'viewBox="0 0 {WIDTH + 8} {len(values) * BAR_HEIGHT + 4}" width="{WIDTH + 8}"'
    caption = f"<figcaption>{escaped(title)}, {escaped(unit)}</figcaption>"
    return f'<figure>{caption}<svg {size} role="img">{"".join(parts)}</svg></figure>'


def shortened(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"


def png_picture(values: np.ndarray, alt: str) -> str:
    """An image of values [rows, columns], the first row at the bottom; dark = least, yellow = most."""
    low, high = float(values.min()), float(values.max())
    grey = np.round(255 * (values - low) / (high - low or 1)).astype(np.uint8)[::-1]
    data = base64.b64encode(png(grey)).decode()
    return f'<img class="mel" alt="{escaped(alt)}" src="data:image/png;base64,{data}">'


def png(grey: np.ndarray) -> bytes:
    """grey [h, w] uint8 -> PNG in the colours of PALETTE."""
    height, width = grey.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), grey], axis=1)  # each line begins with its filter, none
    chunks = (
        (b"IHDR", struct.pack(">2I5B", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", PALETTE.tobytes()),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _palette() -> np.ndarray:
    stops = np.array([[12, 8, 38], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], float)
    places = np.linspace(0, 4, 256)
    return np.stack([np.interp(places, range(5), stops[:, colour]) for colour in range(3)], 1).round().astype(np.uint8)


PALETTE = _palette()  # [256, 3]
