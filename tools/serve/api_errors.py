"""What a request gets that cannot be answered: OpenAI's error object, whose message the clients show to people.

In: a status and a line that says what was expected. Out: `{"error": {"message", "type", "param", "code"}}`. FastAPI's own
`{"detail": ...}` reaches users of the `openai` client as a bare number, so nothing here raises it.
"""

from __future__ import annotations

from typing import Any

from shards.printable import printable

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
