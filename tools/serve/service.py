"""What the routes share: the queue, the voices, the limits, and which voice a request means.

In: checked fields. Out: a function that makes the reference in the model's thread. The surprising rule: one of OpenAI's own voice
names, or none, is spoken in the default voice and says so in a header, because clients send such names without being asked; any
other name that is not here is a 404, because a wrong voice is worse than none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tools.serve.api_errors import ApiError, as_api_error, unavailable
from tools.serve.limits import Limits
from tools.serve.metrics import Metrics
from tools.serve.reference_upload import checked_upload, referenced_bytes
from tools.serve.speech_fields import SpeechFields
from tools.serve.speech_queue import SpeechQueue
from tools.serve.voice_names import OPENAI_VOICES
from tools.serve.voice_store import VoiceFacts, VoiceStore, no_such_voice

if TYPE_CHECKING:
    from preprocess.audio import AudioFile
    from tools.reference import Reference
    from tools.speaker import Speaker


@dataclass(eq=False)
class Service:
    queue: SpeechQueue
    voices: VoiceStore
    limits: Limits = field(default_factory=Limits)
    model_name: str = "voice"
    created: int = 0  # of the model, seconds of the epoch
    default_voice: str = ""  # a name; "": the oldest
    unknown_voice: str = "default"  # what OpenAI's names get: "default" or "error"
    allowed_hosts: frozenset[str] = frozenset()  # whose addresses ref_audio may name
    api_key: str = ""

    def __post_init__(self) -> None:
        self.metrics.gauge("voices", lambda: len(self.voices))

    @property
    def metrics(self) -> Metrics:
        return self.queue.metrics

    def speaker(self) -> Speaker:
        if self.queue.speaker is None:
            raise unavailable("the model is being loaded")
        return self.queue.speaker

    def check_text(self, text: str, param: str) -> None:
        """Before it waits in the queue. Raises ApiError."""
        from shards.errors import DataError
        from tools.prompt_text import prompt_text

        try:
            prompt_text(text, self.speaker().rules, param)
        except DataError as error:
            raise ApiError(400, str(error), param=param) from None

    async def reference_of(
        self, fields: SpeechFields
    ) -> tuple[Callable[[Speaker], Reference], VoiceFacts | None, bool]:
        """(what makes the reference, the stored voice, whether it stands for another name). Raises ApiError."""
        if fields.ref_audio is not None:
            if fields.ref_text is not None:
                self.check_text(fields.ref_text, "ref_text")
            data = await referenced_bytes(fields.ref_audio, self.limits, self.allowed_hosts)
            audio = await checked_upload(data, self.limits, "ref_audio")
            return self.made_from(audio, fields.ref_text), None, False
        facts, is_stand_in = self.voice(fields.voice)
        return lambda speaker: self.voices.reference(facts, speaker), facts, is_stand_in

    @staticmethod
    def made_from(audio: AudioFile, text: str | None) -> Callable[[Speaker], Reference]:
        return lambda speaker: speaker.reference([audio], text)

    def voice(self, name: str | None) -> tuple[VoiceFacts, bool]:
        """Raises ApiError."""
        if name is not None and (found := self.voices.find(name)):
            return found, False
        may_stand_in = name is None or (
            name.casefold() in OPENAI_VOICES | {"default"} and self.unknown_voice == "default"
        )
        if not may_stand_in:
            raise no_such_voice()
        found = self.voices.find(self.default_voice) if self.default_voice else next(iter(self.voices.all()), None)
        if found is None:
            raise ApiError(
                404,
                "no voice is stored that could speak; upload one to /v1/audio/voices, or send ref_audio",
                param="voice",
                code="voice_not_found",
            )
        return found, True

    async def in_model_thread(self, errand: Callable[[Speaker], Any]) -> Any:
        """Raises ApiError."""
        try:
            return await asyncio.wrap_future(self.queue.ask(errand))
        except Exception as error:
            raise as_api_error(error) from None
