"""The folder of the pieces: FLAC clips in a folder per speaker, and what is known of each recording in .slice/.

In: what `run.py` cuts. Out: PIECES/SPEAKER/RECORDING-000012.flac and PIECES/.slice/DIGEST.json, written last: a recording counts
as cut only by that marker, whose `key` names its bytes, its transcript and all rules. So a killed `slice` is continued by the
same command, another rule cuts again, and what no marker names any more is deleted. The folder must be ours alone for that.
PIECES/.slice/heard/DIGEST.json is what a recognizer heard in one piece, PIECES/skipped.jsonl all that is in no row, and why.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import soundfile

from shards.errors import DataError
from shards.folder_lock import PREFIX as LOCK_PREFIX
from shards.writer import write_bytes, write_json

MARKERS = ".slice"
HEARD = "heard"
SKIPPED_FILE = "skipped.jsonl"
PIECE_NAME = re.compile(r".+-\d{6}\.flac(\.tmp\..+)?", re.DOTALL)


class CutPiece(msgspec.Struct, frozen=True):
    """A piece on disk. `file` is relative to the folder of the pieces."""

    file: str
    num_bytes: int
    start_s: float
    end_s: float
    speaker: str
    text: str = ""  # empty: nobody has written it down yet


class SkippedPart(msgspec.Struct, frozen=True):
    start_s: float
    end_s: float
    reason: str


class CutRecording(msgspec.Struct, frozen=True, kw_only=True):
    """The marker of one recording."""

    key: str
    recording: str  # its path under the source folder
    duration_s: float
    speech_s: float
    pieces: list[CutPiece]
    skipped: list[SkippedPart]


class Heard(msgspec.Struct, frozen=True):
    """What a recognizer made of a piece: the mean log-probability of its tokens, and Whisper's other two figures."""

    text: str
    log_probability: float
    no_speech_probability: float
    compression_ratio: float


class _HeardPiece(msgspec.Struct, frozen=True):
    key: str
    heard: Heard


class PiecesFolder:
    """Raises DataError for a folder that holds something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise DataError(f"{path}: is a file; the pieces need a folder, give one with --pieces")
        if path.is_dir() and not (path / MARKERS).is_dir():
            foreign = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(LOCK_PREFIX))
            if foreign:
                raise DataError(
                    f"{path}: not empty ({', '.join(foreign[:3])}) and not made by slice; give a new folder with --pieces"
                )

    def begin(self) -> None:
        (self.path / MARKERS / HEARD).mkdir(parents=True, exist_ok=True)

    def standing(self, recording: str, key: str) -> CutRecording | None:
        """What an earlier run cut of this recording by the same rules, if all of it is still there."""
        try:
            found = msgspec.json.decode(self._marker(recording).read_bytes(), type=CutRecording)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        if found.key != key or not all(self._is_there(piece) for piece in found.pieces):
            return None
        return found

    def write_piece(self, file: str, samples: np.ndarray, sample_rate: int, is_wide: bool) -> int:
        """samples [n, channels] float32 -> a FLAC of 16 or 24 bits, sample for sample; returns its bytes."""
        buffer = io.BytesIO()
        bits = 24 if is_wide else 16
        full_scale = 1 << (bits - 1)
        # libsndfile would scale floats by 32767; a 16-bit recording must come back bit for bit.
        values = np.rint(samples.astype(np.float64) * full_scale).clip(-full_scale, full_scale - 1)
        integers = (values * 256).astype(np.int32) if is_wide else values.astype(np.int16)
        soundfile.write(buffer, integers, sample_rate, format="FLAC", subtype=f"PCM_{bits}")
        data = buffer.getvalue()
        write_bytes(self.path / file, data)
        return len(data)

    def finish(self, cut: CutRecording) -> None:
        write_json(self._marker(cut.recording), cut)

    def heard(self, file: str, key: str) -> Heard | None:
        """What an earlier run heard in this piece, if recognizer and cut are the same."""
        try:
            found = msgspec.json.decode(self._heard_file(file).read_bytes(), type=_HeardPiece)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return found.heard if found.key == key else None

    def keep_heard(self, file: str, key: str, heard: Heard) -> None:
        write_json(self._heard_file(file), _HeardPiece(key, heard))

    def write_skipped(self, rows: Iterable[dict[str, Any]]) -> None:
        write_bytes(self.path / SKIPPED_FILE, b"".join(msgspec.json.encode(row) + b"\n" for row in rows))

    def remove_others(self, kept: Iterable[CutRecording]) -> int:
        """Delete pieces and markers that belong to none of these recordings; returns how many pieces."""
        kept = list(kept)
        files = {self.path / piece.file for cut in kept for piece in cut.pieces}
        markers = {self._marker(cut.recording) for cut in kept}
        stale = [
            path
            for path in self.path.rglob("*")
            if PIECE_NAME.fullmatch(path.name) and path not in files and path.is_file()
        ]
        hearings = {self._heard_file(piece.file) for cut in kept for piece in cut.pieces}
        old = [path for path in (self.path / MARKERS).rglob("*.json*") if path not in markers | hearings]
        for path in [*stale, *old]:
            path.unlink()
        return len(stale)

    def _marker(self, recording: str) -> Path:
        return self.path / MARKERS / f"{_digest_of_name(recording)}.json"

    def _heard_file(self, file: str) -> Path:
        return self.path / MARKERS / HEARD / f"{_digest_of_name(file)}.json"

    def _is_there(self, piece: CutPiece) -> bool:
        try:
            return (self.path / piece.file).stat().st_size == piece.num_bytes
        except OSError:
            return False


def _digest_of_name(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:24]


def digest_of(facts: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()
