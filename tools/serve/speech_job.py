"""One utterance on its way through the queue, and what is reported of it.

In: a checked request. Out: events, called in the queue's thread: Started, Sounds, then Ended or Failed, unless it was cancelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tools.serve.api_errors import ApiError
from tools.speech_request import SpeechPart, SpeechRequest

if TYPE_CHECKING:
    from tools.reference import Reference
    from tools.speaker import Speaker
    from tools.spoken_wave import SpokenWave
    from tools.utterance import Utterance


@dataclass(frozen=True)
class Started:
    """The text and the voice are sound, the first block has been spoken."""


@dataclass(frozen=True, eq=False)
class Sound:
    wave: np.ndarray  # [S] float32, never empty


@dataclass(frozen=True, eq=False)
class Ended:
    parts: list[SpeechPart]
    is_complete: bool


@dataclass(frozen=True)
class Failed:
    error: ApiError


Event = Started | Sound | Ended | Failed


@dataclass(eq=False)
class Job:
    """One utterance, from its acceptance to its last event, which is Ended or Failed unless it was cancelled."""

    request: SpeechRequest  # without its reference
    reference: Callable[[Speaker], Reference]  # called in the thread of the queue
    deliver: Callable[[Event], None]  # as well
    in_windows: bool  # sound while it is spoken; else part by part
    accepted: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    utterance: Utterance | None = None
    spoken: SpokenWave | None = None
    has_sound: bool = False


def stop_reason(ended: Ended) -> str:
    """ "end", or why the first part that did not end by itself was cut."""
    return next((part.stop_reason for part in ended.parts if part.stop_reason != "end"), "end")
