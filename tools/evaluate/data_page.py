"""OUT/data.html of `evaluate --data-only`: figures, and the worst 1 % of rows with their recordings.

In: data.json, the rows, and OUT with its recordings. Out: the body of a page. Only the worst rows have players, at most
MAX_PLAYERS by each measure, so that the page of any data set can be opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.evaluate.speaking import wave_name
from tools.evaluate.systems import REFERENCE
from tools.evaluate.waves import read_wave
from tools.web_page.page import arabic, cell, escaped, listed, player, section, table

if TYPE_CHECKING:
    from tools.evaluate.data_check import Row

MAX_PLAYERS = 100


def body(results: dict[str, Any], rows: list[Row], out: Path) -> str:
    by_item = {row.item: row for row in rows}
    parts = [
        f"<p>{len(rows)} rows of {results['speakers']} speakers from {escaped(results['data']['source'])}.</p>",
        section("Clips", figures_table(results["clips"])),
        section("Reference and target: one voice?", figures_table(results["agreement"])),
    ]
    for name, found in results["worst"].items():
        shown = [by_item[row["item"]] for row in found[:MAX_PLAYERS]]
        parts.append(section(f"Worst 1 %, by {escaped(name)}", worst_table(shown, out)))
    if results["validation"]:
        counts = {key: value for key, value in results["validation"].items() if isinstance(value, int | float)}
        parts.append(section("preprocess --validate-only", listed(f"{key}: {value}" for key, value in counts.items())))
        parts.append(listed(f"{code}: {count}" for code, count in results["validation"]["rejects"].items()))
    parts.append(section("Not measured", listed(results["not_measured"])))
    return "\n".join(part for part in parts if part)


def figures_table(parts: dict[str, dict[str, Any]]) -> str:
    if not parts:
        return ""
    keys = list(next(iter(parts.values())))

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return ", ".join(f"{count} {what}" for what, count in value.items()) or "none"
        return len(value) if isinstance(value, list) else value

    return table(
        ["", *keys], [[cell(name), *(cell(shown(found[key])) for key in keys)] for name, found in parts.items()]
    )


def worst_table(rows: list[Row], out: Path) -> str:
    lines = []
    for place, row in enumerate(rows, 1):
        clip = row.target or row.reference
        recognised = f"<br><small>recognised: {arabic(clip.recognised)}</small>" if clip.recognised else ""
        alike = min(row.agreement.values(), default=None)
        lines.append(
            [
                cell(place),
                f"<td>{escaped(row.speaker)}<br><small>{escaped(row.item)}</small></td>",
                f'<td class="text" dir="auto">{arabic(row.text)}{recognised}</td>',
                cell(clip.characters.rate if clip.characters else None),
                cell(alike),
                *(f"<td>{sound(out, role, row)}</td>" for role in (REFERENCE, "real")),
            ]
        )
    return table(["#", "speaker", "text", "CER", "voices", "reference", "target"], lines)


def sound(out: Path, role: str, row: Row) -> str:
    clip = row.reference if role == REFERENCE else row.target
    if clip is None:
        return "-"
    wave, facts = read_wave(out / wave_name(role, 0, row.item))
    fault = clip.error or facts.error or ("" if len(wave) else "empty")
    return f'<span class="failure">{escaped(fault)}</span>' if fault else player(wave)
