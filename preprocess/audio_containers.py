"""What containers state about their length: sizes that a pipe could not fill in are repaired, missing bytes are named.

In: a file's bytes. Out: the bytes with a true data size (`repaired`), or what is missing of a stated one (`missing`). A
size of 0, of 4 GiB or just below 2 GiB is what ffmpeg, sox and arecord write into a pipe: it states nothing. The price: a
wav from a pipe that was cut off cannot be told from a whole one.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator

MAX_CHUNKS = 10000
OGG_HEADER, OGG_BEGINS, OGG_ENDS = 27, 2, 4  # bytes; flags of a page
MAX_TAIL = 4096  # bytes behind the samples of a wav that are nobody's concern
SEPARATE = "make it one file again: ffmpeg -i FILE FILE.flac, or cut it"


def repaired(data: bytes) -> bytes:
    """A wav whose data size states nothing, with the size of the bytes that are there; anything else as it is."""
    if data[:4] not in (b"RIFF", b"RIFX") or data[8:12] != b"WAVE":
        return data
    order = ">" if data[:4] == b"RIFX" else "<"
    for name, position, size in _riff_chunks(data, order):
        there = len(data) - position - 8
        if name == b"data" and _states_nothing(data, position, size):
            return data[: position + 4] + struct.pack(order + "I", there) + data[position + 8 :]
    return data


def missing(data: bytes) -> str | None:
    """What the container states and the file does not have, in words; None for a whole file or an unknown container."""
    if data[:4] == b"OggS":
        return _missing_ogg(data)
    stated = _stated_end(data)
    lost = stated - len(data) if stated else 0
    return f"{lost} bytes fewer than its header says" if lost > 1 else None  # a lost pad byte is harmless


def _stated_end(data: bytes) -> int:
    """Where the samples end by the header; 0 where it states nothing."""
    form = data[8:12]
    if data[:4] in (b"RIFF", b"RIFX") and form == b"WAVE":
        for name, position, size in _riff_chunks(data, ">" if data[:4] == b"RIFX" else "<"):
            if name == b"data":
                return 0 if _states_nothing(data, position, size) else position + 8 + size
    elif data[:4] == b"RF64" and data[12:16] == b"ds64" and len(data) >= 36:
        size = int.from_bytes(data[28:36], "little")
        for name, position, _ in _riff_chunks(data, "<"):
            if name == b"data":
                return position + 8 + size if 0 < size < 1 << 62 else 0
    elif data[:4] == b"FORM" and form in (b"AIFF", b"AIFC"):
        for name, position, size in _riff_chunks(data, ">"):
            if name == b"SSND":
                return position + 8 + size if 0 < size < 0x7FFF0000 else 0
    elif data[:4] == b".snd" and len(data) >= 12:
        offset, size = struct.unpack_from(">II", data, 4)
        return offset + size if 0 < size < 0x7FFF0000 else 0
    elif data[:4] == b"caff":
        return _caf_end(data)
    return 0


def _riff_chunks(data: bytes, order: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, position, size) of the chunks of a RIFF or FORM file."""
    position = 12
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        name, size = struct.unpack_from(f"{order}4sI", data, position)
        yield name, position, size
        if data[:4] == b"RF64" and size == 0xFFFFFFFF:
            return
        position += 8 + size + size % 2


def _states_nothing(data: bytes, position: int, size: int) -> bool:
    """Whether a wav's data size is one that was never filled in."""
    if size:
        return 0x7FFF0000 <= size <= 0x8000FFFF or size >= 0xFFFF0000
    behind = data[position + 8 : position + 16]
    is_chunk = len(behind) == 8 and behind[:4].isalnum()  # an empty data chunk with another chunk behind it
    return bool(behind) and not (
        is_chunk and position + 16 + int.from_bytes(behind[4:], "little") in range(len(data) - 1, len(data) + 1)
    )


def _caf_end(data: bytes) -> int:
    position = 8
    for _ in range(MAX_CHUNKS):
        if position + 12 > len(data):
            return 0
        name, size = struct.unpack_from(">4sq", data, position)
        if name == b"data":
            return position + 12 + size if size > 0 else 0  # -1: unknown
        if size < 0:
            return 0
        position += 12 + size
    return 0


def _missing_ogg(data: bytes) -> str | None:
    """An Ogg file cut between pages decodes without a complaint, but its last page lacks the end-of-stream flag."""
    _, flags, end = deque(_ogg_pages(data), maxlen=1)[0]
    if end > len(data):
        return "its last Ogg page is not whole"
    return None if flags & OGG_ENDS else "its last Ogg page does not end the stream"


def _ogg_pages(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(position, flags, end) of every page; the last one may end behind the file."""
    position = 0
    while position < len(data):
        if data[position : position + 4] != b"OggS":
            position = data.find(b"OggS", position + 1)
            if position < 0:
                return  # a tag, or padding, behind the last page
            continue
        num_lengths = data[position + 26] if position + OGG_HEADER <= len(data) else 0
        begin = position + OGG_HEADER + num_lengths
        end = begin + sum(data[position + OGG_HEADER : begin])
        yield position, data[position + 5] if len(data) > position + 5 else 0, end
        position = end


def unread(data: bytes) -> str | None:
    """Sound that stands in the file and that no decoder reads, in words: it would be missing under the row's text.

    Joined files decode like the first one alone, and a recorder that was killed leaves the size of its last save.
    """
    if data[:4] == b"OggS":
        has_begun = False
        for position, flags, _ in _ogg_pages(data):
            if has_begun and flags & OGG_BEGINS:
                return f"a second recording begins at byte {position} of an Ogg file; {SEPARATE}"
            has_begun = has_begun or not flags & OGG_BEGINS
    elif data[4:8] == b"ftyp":
        places = [position for name, position in _mp4_boxes(data) if name == b"ftyp"]
        if len(places) > 1:
            return f"a second recording begins at byte {places[1]} of an mp4 file; {SEPARATE}"
    elif data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        end = _stated_end(data)
        behind = data[end + end % 2 :] if end else b""
        if len(behind) > MAX_TAIL and any(behind[MAX_TAIL:]) and not _is_chunk(behind):
            return f"{len(behind)} bytes stand behind the samples that its header counts; {SEPARATE}"
    return None


def _is_chunk(data: bytes) -> bool:
    """Whether a chunk, or a tag of another kind, begins there."""
    if data[:3] in (b"TAG", b"ID3") or data[:8] == b"APETAGEX":
        return True
    name = data[:4]
    is_name = name.isascii() and name.decode("ascii").isprintable() and name not in (b"RIFF", b"RIFX")
    return is_name and int.from_bytes(data[4:8], "little") <= len(data) - 7


def _mp4_boxes(data: bytes) -> Iterator[tuple[bytes, int]]:
    """(name, position) of the boxes of an mp4 file, without those inside them."""
    position = 0
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        size, name = struct.unpack_from(">I4s", data, position)
        yield name, position
        if size == 1:  # a larger one follows
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        if size < 8:  # 0: to the end of the file
            return
        position += size
