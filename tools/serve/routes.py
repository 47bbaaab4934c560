"""The addresses that speak: /v1/audio/speech, /generate_speech, models, health and metrics.

In: requests that the guard has let through. Out: answers; every refusal is an ApiError. Handlers take Starlette's plain request
and parse it themselves, because FastAPI's own parsing would refuse what clients send beyond the documented fields.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tools.serve.api_errors import ApiError
from tools.serve.form import read_form
from tools.serve.reference_upload import checked_upload
from tools.serve.service import Service
from tools.serve.speech_answer import SpeechAnswer
from tools.serve.speech_fields import SAMPLER, a_text, from_json, speech_fields
from tools.serve.voice_store import MAX_REF_TEXT_CHARS

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

MODEL_NAMES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")  # accepted like any other, listed for clients that look


class SpeechRoutes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def speech(self, request: Request) -> SpeechAnswer:
        """POST /v1/audio/speech"""
        fields = speech_fields(from_json(await request.body()), self._service.limits)
        self._service.check_text(fields.request.target_text, "input")
        reference, facts, is_stand_in = await self._service.reference_of(fields)
        headers: dict[str, str] = {}
        if facts:
            headers["X-Voice"] = facts.id
        if is_stand_in:
            headers["X-Voice-Stand-In"] = "the default voice speaks: no voice of that name is stored here"
        if fields.ignored:
            headers["X-Ignored"] = ", ".join(fields.ignored)
        return SpeechAnswer(self._service, fields, reference, headers)

    async def generate_speech(self, request: Request) -> SpeechAnswer:
        """POST /generate_speech: a form with reference_audio, target_text and reference_text; the answer is sound.

        The texts may also stand in the query, where FastAPI puts plain parameters beside a file.
        """
        form = await read_form(request)
        given: dict[str, Any] = {**request.query_params, **form.texts}
        if "reference_audio" not in form.files:
            raise ApiError(400, "reference_audio is missing: a recording of the voice", param="reference_audio")
        if not str(given.get("target_text") or "").strip():
            raise ApiError(400, "target_text is missing: the text to be said", param="target_text")
        given["input"], text = given["target_text"], a_text(given, "reference_text", MAX_REF_TEXT_CHARS)
        given["response_format"] = given.get("response_format") or "wav"
        for name in (*SAMPLER, "max_seconds", "max_new_tokens"):
            if name in given:
                given[name] = number(given[name], name)
        given["stream"] = str(given.get("stream", "")).lower() in ("1", "true", "yes")
        fields = speech_fields({**given, "ref_audio": None, "voice": None, "speed": None}, self._service.limits)
        self._service.check_text(fields.request.target_text, "target_text")
        if text is not None:
            self._service.check_text(text, "reference_text")
        upload = form.files["reference_audio"]
        audio = await checked_upload(upload.data, self._service.limits, "reference_audio")
        return SpeechAnswer(self._service, fields, self._service.made_from(audio, text), {})

    async def models(self, request: Request) -> Response:
        """GET /v1/models and /v1/audio/models"""
        return json(
            {"object": "list", "data": [self._model(name) for name in (self._service.model_name, *MODEL_NAMES)]}
        )

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{name}"""
        name = request.path_params["name"]
        if name not in (self._service.model_name, *MODEL_NAMES):
            raise ApiError(404, "no such model; GET /v1/models lists them", param="model", code="model_not_found")
        return json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._service.created, "owned_by": "local"}

    async def health(self, request: Request) -> Response:
        """GET /health: 200 when a request would be spoken now."""
        state = self._service.queue.state
        return json({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics"""
        from starlette.responses import Response

        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def json(value: Any, status: int = 200) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status)


def number(text: Any, name: str) -> int | float:
    """A number of a form. Raises ApiError."""
    if isinstance(text, str) and re.fullmatch(r"-?[0-9]{1,19}", text):
        return int(text)
    if isinstance(text, str) and re.fullmatch(r"-?[0-9]{0,10}\.[0-9]{1,10}", text):
        return float(text)
    raise ApiError(400, f"{name}: expected a number", param=name)
