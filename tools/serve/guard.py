"""What every request passes before a route sees it: an id, the key, where it comes from, how long it may be; and the log line.

In: ASGI. Out: the same, or an answer in OpenAI's error form. A page of another site can send to 127.0.0.1 what a browser calls a
simple request, so an Origin that is neither this server nor a named one is refused even where no key is asked for. Without a key
on a loopback address the Host must be a loopback name: another name that resolves to it is somebody's trick.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from tools.serve.api_errors import ApiError, as_api_error, unavailable
from tools.serve.limits import BODIES_AT_ONCE, Limits
from tools.serve.metrics import Metrics
from tools.serve.speech_answer import Broken, ClientLeft

log = logging.getLogger("serve.access")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Asked by clients without their key: Open WebUI lists voices so. /health, /metrics and the page are no part of the API.
WITHOUT_KEY = frozenset({("GET", "/v1/audio/voices"), ("GET", "/v1/audio/models")})
ROUTES = frozenset(
    {
        "/",
        "/page.css",
        "/page.js",
        "/health",
        "/metrics",
        "/generate_speech",
        "/v1/models",
        "/v1/audio/models",
        "/v1/audio/voices",
        "/v1/audio/speech",
    }
)
PREFIXES = ("/v1/audio/voices/", "/v1/models/")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
DRAINED, DRAIN_S = 8, 10.0  # of a body that is too long: so many times what is allowed, so many seconds
CORS_HEADERS = "authorization, content-type, x-request-id"
EXPOSED = "x-request-id, x-seed, x-stopped, x-voice, x-voice-stand-in, retry-after"

App = Callable[[dict[str, Any], Callable, Callable], Awaitable[None]]


@dataclass(frozen=True)
class Rules:
    api_key: str = ""
    cors_origins: frozenset[str] = frozenset()
    hosts: frozenset[str] | None = None  # names the Host header may have; None: any
    limits: Limits = field(default_factory=Limits)


class Guard:
    def __init__(self, app: App, rules: Rules, metrics: Metrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics
        self._held_bytes = 0  # of bodies, until their requests are answered

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1003})
                return
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 0
        body = Body(self, receive)

        async def answer(message: dict[str, Any]) -> None:
            nonlocal status
            if body.has_left:
                raise ClientLeft
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                more += self._cors(headers)
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        try:
            try:
                self._check(scope, headers)
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    await answer({"type": "http.response.start", "status": 204, "headers": preflight()})
                    await answer({"type": "http.response.body", "body": b""})
                else:
                    await self._app(scope, body.receive, answer)
            except ApiError as error:
                if status:
                    raise Broken(error.message) from None
                if error.status == 413:
                    await self._drain(receive)
                await send_error(answer, error)
        except (ClientLeft, Broken) as error:
            status = status or 499
            log.info("%s %s", request_id, "the client left" if isinstance(error, ClientLeft) else "cut off")
        except Exception as error:
            fault = as_api_error(error)
            if not status:
                await send_error(answer, fault)
        except asyncio.CancelledError:  # the server ends and has waited long enough for this body
            if not status:
                await send_error(answer, unavailable("the server is stopping"))
            raise
        finally:
            self._held_bytes -= body.num_bytes
            route = known_route(scope["path"])
            self._metrics.count("requests_total", route=route, status=str(status))
            took_ms = (time.monotonic() - started) * 1000
            log.info("%s %s %s %d %.0f ms", request_id, scope["method"][:10], route, status, took_ms)

    def _check(self, scope: dict[str, Any], headers: dict[str, str]) -> None:
        rules = self._rules
        host = headers.get("host", "")
        if rules.hosts is not None and bare_host(host) not in rules.hosts:
            raise ApiError(403, "this Host is not served without a key; start with --allowed-host or --api-key-file")
        origin = headers.get("origin")
        if origin is not None and origin not in rules.cors_origins and not is_same(origin, host):
            raise ApiError(403, "requests of this Origin are not allowed; start with --cors-origin")
        path = scope["path"]
        is_api = path.startswith("/v1") or path.startswith("/generate_speech")
        is_preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        needs_key = rules.api_key and is_api and not is_preflight and (scope["method"], path) not in WITHOUT_KEY
        if needs_key and not has_key(headers, rules.api_key):
            raise ApiError(
                401,
                "Incorrect API key provided; send it as: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "bodies are not decompressed; send it as it is")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > rules.limits.max_body_bytes:
            raise too_long(rules.limits)

    async def _drain(self, receive: Callable) -> None:
        """Read on for a while: a connection that is closed with unread bytes is reset, and its answer lost."""
        left = DRAINED * self._rules.limits.max_body_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    def _cors(self, headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
        origin = headers.get("origin")
        if origin is None or origin not in self._rules.cors_origins:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", EXPOSED.encode()),
            (b"vary", b"Origin"),
        ]


class Body:
    """A request's body while it comes: counted, because its length may not be stated, and not waited for without end."""

    def __init__(self, guard: Guard, receive: Callable) -> None:
        self._guard, self._receive, self._limits = guard, receive, guard._rules.limits
        self._ends = time.monotonic() + self._limits.max_body_s
        self._is_whole = False
        self.has_left = False  # before the body was whole
        self.num_bytes = 0

    async def receive(self) -> dict[str, Any]:
        """Raises ApiError, and ClientLeft where the client goes before the body is whole."""
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout(min(self._limits.max_body_pause_s, self._ends - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            told = "the body did not come in time; send it again, on a better line or smaller"
            raise ApiError(408, told, code="slow_body", headers={"Connection": "close"}) from None
        if message["type"] == "http.disconnect":
            self.has_left = True
            raise ClientLeft
        self._is_whole = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self.num_bytes += size
        self._guard._held_bytes += size
        if self.num_bytes > self._limits.max_body_bytes:
            raise too_long(self._limits)
        if self._guard._held_bytes > BODIES_AT_ONCE * self._limits.max_body_bytes:
            raise unavailable("too many uploads at once")
        return message


def too_long(limits: Limits) -> ApiError:
    most = f"{limits.max_body_bytes / (1 << 20):.1f} MB"
    return ApiError(413, f"the body has more than {most}", code="too_large", headers={"Connection": "close"})


def known_route(path: str) -> str:
    """What logs and metrics call an address: one of a fixed set, never a request's own words."""
    if path in ROUTES:
        return path
    return next((f"{prefix}..." for prefix in PREFIXES if path.startswith(prefix)), "unknown")


def preflight() -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", CORS_HEADERS.encode()),
        (b"access-control-max-age", b"600"),
    ]


def has_key(headers: dict[str, str], api_key: str) -> bool:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), api_key.encode())


def bare_host(host: str) -> str:
    """Without the port: [::1]:8000 is ::1."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def is_same(origin: str, host: str) -> bool:
    """Whether a browser's Origin is the server that it asks; behind a proxy for https the scheme differs."""
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and bool(place) and place.lower() == host.lower()


async def send_error(send: Callable, error: ApiError) -> None:
    body = msgspec.json.encode(error.body())
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
