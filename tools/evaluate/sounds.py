"""Players of an evaluation's waves, for its pages.

In: OUT and the utterances. Out: an audio element and its length, or why there is none. Each is encoded when it is asked for and
none is kept, so a page needs the memory of one wave besides its own text.
"""

from __future__ import annotations

from pathlib import Path

from tools.evaluate.speaking import wave_name
from tools.evaluate.systems import REFERENCE
from tools.evaluate.utterances import Utterance
from tools.evaluate.waves import read_wave
from tools.web_page.page import escaped, player


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

    def reference(self, item: str, perturb: str = "") -> str:
        """The item's prompt; with `perturb` what that has made of it."""
        return self.of(wave_name(f"{REFERENCE} +{perturb}" if perturb else REFERENCE, 0, item))
