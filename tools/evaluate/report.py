"""OUT/report.html and OUT/blind.html: figures, verdicts and sound in one file each, for somebody who has only a browser.

In: results and utterances. Out: pages that ask nobody for anything: style, script and sound are inside, and their own content
policy forbids requests. Texts of strangers are escaped; Arabic cells run from right to left by their own direction. Sound is
MP3, a sixth of the wave; listen to OUT/waves for the last word on quality.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.writer import write_bytes
from tools.evaluate.blind_page import blind_body, blind_pair
from tools.evaluate.request import Plan
from tools.evaluate.sounds import Sounds
from tools.evaluate.systems import System
from tools.evaluate.utterances import Utterance
from tools.web_page.page import arabic, cell, escaped, listed, page, section, table
from train.evaluation.text_protocols import HEADLINE

HERE = Path(__file__).parent
ITEMS_PERTURBED = 10  # with sound, of each perturbation: as many players again as there are systems


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
        section("Worse references, side by side", perturbed_table(plan, sounds, shown[:ITEMS_PERTURBED])),
        section("Texts that did not reach the model", changed_texts(results)),
        section("By speaker", parts_table(results["speakers"], "speaker")),
        section("By group", parts_table(results["groups"], "group")),
        section("All differences", differences_table(results)),
        section("Models and rules", models_list(results)),
        section("Not measured", listed(results["not_measured"] + data["skipped"][:20])),
    ]
    return "\n".join(part for part in parts if part)


def verdicts(results: dict[str, Any]) -> str:
    """The differences to the base, or to the recordings where there is no base, in sentences."""
    headline = [row for row in results["comparisons"] if row["second"] == "base" or " +" in row["first"]]
    rows = [row for row in headline or results["comparisons"] if row["num_items"]]  # a speaker may have no other clip
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
        recognised = f"<br><small>recognised: {arabic(said)}</small>" if said else ""
        row = [
            cell(place),
            f"<td>{escaped(item.speaker)}<br><small>{escaped(name)}</small></td>",
            f'<td class="text" dir="auto">{arabic(item.text)}{recognised}</td>',
            f'<td class="failure">{escaped(what)}</td>',
            f"<td>{sounds.reference(name)}</td>",
        ]
        for system in systems:
            use = draw if sounds.row(system, name, draw) else 0
            row.append(f"<td>{sounds.player(system, name, use)}</td>")
        rows.append(row)
    return table(["#", "speaker", "text", "fault", "reference", *systems], rows)


def perturbed_table(plan: Plan, sounds: Sounds, shown: list[str]) -> str:
    """A row for each item and perturbation: what became of the reference, and what each model made of it."""
    worse = [system for system in plan.systems if system.perturb]
    models = list(dict.fromkeys(plain_name(system) for system in worse))
    items = {item.id: item for item in plan.items.items}
    rows = []
    for name in shown:
        for perturb in dict.fromkeys(system.perturb for system in worse):
            row = [
                f"<td>{escaped(items[name].speaker)}<br><small>{escaped(name)}</small></td>",
                f'<td class="text" dir="auto">{arabic(items[name].text)}</td>',
                cell(perturb),
                f"<td>{sounds.reference(name, perturb)}</td>",
            ]
            row += [f"<td>{perturbed_player(sounds, f'{model} +{perturb}', name)}</td>" for model in models]
            rows.append(row)
    return table(["speaker", "text", "perturbation", "reference", *models], rows) if rows else ""


def plain_name(system: System) -> str:
    return system.name.removesuffix(f" +{system.perturb}")


def perturbed_player(sounds: Sounds, system: str, item: str) -> str:
    row = sounds.row(system, item)
    fault = f'<small class="failure">{escaped(row.failure)}</small>' if row and row.failure and not row.error else ""
    return sounds.player(system, item) + fault


def changed_texts(results: dict[str, Any]) -> str:
    """Asked, and what the model's text tokens spell: a fault of the tokenizer that would be heard as the model's."""
    rows = [
        [
            cell(name),
            cell(changed["item"]),
            *(f'<td class="text" dir="auto">{arabic(changed[key])}</td>' for key in ("asked", "reached")),
        ]
        for name, scores in results["scores"].items()
        for changed in scores["changed_texts"]
    ]
    return table(["system", "item", "asked", "reached the model"], rows) if rows else ""


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
