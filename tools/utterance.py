"""One request on its way through an engine: its parts are spoken one after the other, each with the same reference and seed.

In: blocks of columns as the engine makes them. Out: the parts' codes, while they come and when they are done. A part that goes
on beyond what its text can last is cut there and the next one begins; a cut never passes without its reason.
"""

from __future__ import annotations

import logging

import numpy as np

from shards.errors import DataError
from tools.prompt_text import longest_s, prompt_text, warn_of_garbled
from tools.reference import Reference
from tools.speaker import Speaker
from tools.speech_request import MAX_PART_CHARS, SpeechPart, SpeechRequest, StopReason
from tools.split_text import split_text
from train.model.generation.engine import Engine
from train.model.generation.request import FRAMES_PER_SECOND, Request, Sampling

log = logging.getLogger("speak")


class Utterance:
    def __init__(self, speaker: Speaker, engine: Engine, reference: Reference, request: SpeechRequest) -> None:
        """Submits the first part. Raises DataError for a text that cannot be said."""
        self._speaker, self._engine, self._reference = speaker, engine, reference
        self._sampling = sampling_of(request)
        said = prompt_text(request.target_text, speaker.rules, "the text")
        warn_of_garbled(said, "the text")
        self._texts = split_text(said, request.part_chars)
        longest = max(len(text.strip()) for text in self._texts)
        if longest > max(request.part_chars, MAX_PART_CHARS):
            raise DataError(
                f"the text: {longest} characters without a place to split it; put blanks or marks between the words, "
                "and take out what cannot be said"
            )
        self._frames_left = None if request.max_seconds is None else round(request.max_seconds * FRAMES_PER_SECOND)
        self.parts: list[SpeechPart] = []
        self._limit: StopReason = "end"
        self._current: Request | None = None
        self._begin()

    @property
    def is_done(self) -> bool:
        return self._current is None

    @property
    def is_complete(self) -> bool:
        """Every part of the text was begun."""
        return len(self.parts) == len(self._texts)

    def codes(self) -> np.ndarray:
        """Codes [8, T] of the part that is being spoken, so far."""
        assert self._current is not None
        return self._current.speech().codes

    def follow(self) -> SpeechPart | None:
        """After the engine has advanced: the part that is over now, if one is; the next one is submitted."""
        if self._current is None or not self._current.is_done:
            return None
        speech = self._current.speech()
        reason: StopReason = "end" if speech.stopped else "cancelled" if self._current.is_cancelled else self._limit
        part = SpeechPart(self._texts[len(self.parts)], speech.codes, reason)
        self.parts.append(part)
        if self._frames_left is not None:
            self._frames_left -= speech.codes.shape[1]
        is_cancelled = self._current.is_cancelled
        self._current = None
        is_out_of_time = self._frames_left is not None and self._frames_left <= 0
        if reason in ("end", "text_ceiling") and not self.is_complete and not is_cancelled:
            if is_out_of_time:
                self.parts[-1] = SpeechPart(part.text, part.codes, "max_seconds")
            else:
                self._begin()
        self._report(self.parts[-1])
        return self.parts[-1]

    def cancel(self) -> None:
        """Its slot is free from the engine's next block on; what was said stays."""
        if self._current is not None:
            self._current.cancel()
            self.follow()

    def _begin(self) -> None:
        text = self._texts[len(self.parts)]
        frames = round(longest_s(text, self._speaker.rules) * FRAMES_PER_SECOND)
        self._limit = "text_ceiling"
        if self._frames_left is not None and self._frames_left < frames:
            frames, self._limit = self._frames_left, "max_seconds"
        prompt = self._speaker.part_prompt(self._reference, text)
        self._current = self._engine.submit(Request(prompt, frames, self._sampling))

    def _report(self, part: SpeechPart) -> None:
        seconds = part.codes.shape[1] / FRAMES_PER_SECOND
        shown = part.text.strip()[:40]
        if part.stop_reason == "text_ceiling":
            log.warning("no end after %.1f s, more than %r can last: cut there; try another seed", seconds, shown)
        elif part.stop_reason == "max_seconds":
            unsaid = sum(len(text) for text in self._texts[len(self.parts) :])
            log.warning(
                "cut at max_seconds, after %.1f s of %r; %d more characters were not begun", seconds, shown, unsaid
            )
        elif not part.codes.shape[1]:
            log.warning("the model ended %r before its first sound; try another seed or a lower temperature", shown)


def sampling_of(request: SpeechRequest) -> Sampling:
    return Sampling(
        float(request.temperature),
        int(request.top_k),
        float(request.top_p),
        int(request.ras_win_len),
        int(request.ras_win_max_num_repeat),
        int(request.seed),
    )
