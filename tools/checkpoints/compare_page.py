"""The page of `checkpoints compare`: tables and a plot in one file that asks nobody for anything."""

from __future__ import annotations

from tools.checkpoints.compare import HELD_OUT_LOSS, Comparison, Entry
from tools.checkpoints.curves import line_chart
from tools.checkpoints.evaluations import Row
from tools.web_page.page import cell, escaped, listed, page, section, table


def compare_page(found: Comparison) -> str:
    winner = f"{found.winner} - {found.criterion}" if found.winner else found.criterion
    points = {
        "checkpoints": sorted(
            (float(e.step), e.held_out[HELD_OUT_LOSS]) for e in found.entries if HELD_OUT_LOSS in e.held_out
        )
    }
    lines = found.curves or points
    body = "\n".join(
        [
            f"<p><strong>Take: {escaped(winner)}</strong></p>",
            listed(found.notes),
            section("Held-out audio loss", line_chart("held-out audio loss", lines)),
            section("Held-out losses", losses(found.entries)),
            section("Loss by codebook", codebooks(found.entries)),
            section("Evaluations", evaluations(found.entries)),
            section("Norm of the update, by group of modules", norms(found.entries)),
            section("Distance between updates", distances(found)),
        ]
    )
    return page("Checkpoints", body)


def losses(entries: list[Entry]) -> str:
    names = [name for name in loss_names(entries) if "codebook" not in name]
    return by_name(entries, names) if names else ""


def codebooks(entries: list[Entry]) -> str:
    names = [name for name in loss_names(entries) if "codebook" in name]
    if not names:
        return ""
    lines = {
        entry.name: [(float(k), entry.held_out[name]) for k, name in enumerate(names) if name in entry.held_out]
        for entry in entries
    }
    return line_chart("held-out loss by codebook", lines, "codebook") + by_name(entries, names)


def loss_names(entries: list[Entry]) -> list[str]:
    return sorted({name for entry in entries for name in entry.held_out if "loss" in name or "codebook" in name})


def by_name(entries: list[Entry], names: list[str]) -> str:
    rows = [
        [cell(entry.name), cell(entry.step), *(cell(entry.held_out.get(name)) for name in names)] for entry in entries
    ]
    return table(["checkpoint", "step", *(name.removeprefix("eval/") for name in names)], rows)


def evaluations(entries: list[Entry]) -> str:
    rows = [
        [
            cell(entry.name), cell(row.name), cell(row.items), cell(row.cer), cell(row.wer),
            cell(", ".join(f"{name} {value:.3f}" for name, value in row.similarity.items())), cell(row.failures),
            cell(differences(row)),
        ]
        for entry in entries
        for row in entry.evaluations
    ]  # fmt: skip
    headings = ["checkpoint", "evaluation", "items", "CER", "WER", "similarity", "failures", "from the base, 95 %"]
    return table(headings, rows) if rows else ""


def differences(row: Row) -> str:
    return "; ".join(
        f"{part.metric} {part.value:+.4f}"
        + ("" if part.low is None or part.high is None else f" [{part.low:+.4f}, {part.high:+.4f}]")
        + f" {part.verdict}"
        for part in row.differences
    )


def norms(entries: list[Entry]) -> str:
    groups = sorted({group for entry in entries for group in entry.norms})
    rows = [[cell(group), *(cell(entry.norms.get(group)) for entry in entries)] for group in groups]
    return table(["group", *(entry.name for entry in entries)], rows)


def distances(found: Comparison) -> str:
    rows = [[cell(part.first), cell(part.second), cell(part.relative), cell(part.cosine)] for part in found.distances]
    return table(["one", "other", "distance / norm", "cosine"], rows) if rows else ""
