"""The list as text: its compression taken off, and words for a file that is not UTF-8.

In: a path, or bytes. Out: a stream of the bytes inside .gz and .zst, or the end of an error. "invalid start byte" helps nobody to
convert a list, so bytes in a one-byte Arabic code page are read in each of them and the one that gives letters is named. Other
encodings are never read: the price of the safe way is one run of iconv.
"""

from __future__ import annotations

import gzip
import io
import re
import shlex
import stat
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from shards.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
# A list that ends early or is not compressed as its name says.
UNREADABLE = (OSError, EOFError, zlib.error, zstandard.ZstdError)
FORMATS = {
    b"\x1f\x8b": "gzip; name it .gz",
    b"\x28\xb5\x2f\xfd": "zstd; name it .zst",
    b"PK\x03\x04": "zip; unpack it",
    b"PAR1": "Parquet; write it as JSON Lines",
    b"BZh": "bzip2; unpack it",
    b"\xfd7zXZ": "xz; unpack it",
}
MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
}
WITHOUT_MARK: dict[
    tuple[bool, ...], str
] = {  # which of the first four bytes are zero where a text begins with two ASCII characters
    (True, True, True, False): "UTF-32BE",
    (False, True, True, True): "UTF-32LE",
    (True, False, True, False): "UTF-16BE",
    (False, True, False, True): "UTF-16LE",
}
ARABIC_CODE_PAGES = {"cp1256": "WINDOWS-1256", "iso8859_6": "ISO-8859-6", "cp720": "CP720", "cp864": "CP864"}
ARABIC_LETTER = re.compile("[ء-ي]")


def open_list(path: Path) -> io.BufferedReader:
    """The bytes of a list, unpacked. Raises DataError for what cannot be opened."""
    if path.is_dir():
        raise DataError(f"{path}: a folder; give the ChatML list (a .json or .jsonl file) inside it")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a regular file; a list is read more than once, so write it to a file first")
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a ChatML list (.json or .jsonl, also .gz or .zst)") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file))  # pyright: ignore - a GzipFile is a raw reader
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(file), buffer_size=1 << 16)
    return file


def refuse_other_forms(start: bytes, path: Path) -> None:
    """Raises DataError for a list whose first bytes are those of another format or encoding."""
    for magic, name in FORMATS.items():
        if start.startswith(magic):
            raise DataError(f"{path}: is {name}")
    encoding = named_encoding(start)
    if encoding:
        convert = f"iconv -f {encoding} -t UTF-8 {shlex.quote(path.name)} > list.json"
        raise DataError(f"{path}: is {encoding}, expected UTF-8; convert it: {convert}")


def named_encoding(start: bytes) -> str | None:
    """The encoding that the first four bytes of a text show by a mark or by zero bytes; None for UTF-8 and others."""
    for mark, name in MARKS.items():
        if start.startswith(mark):
            return name
    return WITHOUT_MARK.get(tuple(byte == 0 for byte in start[:4]))


def encoding_of(data: bytes) -> str:
    """What bytes that are not UTF-8 may be and what to do, as the end of a sentence."""
    high = bytes(byte for byte in data if byte >= 0x80)
    shares: dict[str, float] = {}
    for codec in ARABIC_CODE_PAGES:
        text = high.decode(codec, "replace")
        shares[codec] = len(ARABIC_LETTER.findall(text)) / max(1, len(text))
    codec = max(shares, key=lambda name: shares[name])
    if len(high) < 4 or shares[codec] < 0.8:
        return "convert the list to UTF-8"
    words = re.findall("[ء-ي]{2,}", data.decode(codec, "replace"))
    name = ARABIC_CODE_PAGES[codec]
    return f"it may be {name} ({words[0] if words else '?'!r}): convert the list, iconv -f {name} -t UTF-8"


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of all frames of a file. zstandard's own reader takes a frame that was cut off for its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._packed = b""
        self._ready = memoryview(b"")  # a view, because one block may unpack to megabytes
        self._is_inside = False  # a frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(1 << 14)
            if not self._packed:
                if self._is_inside:
                    raise EOFError("the compressed file is cut off")
                return 0
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._is_inside, self._packed = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
