"""Each distinct audio file is encoded once, however many rows use it and whichever worker meets it first.

Keyed by the sha256 of the file's bytes (and the segment of it, `Segment.key`), kept in OUT/encoded until the job is
finished: a clip that is the target of one row and the reference of others is decoded and encoded for the first of them
only. A worker that wants a file another
one is encoding waits for it (flock, which the kernel releases when its holder dies). The price is two small files per
distinct clip while the job runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from preprocess.audio import AudioMeasures
from preprocess.config import PreprocessConfig
from shards.manifest import Fingerprints
from shards.writer import naming


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


def recipe_digest(config: PreprocessConfig, fingerprints: Fingerprints) -> str:
    """16 hex digits over all that decides an entry besides its audio; jobs with the same ones share their entries.

    The limits are part of it because an entry is made only of audio within them, and so is this package's own code.
    """
    digest = hashlib.sha256()
    models = msgspec.structs.replace(fingerprints, tokenizer="")  # no text enters an entry
    for part in (models, config.preprocess.audio_limits(), config.audio, config.features.whisper):
        digest.update(msgspec.json.encode(part) + b"\n")
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Cache:
    """The entries of one recipe; those older than `job_began_ns` (file time) were made for an earlier job."""

    def __init__(self, folder: Path, job_began_ns: int = 0) -> None:
        self._folder = folder
        self._job_began_ns = job_began_ns
        self.num_encoded = 0
        self.num_reused = 0
        self.num_adopted = 0  # distinct files whose entry an earlier job made

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
        self.num_adopted += kind is EncodedCodes and self._adopt(path)
        return entry

    def _adopt(self, path: Path) -> bool:
        """True for whoever uses an earlier job's entry first in this job; its new file time marks it as ours."""
        if path.stat().st_mtime_ns >= self._job_began_ns:
            return False
        with _locked(path.with_suffix(".lock")):
            if path.stat().st_mtime_ns >= self._job_began_ns:
                return False
            os.utime(path)
            return True


def _read(path: Path, kind: type[Entry]) -> Entry | None:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError:
        return None  # torn by a power cut: encoded again, to the same bytes


def _write(path: Path, entry: EncodedCodes | EncodedWhisper) -> None:
    partial = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    with naming(path):
        partial.write_bytes(msgspec.msgpack.encode(entry))
        partial.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        path.unlink(missing_ok=True)
