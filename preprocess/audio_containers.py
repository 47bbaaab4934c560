"""What containers state about their length: sizes that a pipe could not fill in are repaired, missing bytes are named.

In: a file's bytes. Out: the bytes with a true data size (`repaired`), or what is missing of a stated one (`missing`). A
size of 0, of 4 GiB or just below 2 GiB is what ffmpeg, sox and arecord write into a pipe: it states nothing. The price: a
wav from a pipe that was cut off looks like a complete one.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator

MAX_CHUNKS = 10000
OGG_HEADER, OGG_BEGINS, OGG_ENDS = 27, 2, 4  # bytes; flags of a page
JOIN_SEARCH = 256  # bytes behind the samples in which a joined file begins: padding stands between
MAX_TAIL = 4096  # bytes behind the samples of a wav that are nobody's concern
W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
FLV_TAGS = (8, 9, 18)  # audio, video, script
# A second header of these forms, in the place where the samples of the first file end, is another recording's.
JOINED = {
    b".snd": "an AU",
    b"caff": "a CAF",
    b"RF64": "an RF64",
    b"riff": "a W64",
    b"NIST": "a NIST",
    b"TTA1": "a True Audio",
}
SEPARATE = "make it one file again: ffmpeg -i FILE FILE.flac, or cut it"


def repaired(data: bytes) -> bytes:
    """A wav whose data size states nothing, with the size of the bytes that are there; anything else as it is."""
    if data[:4] == b"RF64" and data[8:12] == b"WAVE" and not _stated_end(data):
        data = b"RIFF" + data[4:]  # it holds less than 4 GiB, so a plain wav's size is enough
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
    elif data[:16] == W64_RIFF:
        return _w64_end(data)
    elif data[:8] == b"NIST_1A\n":
        return _nist_end(data)
    elif data[:4] == b"TTA1":
        return _tta_end(data)
    elif data[:4] == b"RIFF" and form == b"AVI ":
        size = int.from_bytes(data[4:8], "little")
        return 8 + size if 0 < size < 0x7FFF0000 else 0
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


def _w64_end(data: bytes) -> int:
    """Chunks of Sony's 64-bit wav have 16 bytes for a name, a size that counts their header, and begin at multiples of 8."""
    position = 40
    for _ in range(MAX_CHUNKS):
        if position + 24 > len(data):
            return 0
        size = int.from_bytes(data[position + 16 : position + 24], "little")
        if data[position : position + 4] == b"data":
            return position + size if 24 < size < 1 << 62 else 0
        if size < 24:
            return 0
        position += size + -size % 8
    return 0


def _nist_end(data: bytes) -> int:
    """NIST SPHERE: lines of `name -i number` in a header whose size stands on the second line."""
    try:
        head_bytes = int(data[8:16])
        fields = [line.split() for line in data[16:head_bytes].split(b"\n")]
        counts = {words[0]: int(words[2]) for words in fields if len(words) == 3 and words[1] == b"-i"}
        size = counts[b"sample_count"] * counts.get(b"channel_count", 1) * counts[b"sample_n_bytes"]
    except (ValueError, KeyError):
        return 0
    return head_bytes + size if 0 < size < 1 << 40 else 0


def _tta_end(data: bytes) -> int:
    """True Audio: behind its header stand the sizes of its frames, of 256 / 245 s each."""
    if len(data) < 22:
        return 0
    rate, count = struct.unpack_from("<II", data, 10)
    per_frame = 256 * rate // 245
    num_frames = -(-count // per_frame) if per_frame else 0
    place = 22 + 4 * num_frames + 4  # a checksum follows the sizes
    if not num_frames or place > len(data):
        return 0
    return place + sum(struct.unpack_from(f"<{num_frames}I", data, 22))


def _flv_tags(data: bytes) -> Iterator[int]:
    """Positions of the tags of a Flash video; the last one is where none begins."""
    position = 13  # a header of 9 bytes, and the size of the tag before the first
    while position + 15 <= len(data) and data[position] & 0x1F in FLV_TAGS:
        yield position
        position += 15 + int.from_bytes(data[position + 1 : position + 4], "big")
    yield position


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
    elif data[:4] in JOINED:
        end = _stated_end(data)
        behind = data.find(data[:4], end, end + JOIN_SEARCH) if end else -1
        if behind >= 0:
            return f"a second recording begins at byte {behind} of {JOINED[data[:4]]} file; {SEPARATE}"
    elif data[:4] == b"FLV\x01":
        *_, end = _flv_tags(data)
        if data[end : end + 4] == b"FLV\x01":
            return f"a second recording begins at byte {end} of a Flash video; {SEPARATE}"
    elif data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        end = _stated_end(data)
        if end and data[end + end % 2 :][:4] == b"RIFF" and data[end + end % 2 + 8 :][:4] == b"AVI ":
            return f"a second recording begins at byte {end} of an AVI video; {SEPARATE}"
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
