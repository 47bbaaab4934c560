"""Reject reasons and warning codes: one closed list, through which every place that rejects or warns must pass."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from preprocess.reasons import (
    REASONS,
    ROLE_WARNINGS,
    TEXT_WARNINGS,
    WRITTEN_WARNINGS,
    AudioFault,
    RowFault,
    known_warnings,
    reject,
)

STAGE_ONE = Path(__file__).resolve().parent.parent / "preprocess"


def readme_table(head: str) -> dict[str, str]:
    """code -> line of the table whose header begins with `head`."""
    lines = (STAGE_ONE / "README.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(f"| {head} | what it means |") + 2
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        code, meaning = line.replace("\\|", "\0").strip("| ").split(" | ")
        rows[code.strip("`")] = meaning.replace("\0", "|")
    return rows


@pytest.mark.parametrize(
    ("head", "codes"),
    [
        ("reject", REASONS),
        ("warning, after `reference_` or `target_`", ROLE_WARNINGS),
        ("warning of a row", TEXT_WARNINGS),
    ],
)
def test_the_readme_lists_every_code_with_its_line(head: str, codes: dict[str, str]):
    assert readme_table(head) == codes
    assert all(len(line) > 10 and "\n" not in line for line in codes.values())


def test_a_reason_nobody_explained_cannot_be_given():
    with pytest.raises(ValueError, match="'odd' is not in preprocess/reasons"):
        reject(0, "row-0", "audio", "odd", "x")
    with pytest.raises(ValueError, match="odd"):
        RowFault("audio", "odd", "x")
    with pytest.raises(ValueError, match="odd"):
        AudioFault("odd", "x")


def test_a_warning_nobody_explained_cannot_be_given():
    assert known_warnings(["target_quiet", "normalized_nfc"]) == ["target_quiet", "normalized_nfc"]
    for code in ("quiet", "reference_normalized_nfc", "target_odd"):
        with pytest.raises(ValueError, match=code):
            known_warnings([code])


def test_only_reasons_py_makes_rejects():
    """A `Reject(...)` elsewhere in stage one would pass by the list."""
    makers = {
        path.name
        for path in STAGE_ONE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Reject"
    }
    assert makers == {"reasons.py"}


def test_every_reason_is_given_somewhere():
    """A line for something that cannot happen misleads who reads the list."""
    sources = "".join(p.read_text(encoding="utf-8") for p in STAGE_ONE.glob("*.py") if p.name != "reasons.py")
    # normalized_* are made from the names of text.normalize
    codes = [*REASONS, *ROLE_WARNINGS, *(code for code in TEXT_WARNINGS if not code.startswith("normalized_"))]
    assert [code for code in codes if f'"{code}"' not in sources] == []
    assert WRITTEN_WARNINGS
