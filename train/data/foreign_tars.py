"""Samples out of tars that strangers wrote: every sample comes or is named, whatever the headers claim.

In: addresses of tars, also packed with gzip, bzip2 or xz. Out: dictionaries as `webdataset.WebDataset` gives them, with the
members of the contract; every fault is handed to `note`. Python's tarfile, on which webdataset builds, takes a damaged
header for the end of the tar, drops links, reads a member of any claimed size into memory and seeks for ever behind a
stated one of 2^60 bytes (tried with webdataset 1.0.2); so headers are read here, and sizes are looked at first. The price:
sparse members, which no writer of small files makes, end their tar.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from shards.errors import ShardError
from shards.printable import excerpt, first_line
from shards.sample import MAX_WHISPER_BYTES, MEMBERS
from shards.writer import TAR_BLOCK

MAX_MEMBER_BYTES = MAX_WHISPER_BYTES
MAX_HEADER_BYTES = 1 << 20  # of a long name or a PAX header
MAX_NAME_CHARS = 1024
META = re.compile(r"__[^/]*__(?:$|/)")  # what webdataset leaves out
PACKED: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class Member(NamedTuple):
    """A file of a tar; `fault` says why its bytes are not there."""

    name: str
    data: bytes
    fault: str = ""


def tar_samples(addresses: list[str], note: Callable[[Exception], Any]) -> Iterator[dict[str, Any]]:
    """{"__key__", "__url__", suffix: bytes} of every sample in order; a tar that cannot be read on ends with a fault."""
    for address in addresses:
        try:
            file = gopen(address)
            try:
                yield from _samples(_members(_unpacked(file)), address, note)
            finally:
                file.close()
        except Exception as error:  # every file system and every packer has errors of its own
            what = error.strerror if isinstance(error, OSError) else None
            note(ShardError(what or first_line(error), address))


def _samples(members: Iterator[Member], address: str, note: Callable[[Exception], Any]) -> Iterator[dict[str, Any]]:
    """Neighbours with one key are a sample."""
    found: dict[str, Any] = {}
    faults: list[str] = []

    def ended() -> Iterator[dict[str, Any]]:
        if faults:
            note(ShardError(f"sample {excerpt(found['__key__'])}: {faults[0]}", address))
        elif found:
            yield dict(found)

    cut: Exception | None = None
    try:
        for member in members:
            key, suffix = base_plus_ext(member.name)
            if key is None or suffix is None or META.match(member.name):
                continue
            if key != found.get("__key__"):
                yield from ended()
                faults.clear()
                found = {"__key__": key, "__url__": address}
            suffix = suffix.lower()
            if suffix in found:
                faults.append(f"two members {excerpt(suffix)}")
            if member.fault:
                faults.append(f"member {excerpt(suffix)} {member.fault}")
            found[suffix] = member.data
    except Exception as error:  # what came before it is given first: the last sample may be whole
        cut = error
    yield from ended()
    if cut:
        raise cut


def _members(tar: Any) -> Iterator[Member]:
    """Every file. Raises ShardError where the tar cannot be followed any further."""
    position = 0
    long_name, pax = "", {}

    def take(size: int) -> bytes:
        nonlocal position
        data = tar.read(size)
        while len(data) < size and (more := tar.read(size - len(data))):
            data += more
        if len(data) < size:
            raise ShardError(f"the tar is cut short at byte {position + len(data)}")
        position += size
        return data

    def skip(size: int) -> None:
        while size > 0:
            size -= len(take(min(size, 1 << 16)))

    while any(block := take(TAR_BLOCK)):
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            what = f"no tar header at byte {position - TAR_BLOCK}"
            raise ShardError(f"{what}: no tar, or one that is damaged from there on") from None
        if info.size < 0 or info.type == tarfile.GNUTYPE_SPARSE:
            raise ShardError(f"a sparse member, or a size of {info.size}, at byte {position - TAR_BLOCK}: not read on")
        padding = -info.size % TAR_BLOCK
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if info.size > MAX_HEADER_BYTES:
                raise ShardError(f"a header of {info.size} bytes at byte {position - TAR_BLOCK}: not read on")
            data = take(info.size)
            skip(padding)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                pax = _pax_records(data)
            continue
        if info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            skip(info.size + padding)
            continue
        name = pax.get("path") or long_name or info.name
        size = int(pax["size"]) if pax.get("size", "").isdecimal() else info.size
        is_sparse = any(keyword.startswith("GNU.sparse") for keyword in pax)
        long_name, pax = "", {}
        if info.isdir():
            continue
        if not info.isreg() and info.type in tarfile.SUPPORTED_TYPES:
            yield Member(name, b"", "is a link or a device, no file of its own")
            continue
        yield _read_member(name, size, is_sparse, take, skip)
    while rest := tar.read(1 << 16):
        if rest.strip(b"\0"):
            raise ShardError(f"more stands behind the end mark at byte {position}: joined tars? pack them again")


def _read_member(
    name: str, size: int, is_sparse: bool, take: Callable[[int], bytes], skip: Callable[[int], None]
) -> Member:
    fault = ""
    if is_sparse:
        fault = "is sparse"
    elif len(name) > MAX_NAME_CHARS:
        name, fault = (
            f"{name[:MAX_NAME_CHARS].replace('.', '_')}.{name[-20:].rpartition('.')[2]}",
            "has too long a name",
        )
    elif name.lower().endswith(MEMBERS) and size > MAX_MEMBER_BYTES:
        fault = f"has {size} bytes, at most {MAX_MEMBER_BYTES}"
    if fault or not name.lower().endswith(MEMBERS):
        skip(size + -size % TAR_BLOCK)
        return Member(name, b"", fault)
    data = take(size)
    skip(-size % TAR_BLOCK)
    return Member(name, data)


def _pax_records(data: bytes) -> dict[str, str]:
    """ "LENGTH KEYWORD=VALUE\\n" each. Raises ShardError for anything else."""
    records: dict[str, str] = {}
    while data:
        length, _, _ = data.partition(b" ")
        size = int(length) if length.isdigit() and len(length) < 10 else 0
        keyword, equals, value = data[len(length) + 1 : size - 1].partition(b"=")
        if size <= len(length) or size > len(data) or not equals:
            raise ShardError("a PAX header that cannot be read: the tar is damaged from there on")
        records[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[size:]
    if "size" in records and not (records["size"].isdecimal() and len(records["size"]) < 20):
        raise ShardError(f"a PAX header with a size of {excerpt(records['size'])!r}: the tar is damaged from there on")
    return records


class _Raw(io.RawIOBase):
    """What `gopen` gives, as a raw file."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _unpacked(file: Any) -> Any:
    buffered = io.BufferedReader(_Raw(file), 1 << 16)
    head = buffered.peek(8)
    for mark, unpack in PACKED.items():
        if head.startswith(mark):
            return unpack(buffered)
    return buffered
