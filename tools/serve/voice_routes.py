"""Voices over HTTP: list, upload, delete, with the shapes that Open WebUI and vLLM-Omni's clients know.

In: forms. Out: JSON. Without the key the list holds ids and names only.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tools.serve.api_errors import ApiError
from tools.serve.form import read_form
from tools.serve.guard import has_key
from tools.serve.reference_upload import checked_upload
from tools.serve.routes import json
from tools.serve.service import Service
from tools.serve.voice_names import MAX_NAME_CHARS
from tools.serve.voice_store import MAX_DESCRIPTION_CHARS, MAX_REF_TEXT_CHARS, VoiceFacts, new_facts

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


class VoiceRoutes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def collection(self, request: Request) -> Response:
        """One route for both methods: the answer to a third one names them all."""
        return await (self.upload(request) if request.method == "POST" else self.voices(request))

    async def voices(self, request: Request) -> Response:
        """GET /v1/audio/voices"""
        stored = self._service.voices.all()
        answer: dict[str, Any] = {"voices": [{"id": one.id, "name": one.name} for one in stored]}
        key = self._service.api_key
        if not key or has_key(dict(request.headers), key):
            answer["uploaded_voices"] = [shown(one) for one in stored]
        return json(answer)

    async def upload(self, request: Request) -> Response:
        """POST /v1/audio/voices"""
        service = self._service
        form = await read_form(request)
        if "audio_sample" not in form.files:
            raise ApiError(400, "audio_sample is missing: a file with the recording of the voice", param="audio_sample")
        name = service.voices.check_name(text_of(form.texts, "name", MAX_NAME_CHARS, required=True))
        consent = text_of(form.texts, "consent", MAX_NAME_CHARS, required=True)
        ref_text = text_of(form.texts, "ref_text", MAX_REF_TEXT_CHARS) or None
        if ref_text is not None:
            service.check_text(ref_text, "ref_text")
        upload = form.files["audio_sample"]
        audio = await checked_upload(upload.data, service.limits, "audio_sample")
        make = service.made_from(audio, ref_text)
        reference, codec = await service.in_model_thread(lambda speaker: (make(speaker), service.voices.probe(speaker)))
        facts = new_facts(
            name,
            audio,
            consent=consent,
            ref_text=ref_text,
            speaker_description=text_of(form.texts, "speaker_description", MAX_DESCRIPTION_CHARS),
            mime_type=upload.media_type,
            file_size=len(upload.data),
            codec=codec,
        )
        try:
            facts = await asyncio.to_thread(service.voices.add, facts, upload.data, reference.codes, reference)
        except OSError as error:
            raise ApiError(507, f"the voice could not be stored: {error.strerror}") from None
        return json({"success": True, "voice": shown(facts)})

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/audio/voices/{name}: a name or an id."""
        facts = await asyncio.to_thread(self._service.voices.remove, request.path_params["name"])
        return json({"success": True, "message": f"Voice '{facts.name}' deleted", "id": facts.id, "deleted": True})


def shown(facts: VoiceFacts) -> dict[str, Any]:
    return {
        "id": facts.id,
        "name": facts.name,
        "consent": facts.consent,
        "created_at": facts.created_at,
        "mime_type": facts.mime_type,
        "file_size": facts.file_size,
        "ref_text": facts.ref_text,
        "speaker_description": facts.speaker_description,
        "duration_s": facts.duration_s,
    }


def text_of(texts: dict[str, str], name: str, most: int, *, required: bool = False) -> str:
    text = texts.get(name, "").strip()
    if required and not text:
        expected = {
            "name": "what to call the voice",
            "consent": "who has agreed that this voice is cloned, or an id of it",
        }
        raise ApiError(400, f"{name} is missing: {expected.get(name, 'a text')}", param=name)
    if len(text) > most:
        raise ApiError(400, f"{name}: {len(text)} characters, at most {most}", param=name)
    return text
