"""What a request for speech says: OpenAI's fields, vLLM-Omni's, and the sampler's, from JSON or a form.

In: a mapping. Out: `SpeechFields`, all of it checked. Fields that nobody knows are accepted, because clients send some (LibreChat
`backend`, Home Assistant whatever its user has typed); those that are known and have no effect here are listed in `ignored`.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any

import msgspec

from shards.errors import ConfigError
from shards.sequence import FRAMES_PER_SECOND
from tools.serve.api_errors import ApiError
from tools.serve.limits import Limits
from tools.serve.sound_formats import FORMATS, NOT_MADE
from tools.serve.voice_store import MAX_REF_TEXT_CHARS
from tools.speech_request import SpeechRequest

WITHOUT_EFFECT = ("instructions", "language", "task_type", "x_vector_only_mode")
SAMPLER = ("temperature", "top_p", "top_k", "ras_win_len", "ras_win_max_num_repeat", "seed")
STREAM_FORMATS = ("audio", "sse")


@dataclass(frozen=True)
class SpeechFields:
    request: SpeechRequest  # without its reference
    sound_format: str
    stream: str | None  # "audio", "sse"; None: whole
    voice: str | None
    ref_audio: str | None
    ref_text: str | None
    ignored: tuple[str, ...]


def drawn_seed() -> int:
    """Of a request that names none."""
    return secrets.randbits(31)


def from_json(body: bytes) -> dict[str, Any]:
    """Raises ApiError."""
    try:
        given = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is not JSON that anybody needs: too deep") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"the body: expected a JSON object, got {type(given).__name__}")
    return given


def speech_fields(given: dict[str, Any], limits: Limits) -> SpeechFields:
    """Raises ApiError that names the field."""
    text = a_text(given, "input", limits.max_text_chars)
    if text is None or not text.strip():
        raise ApiError(400, "input is missing: the text to be said", param="input")
    settings = {name: given[name] for name in SAMPLER if given.get(name) is not None}
    settings.setdefault("seed", drawn_seed())
    try:
        request = SpeechRequest(
            reference_audio=None, target_text=text, max_seconds=max_seconds(given, limits), **settings
        )
    except ConfigError as error:
        raise ApiError(400, str(error), param=next(iter(str(error).split(" = ")), None)) from None
    check_speed(given.get("speed"))
    return SpeechFields(
        request,
        sound_format(given.get("response_format")),
        stream_of(given),
        voice_name(given.get("voice")),
        a_text(given, "ref_audio", limits.max_body_bytes),
        a_text(given, "ref_text", MAX_REF_TEXT_CHARS),
        tuple(name for name in WITHOUT_EFFECT if given.get(name) not in (None, "", "Auto", "auto")),
    )


def a_text(given: dict[str, Any], name: str, most: int) -> str | None:
    value = given.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ApiError(400, f"{name}: expected a string, got {type(value).__name__}", param=name)
    if len(value) > most:
        raise ApiError(400, f"{name}: {len(value)} characters, at most {most}", param=name, code="string_too_long")
    return value


def max_seconds(given: dict[str, Any], limits: Limits) -> float:
    """The request's own limit, in tokens (one is a frame of 40 ms) or seconds, and never more than the server's."""
    found = [limits.max_speech_s]
    for name, per_second in (("max_new_tokens", FRAMES_PER_SECOND), ("max_seconds", 1)):
        value = given.get(name)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not value / per_second >= 1 / FRAMES_PER_SECOND:
            raise ApiError(400, f"{name}: expected a number of at least one frame (40 ms)", param=name)
        found.append(value / per_second)
    return min(found)


def check_speed(value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and value == 1):
        raise ApiError(
            400, "speed: this model has one speed, 1.0; leave it out and let the player change it", param="speed"
        )


def sound_format(value: Any) -> str:
    if value is None or value == "":
        return "mp3"
    name = value.lower() if isinstance(value, str) else ""
    if name in FORMATS:
        return name
    known = ", ".join(FORMATS)
    why = NOT_MADE.get(name, "response_format: unknown")
    raise ApiError(400, f"{why}; known are {known}", param="response_format", code="unsupported_format")


def stream_of(given: dict[str, Any]) -> str | None:
    """`stream_format` asks for a stream, as OpenAI's clients do, unless `stream` says no; `stream` alone means bytes."""
    wanted, how = given.get("stream"), given.get("stream_format")
    if wanted is not None and not isinstance(wanted, bool):
        raise ApiError(400, "stream: expected true or false", param="stream")
    if how is not None and how not in STREAM_FORMATS:
        raise ApiError(400, f"stream_format: expected {' or '.join(STREAM_FORMATS)}", param="stream_format")
    if wanted is False:
        return None
    return how or ("audio" if wanted else None)


def voice_name(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("id")
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > 200:
        raise ApiError(400, 'voice: expected a name or {"id": ...}', param="voice")
    return value
