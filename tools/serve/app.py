"""The application: every address with its handler, behind the guard. In: a `Service`. Out: an ASGI application.

FastAPI's own pages are off: they load scripts from elsewhere, and describe none of the extended fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shards.errors import ConfigError
from tools.serve.api_errors import ApiError
from tools.serve.guard import Guard, Rules, send_error
from tools.serve.page import page_routes
from tools.serve.routes import SpeechRoutes
from tools.serve.service import Service
from tools.serve.voice_routes import VoiceRoutes

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.routing import BaseRoute


def make_app(service: Service, rules: Rules) -> Guard:
    """Raises ConfigError without the extra `serve`."""
    try:
        import python_multipart as _  # noqa: F401 - forms need it; starlette says so only when the first one comes
        from fastapi import FastAPI
        from starlette.exceptions import HTTPException
        from starlette.routing import Route
    except ImportError as error:
        raise ConfigError(f"serve needs {error.name}: pip install -e '.[serve]'") from None

    speech, voices = SpeechRoutes(service), VoiceRoutes(service)
    routes: list[BaseRoute] = [
        Route("/v1/audio/speech", speech.speech, methods=["POST"]),
        Route("/v1/audio/voices", voices.collection, methods=["GET", "POST"]),
        Route("/v1/audio/voices/{name}", voices.delete, methods=["DELETE"]),
        Route("/v1/audio/models", speech.models, methods=["GET"]),
        Route("/v1/models", speech.models, methods=["GET"]),
        Route("/v1/models/{name:path}", speech.model, methods=["GET"]),
        Route("/generate_speech", speech.generate_speech, methods=["POST"]),
        Route("/health", speech.health, methods=["GET"]),
        Route("/metrics", speech.metrics, methods=["GET"]),
        *page_routes(),
    ]
    app = FastAPI(routes=routes, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    async def refused(request: Request, error: Exception) -> ErrorAnswer:
        if isinstance(error, HTTPException):
            message = {404: "no such address", 405: "not with this method"}.get(error.status_code, str(error.detail))
            error = ApiError(error.status_code, message, headers=dict(error.headers or {}))
        elif not isinstance(error, ApiError):  # it goes on to the guard, which logs it
            error = ApiError(500, f"a fault of the server: {type(error).__name__}")
        return ErrorAnswer(error)

    app.add_exception_handler(ApiError, refused)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(HTTPException, refused)  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(Exception, refused)  # pyright: ignore[reportArgumentType]
    return Guard(app, rules, service.metrics)  # pyright: ignore[reportArgumentType]


class ErrorAnswer:
    def __init__(self, error: ApiError) -> None:
        self._error = error

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send_error(send, self._error)
