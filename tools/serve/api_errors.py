"""What a request gets that cannot be answered: OpenAI's error object, whose message the clients show to people.

In: a status and a line that says what was expected. Out: `{"error": {"message", "type", "param", "code"}}`. FastAPI's own
`{"detail": ...}` reaches users of the `openai` client as a bare number, so nothing here raises it.
"""

from __future__ import annotations

import logging
from typing import Any

from shards.errors import PipelineError
from shards.printable import first_line, printable

log = logging.getLogger("serve")

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
MAX_MESSAGE_CHARS = 600


class ApiError(Exception):
    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = printable(self.message)[:MAX_MESSAGE_CHARS]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def full(retry_after_s: int) -> ApiError:
    return ApiError(
        429,
        f"the queue is full; ask again in {retry_after_s} s",
        code="queue_full",
        headers={"Retry-After": str(retry_after_s)},
    )


def unavailable(why: str, retry_after_s: int = 5) -> ApiError:
    return ApiError(503, why, code="unavailable", headers={"Retry-After": str(retry_after_s)})


def as_api_error(error: Exception) -> ApiError:
    """A fault of the request as 400; one of ours as 500, logged, whose words stay here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PipelineError):
        return ApiError(400, first_line(error))
    log.error("a request met a fault: %s", type(error).__name__, exc_info=error)
    return ApiError(500, f"a fault of the server: {type(error).__name__}")
