"""OUT/blind.html: pairs of one item by two systems, sides drawn, for a listener who must not know which is which.

In: the plan, players, the two systems. Out: the page's body; its script (blind.js) keeps the votes and makes the download.
The key stands in the page, out of sight: a listener who reads the source is not blind, the price of a page without a server.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tools.evaluate.request import Plan
from tools.evaluate.sounds import Sounds
from tools.web_page.page import arabic

QUESTION = "Which of the two sounds more like the voice of the reference, speaking naturally?"


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
            f"<table><tr><td>reference{sounds.reference(name)}</td><td>A{sounds.player(a, name)}</td>"
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
