"""A multipart form, held in memory: the guard has bounded its body. In: a request. Out: its texts and files by field name.

Starlette would put a file of more than a megabyte on disk, where a full one ends the request and a stranger's recording may stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tools.serve.api_errors import ApiError
from tools.serve.limits import MAX_FIELD_BYTES, MAX_FORM_PARTS

if TYPE_CHECKING:
    from starlette.requests import Request


@dataclass(frozen=True)
class Upload:
    data: bytes
    media_type: str  # as the client calls it; nothing here believes it


@dataclass(frozen=True)
class Form:
    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, Upload] = field(default_factory=dict)


async def read_form(request: Request) -> Form:
    """Raises ApiError."""
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "expected a form: multipart/form-data")
    try:
        parser = MultiPartParser(
            request.headers,
            request.stream(),
            max_files=MAX_FORM_PARTS,
            max_fields=MAX_FORM_PARTS,
            max_part_size=MAX_FIELD_BYTES,
        )
        parser.spool_max_size = 1 << 40
        given = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}") from None
    except (ValueError, KeyError, AssertionError, LookupError) as error:
        raise ApiError(400, f"the form cannot be read: {type(error).__name__}") from None
    form = Form()
    try:
        for name, value in given.multi_items():
            if name in form.texts or name in form.files:
                raise ApiError(400, "the form holds a field twice")
            if isinstance(value, UploadFile):
                form.files[name] = Upload(await value.read(), (value.content_type or "")[:100])
            else:
                form.texts[name] = value
    finally:
        await given.close()
    return form
