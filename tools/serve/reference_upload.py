"""Bytes from a stranger as a checked recording of a voice. In: an upload or a `data:` URL. Out: an `AudioFile`, or an ApiError.

The checks are stage one's (`tools.reference`), behind two of a server: size, and what a header promises. No name, path or address
of the request is ever opened; an address is fetched only from hosts that the operator has named, without following it elsewhere.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shards.errors import DataError
from tools.serve.api_errors import ApiError
from tools.serve.limits import MAX_SAMPLES_PER_S, Limits

if TYPE_CHECKING:
    from preprocess.audio import AudioFile

DATA_URL = re.compile(r"data:(?P<type>[^,;]{0,100})(?P<parameters>(?:;[^,;]{0,100}){0,4}),", re.ASCII)
FETCH_TIMEOUT_S = 10.0
# What decodes hold in memory adds up; and sound is encoded in other threads, so no stream waits for uploads.
DECODING = ThreadPoolExecutor(2, "upload")
FETCHING = ThreadPoolExecutor(4, "fetch")


async def checked_upload(data: bytes, limits: Limits, param: str) -> AudioFile:
    """Raises ApiError."""
    return await asyncio.get_running_loop().run_in_executor(DECODING, read_upload, data, limits, param)


def read_upload(data: bytes, limits: Limits, param: str) -> AudioFile:
    """Decode and check; for a thread that may wait. Raises ApiError."""
    import soundfile

    from tools.reference import read_recordings

    if not data:
        raise ApiError(400, f"{param} is empty; send a recording of the voice", param=param)
    if len(data) > limits.max_upload_bytes:
        raise too_large(param, limits)
    try:
        form = soundfile.info(io.BytesIO(data))
        samples_per_s = form.samplerate * form.channels
    except (RuntimeError, ValueError, TypeError):  # another kind, or none: the decoder says which
        samples_per_s = 0
    if samples_per_s > MAX_SAMPLES_PER_S:
        problem = f"{param}: {samples_per_s} samples a second in its header, at most {MAX_SAMPLES_PER_S}"
        raise ApiError(400, f"{problem}; convert it to 24 kHz mono", param=param)
    try:
        audio = read_recordings([data])[0]
    except DataError as error:
        detail = str(error).removeprefix("reference number 1: ")
        raise ApiError(400, f"{param}: {detail}", param=param, code="unusable_audio") from None
    if audio.measures.duration_s > limits.max_reference_s:
        problem = f"{param}: {audio.measures.duration_s:.1f} s, at most {limits.max_reference_s:g} s here"
        raise ApiError(400, f"{problem}; cut out the clip of the voice", param=param)
    return audio


def too_large(param: str, limits: Limits) -> ApiError:
    most = f"{limits.max_upload_bytes / (1 << 20):g} MB"
    return ApiError(413, f"{param}: more than {most}; cut out the clip of the voice", param=param, code="too_large")


async def referenced_bytes(address: str, limits: Limits, allowed_hosts: frozenset[str]) -> bytes:
    """What `ref_audio` names: a `data:` URL, or an address at an allowed host. Raises ApiError."""
    if address[:5].lower() == "data:":
        return data_url_bytes(address, limits)
    scheme = address.partition(":")[0].lower()
    if scheme in ("http", "https"):
        fetching = asyncio.get_running_loop().run_in_executor(FETCHING, fetched, address, limits, allowed_hosts)
        try:
            return await asyncio.wait_for(fetching, FETCH_TIMEOUT_S)
        except TimeoutError:
            raise ApiError(400, f"ref_audio: not fetched within {FETCH_TIMEOUT_S:g} s", param="ref_audio") from None
    raise ApiError(
        400, "ref_audio: expected a data: URL with base64; no file or address of a request is opened", param="ref_audio"
    )


def data_url_bytes(address: str, limits: Limits) -> bytes:
    found = DATA_URL.match("data:" + address[5:])
    if not found or not found["parameters"].lower().endswith(";base64"):
        raise ApiError(400, "ref_audio: expected data:audio/wav;base64,...", param="ref_audio")
    coded = address[found.end() :]
    if len(coded) > limits.max_upload_bytes * 4 // 3 + 4:
        raise too_large("ref_audio", limits)
    try:
        return base64.b64decode(coded, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "ref_audio: not base64", param="ref_audio") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


def read_within(answer: Any, most: int) -> bytes:
    """A host that sends byte by byte is given up as well; a socket's timeout would begin anew with every byte."""
    end, data = time.monotonic() + FETCH_TIMEOUT_S, bytearray()
    while len(data) < most and time.monotonic() < end:
        piece = answer.read1(min(1 << 16, most - len(data)))
        if not piece:
            return bytes(data)
        data += piece
    if len(data) < most:
        raise TimeoutError
    return bytes(data)


def fetched(address: str, limits: Limits, allowed_hosts: frozenset[str]) -> bytes:
    """For a thread that may wait. Raises ApiError."""
    try:
        parts = urlsplit(address)
        host = (parts.hostname or "").lower()
        named = f"{host}:{parts.port}" if parts.port else host
    except ValueError:
        host = named = ""
    if not host or named not in allowed_hosts or "@" in address.partition("//")[2].partition("/")[0]:
        raise ApiError(
            400, "ref_audio: this server fetches no address of that host; send a data: URL", param="ref_audio"
        )
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(address), timeout=FETCH_TIMEOUT_S) as answer:
            data = read_within(answer, limits.max_upload_bytes + 1)
    except urllib.error.HTTPError as error:
        raise ApiError(400, f"ref_audio: its host answered {error.code}", param="ref_audio") from None
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise ApiError(400, f"ref_audio: could not be fetched: {type(error).__name__}", param="ref_audio") from None
    if len(data) > limits.max_upload_bytes:
        raise too_large("ref_audio", limits)
    return data
