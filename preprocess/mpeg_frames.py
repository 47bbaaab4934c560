"""Counts the frames of an MPEG audio file (MP3 and its elder layers) and writes the count where decoders look for it.

In: bytes. Out: `MpegFrames`, and the bytes with a Xing frame in front. A file from a pipe has no count; libsndfile then
estimates its length from the first frame's bit rate and stops reading there (4 of 10 s of a VBR file). Formats of the
headers: ISO 11172-3 and 13818-3; the Xing frame as LAME and mpg123 describe it.
"""

from __future__ import annotations

from dataclasses import dataclass

from preprocess.reasons import AudioFault

RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by version: 1, 2, 2.5
KBITS_1 = {
    1: (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
KBITS_2 = {
    1: (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    3: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SEARCH_BYTES = 1 << 16  # for a first frame behind junk
MAX_JUNK = 1 << 20  # bytes between frames of a file; a decoder would search for hours where there is no more
TAIL_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN")
ID3V1_BYTES = 128
# libsndfile takes some files for MP3 only behind one, and before it takes any without it looks for a Mac's side file: of bytes
# without a name that is `._` and `.AppleDouble/` in the working folder, which every netatalk share has.
EMPTY_ID3 = b"ID3\x03\x00\x00\x00\x00\x00\x0a" + bytes(10)


@dataclass(frozen=True)
class Frame:
    """A frame's header."""

    version: int
    layer: int
    sample_rate: int
    is_mono: bool
    size: int  # bytes, header included

    @property
    def num_samples(self) -> int:
        if self.layer == 1:
            return 384
        return 576 if self.layer == 3 and self.version != 3 else 1152

    @property
    def tag_place(self) -> int:
        """Where a Xing or Info tag stands: behind header and side information."""
        if self.version == 3:
            return 4 + (17 if self.is_mono else 32)
        return 4 + (9 if self.is_mono else 17)

    def goes_with(self, other: Frame) -> bool:
        return (self.version, self.layer, self.sample_rate) == (other.version, other.layer, other.sample_rate)


@dataclass(frozen=True)
class MpegFrames:
    """The frames of a file. `declared` is the count its own tag states; None where there is none."""

    begin: int  # of the first frame with sound
    end: int
    count: int
    num_samples: int  # of a frame
    declared: int | None
    ends_inside_frame: bool
    changes_at: int = 0  # where frames of another rate or layer begin


def frame_at(data: bytes, position: int) -> Frame | None:
    """The frame whose header stands there; None for anything else, and for free-format bit rates."""
    head = data[position : position + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bit_rate, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or rate == 3 or not 0 < bit_rate < 15:
        return None
    kbits = (KBITS_1 if version == 3 else KBITS_2)[layer][bit_rate - 1]
    sample_rate, padding = RATES[version][rate], head[2] >> 1 & 1
    if layer == 1:
        size = (12000 * kbits // sample_rate + padding) * 4
    else:
        size = (72000 if layer == 3 and version != 3 else 144000) * kbits // sample_rate + padding
    return Frame(version, layer, sample_rate, head[3] >> 6 == 3, size)


def after_id3(data: bytes, position: int = 0) -> int:
    """Where the sound begins behind ID3v2 tags."""
    while data[position : position + 3] == b"ID3" and len(data) >= position + 10:
        size = data[position + 6 : position + 10]
        position += 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3]) + 10 * (data[position + 5] >> 4 & 1)
    return min(position, len(data))


def _after_tail_tags(data: bytes, position: int) -> int:
    """Behind ID3v1 and APE tags: a file's end, or the middle of joined ones."""
    while data.startswith(TAIL_TAGS[:2], position):
        if data.startswith(b"TAG", position):
            position += ID3V1_BYTES
        else:
            size = int.from_bytes(data[position + 12 : position + 16], "little")  # of all behind its header of 32 bytes
            position += 32 + size
    return position


def scan(data: bytes) -> MpegFrames | None:
    """Walk all frames; None where no MPEG audio begins."""
    begin, first = _first_frame(data)
    if first is None:
        return None
    has_tag, declared = _tag(data, begin, first)
    if has_tag:
        begin += first.size
    position, count, ends_inside, changes_at, junk = begin, 0, False, 0, 0
    while position < len(data):
        frame = frame_at(data, position)
        if frame is None or not frame.goes_with(first):
            other = after_id3(data, _after_tail_tags(data, position))
            if _is_run(data, other):  # a joined file
                if _goes_on(data, other, first):
                    position = other
                    continue
                changes_at = other
                break
            if data.startswith(TAIL_TAGS, position):
                break
            again = _next_frame(data, position + 1, first, position + 1 + MAX_JUNK - junk)
            if again is None:
                break
            junk += again - position
            position = again
            continue
        if position + frame.size > len(data):
            ends_inside = True
            break
        position += frame.size
        count += 1
    return MpegFrames(begin, position, count, first.num_samples, declared, ends_inside, changes_at)


def marked(data: bytes) -> bytes:
    """MPEG audio as libsndfile knows it wherever it runs."""
    return data if data[:3] == b"ID3" else EMPTY_ID3 + data


def with_count(data: bytes, frames: MpegFrames) -> bytes:
    """The frames behind a Xing frame that states their number; layers I and II, which know no such frame, alone."""
    first = frame_at(data, frames.begin)
    if first is None or first.layer != 3:
        return data[frames.begin : frames.end]
    head = bytearray(data[frames.begin : frames.begin + 4])
    head[1] |= 1  # no checksum
    head[2] = 14 << 4 | head[2] & 0x0C  # the highest bit rate: room for the tag
    tag_frame = frame_at(bytes(head), 0)
    assert tag_frame, "as valid as the first"
    sound = data[frames.begin : frames.end]
    tag = b"Xing" + (3).to_bytes(4, "big") + frames.count.to_bytes(4, "big")
    tag += (len(sound) + tag_frame.size).to_bytes(4, "big")
    place = tag_frame.tag_place
    padded = bytes(head) + bytes(place - 4) + tag
    return EMPTY_ID3 + padded + bytes(tag_frame.size - len(padded)) + sound


def _first_frame(data: bytes) -> tuple[int, Frame | None]:
    """The first header that another one follows, or that is the whole rest of the file."""
    start = after_id3(data)
    position = start
    while 0 <= position < min(len(data), start + SEARCH_BYTES):
        frame = frame_at(data, position)
        if frame:
            behind = frame_at(data, position + frame.size)
            if position + frame.size == len(data) or (behind and behind.goes_with(frame)):
                return position, frame
        position = data.find(b"\xff", position + 1)
    return start, None


def _is_run(data: bytes, position: int) -> bool:
    """Whether three frames of one kind follow each other there: by chance, noise holds two."""
    first = frame = frame_at(data, position)
    for _ in range(2):
        if frame is None or first is None or not frame.goes_with(first):
            return False
        position += frame.size
        frame = frame_at(data, position)
    return frame is not None and first is not None and frame.goes_with(first)


def _goes_on(data: bytes, position: int, like: Frame) -> bool:
    frame = frame_at(data, position)
    return frame is not None and frame.goes_with(like)


def _next_frame(data: bytes, position: int, like: Frame, until: int) -> int | None:
    """The next pair of frames behind damage; tags at the end of a file hold none. Raises AudioFault for too much damage."""
    while (position := data.find(b"\xff", position)) >= 0:
        if position > until:
            raise AudioFault("audio_unreadable", f"more than {MAX_JUNK} bytes between its MPEG frames are no sound")
        frame = frame_at(data, position)
        if frame and frame.goes_with(like):
            behind = frame_at(data, position + frame.size)
            if behind and behind.goes_with(like):
                return position
        position += 1
    return None


def _tag(data: bytes, begin: int, first: Frame) -> tuple[bool, int | None]:
    """(whether the first frame is a tag, the number of frames it states)."""
    place = begin + first.tag_place
    if data[place : place + 4] in (b"Xing", b"Info"):
        has_count = data[place + 7 : place + 8] and data[place + 7] & 1
        count = int.from_bytes(data[place + 8 : place + 12], "big") if has_count else 0
        return True, count or None
    place = begin + 36
    if data[place : place + 4] == b"VBRI":
        return True, int.from_bytes(data[place + 14 : place + 18], "big") or None
    return not any(data[begin + 4 : begin + first.size]), None  # LAME leaves room for its tag, which a pipe never fills
