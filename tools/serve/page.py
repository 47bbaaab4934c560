"""The page at / and its two files, read once. In: nothing. Out: routes. A path of a request never names a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute

FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src blob: data:; img-src data: blob:; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


def page_routes() -> list[BaseRoute]:
    from starlette.responses import Response
    from starlette.routing import Route

    folder = Path(__file__).with_name("page")

    def route(address: str, name: str, media_type: str) -> Route:
        content = (folder / name).read_bytes()
        headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

        async def show(request: Request) -> Response:
            return Response(content, media_type=media_type, headers=headers)

        return Route(address, show, methods=["GET"])

    return [route(address, *file) for address, file in FILES.items()]
