"""OUT/report.html and OUT/blind.html: figures, verdicts and sound in one file each, for somebody who has only a browser.

In: results and utterances. Out: pages that ask nobody for anything: style, script and sound are inside, and their own content
policy forbids requests. Texts of strangers are escaped; Arabic cells run from right to left by their own direction. Sound is
MP3, a sixth of the wave; listen to OUT/waves for the last word on quality.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from shards.writer import write_bytes
from tools.evaluate.request import Plan
from tools.evaluate.systems import REFERENCE
from tools.evaluate.utterances import Utterance
from tools.evaluate.waves import read_wave
from tools.web_page.page import arabic, cell, escaped, listed, page, player, section, table
from train.evaluation.text_protocols import HEADLINE

QUESTION = "Which of the two sounds more like the voice of the reference, speaking naturally?"
HERE = Path(__file__).parent


def write_report(out: Path, results: dict[str, Any], rows: list[Utterance], plan: Plan, num_players: int) -> list[Path]:
    """Write the pages; returns them. A blind page needs two systems to choose from."""
    sounds = Sounds(out, rows)
    shown = items_shown(results, plan, num_players)
    pages = [out / "report.html"]
    write_bytes(pages[0], page("Evaluation", report_body(results, plan, sounds, shown)).encode())
    pair = blind_pair(results)
    if pair:
        pages.append(out / "blind.html")
        body = blind_body(
            plan, sounds, [item for item in shown if sounds.has(pair[0], item) and sounds.has(pair[1], item)], pair
        )
        write_bytes(pages[1], page("Blind comparison", body, (HERE / "blind.js").read_text(encoding="utf-8")).encode())
    return pages


# --- sound ----------------------------------------------------------------------------------------------------------


class Sounds:
    """Players of waves, each encoded when it is asked for."""

    def __init__(self, out: Path, rows: list[Utterance]) -> None:
        self._out = out
        self._rows = {(row.system, row.item, row.draw): row for row in rows}

    def row(self, system: str, item: str, draw: int = 0) -> Utterance | None:
        return self._rows.get((system, item, draw))

    def has(self, system: str, item: str) -> bool:
        row = self.row(system, item)
        return row is not None and not row.error and row.duration_s > 0

    def player(self, system: str, item: str, draw: int = 0) -> str:
        """An audio element and its length, or why there is none."""
        row = self.row(system, item, draw)
        if row is None:
            return "-"
        return self.of(row.wave) if not row.error else f'<span class="failure">{escaped(row.error)}</span>'

    def of(self, wave: str) -> str:
        samples, facts = read_wave(self._out / wave)
        if facts.error or not len(samples):
            return f'<span class="failure">{escaped(facts.error or "empty")}</span>'
        return player(samples)


def items_shown(results: dict[str, Any], plan: Plan, num_players: int) -> list[str]:
    """Items with sound: the worst first, then from the top of the list."""
    names = [row["item"] for row in results["worst"]] + [item.id for item in plan.items.items]
    return list(dict.fromkeys(names))[:num_players]


# --- the report -----------------------------------------------------------------------------------------------------


def report_body(results: dict[str, Any], plan: Plan, sounds: Sounds, shown: list[str]) -> str:
    data = results["data"]
    alarm = " alarm" if results["seen"].startswith("SEEN") else ""
    parts = [
        f'<p class="seen{alarm}">{escaped(results["seen"])}</p>',
        f"<p>{data['items']} items of {data['speakers']} speakers from {escaped(data['source'])} ({escaped(data['kind'])}), "
        f"said {results['draws']} times each; {len(data['skipped'])} rows skipped.</p>",
        section("Is it better?", verdicts(results)),
        section("Systems", systems_table(results)),
        section("Worst first, side by side", players_table(results, plan, sounds, shown)),
        section("By speaker", parts_table(results["speakers"], "speaker")),
        section("By group", parts_table(results["groups"], "group")),
        section("All differences", differences_table(results)),
        section("Models and rules", models_list(results)),
        section("Not measured", listed(results["not_measured"] + data["skipped"][:20])),
    ]
    return "\n".join(part for part in parts if part)


def verdicts(results: dict[str, Any]) -> str:
    """The differences to the base, or to the recordings where there is no base, in sentences."""
    told = [row for row in results["comparisons"] if row["second"] == "base" or " +" in row["first"]]
    rows = told or results["comparisons"]
    lines = []
    for row in rows:
        spread = "" if row["low"] is None else f", 95 % interval {row['low']:+.4f} to {row['high']:+.4f}"
        chance = "" if row["p_worse"] is None else f", P(worse) {row['p_worse']:.3f}"
        lines.append(
            f"<li>{escaped(row['metric'])}: {escaped(row['first'])} against {escaped(row['second'])}: "
            f'<span class="{row["verdict"].split()[0]}">{escaped(row["words"])}</span> '
            f"<small>(difference {row['difference']:+.4f}{spread}{chance})</small></li>"
        )
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def systems_table(results: dict[str, Any]) -> str:
    encoders = [model["name"] for model in results["models"]["similarity"]]
    headings = [
        "system",
        "utterances",
        "failures",
        "CER",
        "WER",
        "CER, mean",
        "insertions",
        "deletions",
        "substitutions",
    ]
    headings += [f"{what} {name}" for name in encoders for what in ("similarity", "share of the way", "other clip")]
    predictors = list(dict.fromkeys(name for s in results["scores"].values() for name in s.get("mos_difference", {})))
    headings += [f"MOS to the recording, {name}" for name in predictors]
    headings += [
        "length / recording",
        "characters/s",
        "silence before",
        "silence behind",
        "longest copy s",
        "text reached",
    ]
    rows = []
    for name, scores in results["scores"].items():
        cer = scores.get("cer", {}).get(HEADLINE, {})
        cells: list[Any] = [name, scores["utterances"], scores["failures"]["share"], cer.get("corpus")]
        cells += [scores.get("wer", {}).get(HEADLINE, {}).get("corpus"), cer.get("mean_of_utterances")]
        cells += [cer.get(kind) for kind in ("insertions", "deletions", "substitutions")]
        for encoder in encoders:
            pair = scores["similarity"][encoder]
            cells += [pair["to_reference"], pair["share_of_the_way"], pair["to_another_clip"]]
        cells += [scores.get("mos_difference", {}).get(name, {}).get("to_the_recording") for name in predictors]
        cells += [scores["duration_ratio"], scores["characters_per_second"], scores["leading_silence_s"]]
        cells += [
            scores["trailing_silence_s"],
            scores["longest_copy_of_the_prompt_s"],
            scores["text_reached_the_model"],
        ]
        rows.append([cell(value) for value in cells])
    return table(headings, rows)


def players_table(results: dict[str, Any], plan: Plan, sounds: Sounds, shown: list[str]) -> str:
    systems = [system.name for system in plan.systems if system.kind != "shuffled" and not system.perturb]
    items = {item.id: item for item in plan.items.items}
    worst = {row["item"]: row for row in reversed(results["worst"])}
    rows = []
    for place, name in enumerate(shown, 1):
        item, bad = items[name], worst.get(name)
        draw = bad["draw"] if bad else 0
        what = (
            " ".join(filter(None, [bad["failure"], "" if bad["cer"] is None else f"CER {bad['cer']:.2f}"]))
            if bad
            else ""
        )
        said = bad["recognised"] if bad else None
        heard = f"<br><small>recognised: {arabic(said)}</small>" if said else ""
        row = [
            cell(place),
            f"<td>{escaped(item.speaker)}<br><small>{escaped(name)}</small></td>",
            f'<td class="text" dir="auto">{arabic(item.text)}{heard}</td>',
            f'<td class="failure">{escaped(what)}</td>',
            f"<td>{reference_player(plan, sounds, name)}</td>",
        ]
        for system in systems:
            use = draw if sounds.row(system, name, draw) else 0
            row.append(f"<td>{sounds.player(system, name, use)}</td>")
        rows.append(row)
    return table(["#", "speaker", "text", "fault", "reference", *systems], rows)


def reference_player(plan: Plan, sounds: Sounds, item: str) -> str:
    from tools.evaluate.speaking import wave_name

    return sounds.of(wave_name(REFERENCE, 0, item))


def parts_table(parts: dict[str, dict[str, Any]], heading: str) -> str:
    if not parts:
        return ""
    metrics = list(dict.fromkeys(name for of in parts.values() for figures in of.values() for name in figures))
    rows = [
        [f'<td dir="auto">{escaped(part)}</td>', cell(system), *(cell(figures.get(metric)) for metric in metrics)]
        for part, of in parts.items()
        for system, figures in of.items()
    ]
    return table([heading, "system", *metrics], rows)


def differences_table(results: dict[str, Any]) -> str:
    keys = ["first", "second", "metric", "difference", "low", "high", "p_worse", "num_items", "num_speakers"]
    keys += ["speakers_needed", "method", "verdict"]
    rows = [[cell(row[key]) for key in keys] for row in results["comparisons"]]
    return table(keys, rows) if rows else ""


def models_list(results: dict[str, Any]) -> str:
    models = [*results["models"]["similarity"], *results["models"]["mos"], *filter(None, [results["models"]["asr"]])]
    lines = [f"{model['name']}, version {model['version']}, sha256 {model['sha256']}" for model in models]
    lines += [f"protocol {name}, version {version}" for name, version in results["protocols"].items()]
    lines += [
        f"{system['name']}: {system['model'] or system['folder'] or system['kind']}" for system in results["systems"]
    ]
    return listed(lines)


# --- blind comparison -----------------------------------------------------------------------------------------------


def blind_pair(results: dict[str, Any]) -> tuple[str, str] | None:
    """The system under test and what it is held against: the base, else the recordings."""
    kinds = {
        kind: [s["name"] for s in results["systems"] if s["kind"] == kind and not s["perturb"]]
        for kind in ("tuned", "waves", "base", "real")
    }
    tested = kinds["tuned"] + kinds["waves"] or kinds["base"]
    against = [name for name in kinds["base"] + kinds["real"] if name not in tested[:1]]
    return (tested[0], against[0]) if tested and against else None


def blind_body(plan: Plan, sounds: Sounds, shown: list[str], pair: tuple[str, str]) -> str:
    """Pairs in a drawn order, each with its sides drawn; the key stands in the page, for the download alone."""
    rng = np.random.default_rng(0)
    items = {item.id: item for item in plan.items.items}
    parts, key = [], []
    for number, name in enumerate(np.array(shown, object)[rng.permutation(len(shown))].tolist()):
        a, b = pair if rng.random() < 0.5 else pair[::-1]
        item = items[name]
        key.append({"item": name, "speaker": item.speaker, "a": a, "b": b})
        buttons = "".join(
            f'<button data-pair="{number}" data-choice="{choice}">{choice}</button>'
            for choice in ("A", "B", "no difference")
        )
        parts.append(
            f'<div class="pair" id="pair-{number}"><p class="text" dir="auto">{arabic(item.text)}</p>'
            f"<table><tr><td>reference{reference_player(plan, sounds, name)}</td><td>A{sounds.player(a, name)}</td>"
            f"<td>B{sounds.player(b, name)}</td></tr></table><p>{buttons}<span class='mine'></span></p></div>"
        )
    hidden = json.dumps({"question": QUESTION, "pairs": key}, ensure_ascii=True).replace("<", "\\u003c")
    return (
        f"<p>{QUESTION} Use headphones. Votes stay in this page until you download them.</p>"
        f'<p><label>Listener <input id="listener"></label> <button id="download">Download votes</button> '
        f'<span id="count">0 of {len(key)}</span></p>\n'
        + "\n".join(parts)
        + f'\n<script type="application/json" id="key">{hidden}</script>'
    )
