"""`inspect-shards report`: one page that shows, and plays, what a data set holds.

In: a data set; the codec that made it; the source recordings where they are still found. Out: OUT.html, which asks nobody for
anything. Players are decoded from the codes, beside the recording: what the model hears, not what the file was. Without the codec
or the recordings the page says so in their places. The price of one file: about 150 kB per sample with sound.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from preprocess.reasons import ROLE_WARNINGS, ROLES, TEXT_WARNINGS
from shards.columns import columns_row
from shards.manifest import Dataset
from shards.sample import Sample
from shards.writer import write_bytes
from tools.inspect_shards.figures import Columns, drawn_samples
from tools.inspect_shards.opened import OpenedData
from tools.inspect_shards.players import Players
from tools.web_page.charts import svg_bars, svg_histogram
from tools.web_page.page import arabic, cell, escaped, listed, page, section, table

LISTED_SAMPLES = 300
NUM_BARS_OF_SPEAKERS = 25


def write_report(
    data: OpenedData, columns: Columns, facts: dict[str, Any], players: Players,
    num_players: int, out: Path, on_sample: Callable[[], None],
) -> None:  # fmt: skip
    """facts: of `summary.all_facts`."""
    record = data.record
    listed_samples = dict(drawn_samples(data, LISTED_SAMPLES))
    chosen = choose(listed_samples, num_players)
    rows = []
    for row, why in chosen.items():
        rows.append(player_row(listed_samples[row], why, players))
        on_sample()
    parts = [
        f"<p>{escaped(data.name)}: {record.num_samples} samples of {len(record.speakers)} speakers, "
        f"{record.target_hours:.3f} h of targets, {record.reference_hours:.3f} h of references; "
        f"{record.num_rows - record.num_samples} of {record.num_rows} rows rejected.</p>",
        section("Ready to train?", readiness_part(facts["readiness"])),
        section("Lengths, speed and sound", histograms_part(facts, columns)),
        section("Texts", text_part(facts["text"])),
        section("Speakers", speakers_part(record)),
        section("Listen", f"<p>{escaped(players.note)}</p>" + listening_table(rows) if rows else ""),
        section("Codes", codes_part(facts["codes"])),
        section("Warnings", warnings_part(record)),
        section("Rejected rows", rejects_part(facts["rejected"])),
        section(f"Samples ({len(listed_samples)} of {record.num_samples}, drawn)", samples_table(listed_samples)),
        section("Made of", made_of(data.name, record)),
    ]
    write_bytes(out, page("Data set", "\n".join(part for part in parts if part)).encode())


def choose(samples: dict[int, Sample], most: int) -> dict[int, str]:
    """row -> why: the extremes, one of each warning, then as drawn."""
    if not samples or not most:
        return {}
    row_of = {row: columns_row(sample.facts) for row, sample in samples.items()}
    seconds = {row: sample.facts.target.duration_s for row, sample in samples.items()}
    rate = {row: len(s.facts.texts[s.facts.target_text]) / max(seconds[row], 1e-3) for row, s in samples.items()}
    chosen: dict[int, str] = {}
    for row, why in (
        (max(rate, key=rate.__getitem__), "fastest text"),
        (min(rate, key=rate.__getitem__), "slowest text"),
        (max(seconds, key=seconds.__getitem__), "longest"),
        (min(seconds, key=seconds.__getitem__), "shortest"),
    ):
        chosen.setdefault(row, why)
    seen: set[str] = set()
    for row, sample in samples.items():
        new = [code for code in sample.facts.warnings if code not in seen]
        if new and len(chosen) < most // 2:
            chosen.setdefault(row, new[0])
            seen.update(new)
    for row in np.random.default_rng(1).permutation(list(row_of)).tolist():
        chosen.setdefault(row, "")
    return dict(list(chosen.items())[:most])


# --- sections -------------------------------------------------------------------------------------------------------


def readiness_part(facts: dict[str, Any]) -> str:
    warnings = "".join(f'<li class="failure">{escaped(line)}</li>' for line in facts["warnings"])
    rows = [
        [cell(name.replace("_", " ")), f"<td>{escaped(readable(value))}</td>"]
        for name, value in facts.items()
        if name != "warnings"
    ]
    return (f"<ul>{warnings}</ul>" if warnings else "<p>No warnings.</p>") + table(["what", "value"], rows)


def histograms_part(facts: dict[str, Any], columns: Columns) -> str:
    about = (
        ""
        if columns.is_whole
        else f"<p>Texts: of {len(columns.table)} samples that were read; this data set has no columns.</p>"
    )
    return about + "".join(
        svg_histogram(part["title"], part["unit"], part["edges"], part["counts"], part["limits"])
        for part in facts["histograms"].values()
    )


def text_part(shares: dict[str, float]) -> str:
    return (
        svg_bars("Shares", {name.replace("_", " "): 100 * value for name, value in shares.items()}, "%")
        if shares
        else ""
    )


def speakers_part(record: Dataset) -> str:
    ranked = sorted(record.speakers.items(), key=lambda item: (-item[1], item[0]))
    values = {name: float(count) for name, count in ranked[:NUM_BARS_OF_SPEAKERS]}
    rest = sum(count for _, count in ranked[NUM_BARS_OF_SPEAKERS:])
    if rest:
        values[f"{len(ranked) - NUM_BARS_OF_SPEAKERS} others"] = float(rest)
    speakers = svg_bars("Samples per speaker", values, "samples") if values else ""
    said = {name: float(count) for name, count in record.dialects.items()} if record.dialects else {}
    return speakers + (svg_bars("Samples per dialect", said, "samples") if said else "")


def codes_part(facts: dict[str, Any]) -> str:
    if not facts["frames"]:
        return "<p>No sample could be read.</p>"
    rows = [
        [cell(book), cell(bits), cell(dead), cell(100 * repeats)]
        for book, (bits, dead, repeats) in enumerate(
            zip(facts["entropy_bits"], facts["never_used"], facts["repeats"], strict=True)
        )
    ]
    about = f"{facts['frames']} frames of {facts['samples']} samples; of 1024 codes each, 10 bits would be all alike."
    return f"<p>{about}</p>" + table(
        ["codebook", "entropy, bits", "codes never used", "repeats of the frame before, %"], rows
    )


def warnings_part(record: Dataset) -> str:
    rows = [
        [cell(code), cell(count), cell(count / max(1, record.num_samples)), cell(meaning_of(code))]
        for code, count in sorted(record.warnings.items(), key=lambda item: -item[1])
    ]
    return table(["warning", "samples", "share", "what it means"], rows) if rows else "<p>None.</p>"


def meaning_of(code: str) -> str:
    role, _, name = code.partition("_")
    return TEXT_WARNINGS.get(code) or (f"{role}: {ROLE_WARNINGS.get(name, '')}" if role in ROLES else "")


def rejects_part(rejected: dict[str, dict[str, Any]]) -> str:
    rows = []
    for reason, part in rejected.items():
        examples = "".join(
            f"<li>row {example['row']} {arabic(example['id'])} {arabic(example['path'] or '')}: {arabic(example['detail'])}</li>"
            for example in part["examples"]
        )
        rows.append([cell(reason), cell(part["count"]), cell(part["meaning"]), f"<td><ul>{examples}</ul></td>"])
    return table(["reason", "rows", "what it means", "the first"], rows) if rows else "<p>None.</p>"


def listening_table(rows: list[list[str]]) -> str:
    headings = ["sample", "text", "reference", "target", "warnings"]
    return table(headings, rows, "listen")


def player_row(sample: Sample, why: str, players: Players) -> list[str]:
    facts = sample.facts
    texts = [facts.texts[facts.reference_text], facts.texts[facts.target_text]]
    cells = [
        f"<td>{escaped(facts.speaker)}<br><small>{escaped(sample.key)} {escaped(facts.id)}<br>{escaped(why)}</small></td>",
        f'<td class="text"><small>reference</small> {arabic(texts[0])}<br><small>target</small> {arabic(texts[1])}</td>',
    ]
    for role, codes, audio in (
        ("reference", sample.reference_codes, facts.reference),
        ("target", sample.target_codes, facts.target),
    ):
        cells.append(
            f"<td><small>{role}, from its codes</small>{players.of_codes(codes)}<br>"
            f"<small>{role}, the file</small>{players.of_file(audio)}</td>"
        )
    return [*cells, f"<td>{escaped(', '.join(facts.warnings))}</td>"]


def samples_table(samples: dict[int, Sample]) -> str:
    rows = []
    for sample in samples.values():
        facts = sample.facts
        text = facts.texts[facts.target_text]
        rows.append([
            cell(sample.key),
            cell(facts.id),
            cell(facts.speaker),
            cell(round(facts.target.duration_s, 2)),
            cell(round(len(text) / max(facts.target.duration_s, 1e-3), 1)),
            cell(facts.target.sample_rate),
            cell(", ".join(facts.warnings)),
            f'<td class="text" dir="auto">{arabic(text)}</td>',
        ])  # fmt: skip
    headings = ["key", "id", "speaker", "seconds", "characters/s", "Hz of the file", "warnings", "text"]
    return table(headings, rows, "samples") if rows else ""


def made_of(name: str, record: Dataset) -> str:
    prints = [f"{name}: {value or 'none'}" for name, value in msgspec.to_builtins(record.fingerprints).items()]
    settings = [f"{name} = {values}" for name, values in record.config.items()]
    command = f"inspect-shards report {shlex.quote(name)} OUT.html"
    return listed([f"digest: {record.digest}", *prints, *settings]) + f"<p><code>{escaped(command)}</code></p>"


def readable(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)
