"""Each distinct audio file is encoded once, however many rows use it and whichever worker meets it first.

Keyed by the sha256 of the file's bytes (and the segment of it, `Segment.key`), kept in OUT/encoded until the job is
finished: a clip that is the target of one row and the reference of others is decoded and encoded for the first of them
only. A worker that wants a file another
one is encoding waits for it (flock, which the kernel releases when its holder dies). The price is two small files per
distinct clip while the job runs.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from preprocess.audio import AudioMeasures


class EncodedCodes(msgspec.Struct, frozen=True):
    """Codec codes of a file and what decoding found out about it."""

    codes_npy: bytes  # .npy uint16 [8, T]
    num_frames: int
    measures: AudioMeasures


class EncodedWhisper(msgspec.Struct, frozen=True):
    """Whisper features of a file, as the shard stores them: float16 mel [128, Tm] or hidden states [W, d]."""

    features_zst: bytes
    num_samples: int  # at 16 kHz
    floor: float


Entry = TypeVar("Entry", EncodedCodes, EncodedWhisper)


class Cache:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.num_encoded = 0
        self.num_reused = 0

    def get(self, kind: type[Entry], key: str, encode: Callable[[], Entry]) -> Entry:
        """The stored entry, or the one `encode` makes."""
        path = self._folder / key[:2] / f"{key}.{kind.__name__}"
        entry = _read(path, kind)
        if entry is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                entry = _read(path, kind)
                if entry is None:
                    entry = encode()
                    _write(path, entry)
                    self.num_encoded += kind is EncodedCodes
                    return entry
        self.num_reused += kind is EncodedCodes
        return entry


def _read(path: Path, kind: type[Entry]) -> Entry | None:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError:
        return None  # torn by a power cut: encoded again, to the same bytes


def _write(path: Path, entry: EncodedCodes | EncodedWhisper) -> None:
    partial = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    partial.write_bytes(msgspec.msgpack.encode(entry))
    partial.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        path.unlink(missing_ok=True)
