"""The answer to a request for speech: a whole body, a stream of bytes, or server-sent events.

In: a job's events, from the model's thread. Out: ASGI messages. Headers go out when the text and the voice are known to be sound
and a slot is taken, so whatever can be refused is refused with its status; a fault behind that cuts the connection (bytes) or is
the last event (SSE). Whichever way an answer ends, its job is cancelled: a client that leaves frees its slot at the next block.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from shards.sequence import FRAMES_PER_SECOND
from tools.serve.api_errors import ApiError
from tools.serve.service import Service
from tools.serve.sound_formats import FORMATS, Encoder, encoded
from tools.serve.speech_fields import SpeechFields
from tools.serve.speech_job import Ended, Event, Failed, Job, Sound, Started, stop_reason

if TYPE_CHECKING:
    from tools.reference import Reference
    from tools.speaker import Speaker

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class ClientLeft(Exception):
    """Nobody is there to be answered."""


class Broken(Exception):
    """Headers are out, the rest will not come: the server closes the connection without an end of the body."""


class SpeechAnswer:
    """An ASGI response; it asks for nothing before it is called."""

    def __init__(
        self,
        service: Service,
        fields: SpeechFields,
        reference: Callable[[Speaker], Reference],
        headers: dict[str, str],
    ) -> None:
        self._service, self._fields = service, fields
        self._headers = headers | {"X-Seed": str(fields.request.seed), "Cache-Control": "no-store"}
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and whoever waited in it
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._job = Job(fields.request, reference, deliver, in_windows=fields.stream is not None)
        service.queue.submit(self._job)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Raises ApiError before anything is sent."""
        answer = asyncio.ensure_future(self._answer(send))
        left = asyncio.ensure_future(until_left(receive))
        try:
            await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientLeft
            await answer
        finally:
            self._service.queue.cancel(self._job)
            for task in (answer, left):
                task.cancel()
            await asyncio.gather(answer, left, return_exceptions=True)

    async def _answer(self, send: Send) -> None:
        if self._fields.stream == "sse":
            await self._send_events(send)
        elif self._fields.stream:
            await self._send_stream(send)
        else:
            await self._send_whole(send)

    async def _sounds(self) -> AsyncIterator[np.ndarray | Ended]:
        """Raises ApiError."""
        while True:
            event = await self._events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Sound):
                yield event.wave
            elif isinstance(event, Ended):
                yield event
                return

    async def _send_whole(self, send: Send) -> None:
        waves, reason = [], "end"
        async for one in self._sounds():
            if isinstance(one, Ended):
                reason = stop_reason(one)
            else:
                waves.append(one)
        body = await asyncio.to_thread(encoded, self._fields.sound_format, waves)
        more = {"X-Stopped": reason, "Content-Length": str(len(body))}
        await self._begin(send, FORMATS[self._fields.sound_format].media_type, more)
        await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send) -> None:
        await self._started()
        encoder = Encoder(self._fields.sound_format)
        try:
            await self._begin(send, FORMATS[self._fields.sound_format].media_type)
            async for one in self._sounds():
                if not isinstance(one, Ended) and (data := await asyncio.to_thread(encoder.feed, one)):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            last = await asyncio.to_thread(encoder.finish)
            await send({"type": "http.response.body", "body": last})
        except ApiError as error:
            raise Broken(error.message) from None
        finally:
            encoder.close()

    async def _send_events(self, send: Send) -> None:
        await self._started()
        encoder = Encoder(self._fields.sound_format)

        async def event(value: dict[str, Any], more: bool = True) -> None:
            data = b"data: " + msgspec.json.encode(value) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def delta(data: bytes) -> None:
            if data:
                await event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})

        try:
            await self._begin(send, "text/event-stream; charset=utf-8")
            ended: Ended | None = None
            async for one in self._sounds():
                if isinstance(one, Ended):
                    ended = one
                else:
                    await delta(await asyncio.to_thread(encoder.feed, one))
            assert ended is not None
            await delta(await asyncio.to_thread(encoder.finish))
            await event(
                {"type": "speech.audio.done", "usage": usage(self._fields, ended)} | end_facts(ended), more=False
            )
        except ApiError as error:
            await event({"type": "speech.audio.error"} | error.body(), more=False)
        finally:
            encoder.close()

    async def _started(self) -> None:
        """Raises ApiError."""
        event = await self._events.get()
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Started)

    async def _begin(self, send: Send, media_type: str, more: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": media_type} | self._headers | (more or {})
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})


async def until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def usage(fields: SpeechFields, ended: Ended) -> dict[str, int]:
    """In characters and frames: this model has no other unit of either."""
    spoken = sum(part.codes.shape[1] for part in ended.parts)
    given = len(fields.request.target_text)
    return {"input_tokens": given, "output_tokens": spoken, "total_tokens": given + spoken}


def end_facts(ended: Ended) -> dict[str, Any]:
    frames = sum(part.codes.shape[1] for part in ended.parts)
    return {"stopped": stop_reason(ended), "audio_seconds": frames / FRAMES_PER_SECOND}
