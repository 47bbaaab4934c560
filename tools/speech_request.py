"""What is asked of a voice, checked before anything is loaded or spoken, and what comes back.

In: a reference, a text and settings with the released examples' names. Out: `SpeechRequest`, `GeneratedSpeech`. Every number is
checked here, once, for the Python API, the command and whoever else speaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from shards.errors import ConfigError
from tools.split_text import MAX_CHARS

# end: the model ended by itself. max_seconds: the caller's limit. text_ceiling: it went on far beyond what the text can last.
StopReason = Literal["end", "max_seconds", "text_ceiling", "cancelled"]
MAX_SEED = (1 << 63) - 1
MAX_PART_CHARS = 1000  # text.max_chars of stage one: no longer text was trained


@dataclass(frozen=True, kw_only=True, eq=False)
class SpeechRequest:
    """One text to be said in one voice; the arguments of `HiggsAudioInference.generate_speech`."""

    reference_audio: Any
    target_text: str
    reference_text: str | None = None
    sample_rate: int | None = None
    speaker_name: str | None = None
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 50
    ras_win_len: int = 7
    ras_win_max_num_repeat: int = 2
    seed: int = 0
    max_seconds: float | None = None
    part_chars: int = MAX_CHARS

    def __post_init__(self) -> None:
        """Raises ConfigError that names every value that cannot be used."""
        checks = [
            ("temperature", self.temperature, "0 (always the likeliest code) to 100", lambda x: 0 <= x <= 100),
            ("top_p", self.top_p, "more than 0, at most 1", lambda x: 0 < x <= 1),
            ("top_k", self.top_k, "a whole number, 0 = all", lambda x: _is_whole(x) and 0 <= x < 1 << 31),
            ("ras_win_len", self.ras_win_len, "a whole number, 0 = off", lambda x: _is_whole(x) and 0 <= x <= 1000),
            (
                "ras_win_max_num_repeat",
                self.ras_win_max_num_repeat,
                "1 or more",
                lambda x: _is_whole(x) and 1 <= x < 1 << 31,
            ),
            ("seed", self.seed, f"a whole number, 0 to {MAX_SEED}", lambda x: _is_whole(x) and 0 <= x <= MAX_SEED),
            (
                "part_chars",
                self.part_chars,
                f"10 to {MAX_PART_CHARS} characters",
                lambda x: _is_whole(x) and 10 <= x <= MAX_PART_CHARS,
            ),
        ]
        if self.max_seconds is not None:
            checks.append(("max_seconds", self.max_seconds, "0.04 (one frame) or more", lambda x: 0.04 <= x <= 86400))
        if self.sample_rate is not None:
            checks.append(("sample_rate", self.sample_rate, "whole Hz", lambda x: _is_whole(x) and 0 < x < 1 << 31))
        wrong = [
            f"{name} = {value!r}: expected {wanted}"
            for name, value, wanted, holds in checks
            if not _passes(value, holds)
        ]
        if wrong:
            raise ConfigError("; ".join(wrong))


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer))


def _passes(value: Any, holds: Any) -> bool:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_number and bool(holds(value))  # every one has bounds, which NaN and infinity do not hold


@dataclass(frozen=True, eq=False)
class SpeechPart:
    """A part of a text as it was spoken."""

    text: str
    codes: np.ndarray  # [8, T] uint16
    stop_reason: StopReason


@dataclass(frozen=True, eq=False)
class GeneratedSpeech:
    """Speech; `waveform, sample_rate = speech` works too."""

    waveform: np.ndarray  # [S] float32, full scale is 1
    sample_rate: int
    parts: list[SpeechPart] = field(default_factory=list)  # one, unless the text was long
    speaker_name: str | None = None
    is_complete: bool = True  # every part of the text was begun

    @property
    def codes(self) -> np.ndarray:
        """[8, T] uint16. Of several parts one behind the other: the waveform is shorter by the cross-fades."""
        return np.concatenate([part.codes for part in self.parts], axis=1)

    @property
    def stop_reason(self) -> StopReason:
        """ "end" when every part ended by itself; else why the first one that did not was cut."""
        for part in self.parts:
            if part.stop_reason != "end":
                return part.stop_reason
        return "end"

    def __iter__(self) -> Iterator[Any]:
        return iter((self.waveform, self.sample_rate))
