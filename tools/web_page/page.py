"""One page that is one file: style, script and sound are inside, and its own content policy forbids requests.

In: a body made of the pieces here. Out: HTML. Texts of strangers are escaped; Arabic runs from right to left by its own
direction. Sound is MP3, a sixth of the wave: good enough to find a wrong text, not for the last word on quality.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shards.printable import printable
from shards.sequence import SAMPLE_RATE

POLICY = "default-src 'none'; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
HERE = Path(__file__).parent


def page(title: str, body: str, script: str | None = None) -> str:
    """`script`: JavaScript; by default what sorts and filters tables and shows how long players are."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    code = (HERE / "table.js").read_text(encoding="utf-8") if script is None else script
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>\n{style}</style></head>\n<body>\n'
        f"<h1>{escaped(title)}</h1>\n{body}\n<script>\n{code}</script>\n</body></html>\n"
    )


def section(title: str, content: str) -> str:
    """Nothing where there is no content."""
    return f"<h2>{title}</h2>\n{content}" if content else ""


def listed(lines: Iterable[str]) -> str:
    content = "".join(f"<li>{escaped(line)}</li>" for line in lines)
    return f"<ul>{content}</ul>" if content else ""


def table(headings: list[str], rows: list[list[str]], name: str = "") -> str:
    """rows: `<td>` elements; a click on a heading sorts. With a name a search field stands above it."""
    of_numbers = {
        place for row in rows for place, content in enumerate(row) if content.startswith('<td class="number"')
    }
    marks = [' class="number"' if place in of_numbers else "" for place in range(len(headings))]
    head = "".join(
        f"<th data-sort{mark}>{escaped(heading)}</th>" for mark, heading in zip(marks, headings, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    search, mark = "", ""
    if name:
        search = f'<input type="search" data-filter="{name}" placeholder="words that a row must hold"> '
        search += f'<small id="{name}-count"></small>'
        mark = f' id="{name}"'
    return (
        f'{search}<div class="wide"><table{mark}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def cell(value: Any) -> str:
    if value is None:
        return '<td class="number">-</td>'
    if isinstance(value, float):
        return f'<td class="number" data-value="{value}">{round(value, 4):.4g}</td>'
    if isinstance(value, int):
        return f'<td class="number" data-value="{value}">{value}</td>'
    return f"<td>{escaped(value)}</td>"


def escaped(text: Any) -> str:
    return html.escape(printable(str(text)))


def arabic(text: str) -> str:
    """Text in its own direction, whatever stands around it."""
    return f'<bdi dir="{"rtl" if any("؀" <= letter <= "ࣿ" for letter in text) else "auto"}">{escaped(text)}</bdi>'


def player(wave: np.ndarray) -> str:
    """An audio element of wave [S] float32 at 24 kHz, and its seconds."""
    data = base64.b64encode(mp3(wave)).decode()
    return (
        f'<audio controls preload="metadata" src="data:audio/mpeg;base64,{data}"></audio>'
        f'<span class="seconds">{len(wave) / SAMPLE_RATE:.2f} s</span>'
    )


def mp3(wave: np.ndarray) -> bytes:
    """wave [S] float32 at 24 kHz -> MP3."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wave, -1, 1), SAMPLE_RATE, format="MP3")
    return buffer.getvalue()
