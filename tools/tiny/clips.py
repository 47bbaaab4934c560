"""The clips that the fitted codec holds: from a folder or a ChatML list, in order, until the frames are enough.

In: a folder (every audio file below it, by name) or a list as `preprocess` reads it (reference, then target of each row).
Out: waves, and what was not read. A file or row with a fault is skipped and counted, because a fit needs no certain clip;
only when nothing at all is usable is that an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shards.errors import DataError

if TYPE_CHECKING:
    from preprocess.segment import Segment


@dataclass(frozen=True)
class Clips:
    waves: list[np.ndarray]  # [S] float32 at 24 kHz each
    paths: list[Path]
    skipped: list[str]  # what has a fault, and which
    num_left: int  # clips behind the last one that was read


def read_clips(source: Path, num_frames: int, base: Path = Path(), most: int | None = None) -> Clips:
    """Clips of `source` until they have `num_frames` frames of 40 ms, or are `most`. A list's paths are relative to `base`.

    Raises DataError when there is no such folder or list, or no usable clip in it.
    """
    from preprocess.audio import CODEC_RATE, AudioLimits, decode, read_bytes
    from preprocess.reasons import AudioFault
    from shards.encoders.codec import HOP

    waves: list[np.ndarray] = []
    paths: list[Path] = []
    skipped: list[str] = []
    num_left = 0
    for path, segment in _folder(source) if source.is_dir() else _list(source, base, skipped):
        if len(waves) == most or sum(-(-len(wave) // HOP) for wave in waves) >= num_frames:
            num_left += 1
            continue
        try:
            wave = decode(read_bytes(str(path)), AudioLimits(), segment).at(CODEC_RATE)
        except AudioFault as fault:
            skipped.append(f"{path}: {fault.reason}: {fault.detail}")
            continue
        waves.append(wave)
        paths.append(path)
    if not waves:
        first = f"; the first of {len(skipped)} faults: {skipped[0]}" if skipped else ""
        raise DataError(f"{source}: no usable clip; expected a folder of audio files or a ChatML list{first}")
    return Clips(waves, paths, skipped, num_left)


def _folder(folder: Path) -> Iterator[tuple[Path, Segment]]:
    from preprocess.clip_list import AUDIO_SUFFIXES
    from preprocess.segment import WHOLE

    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES):
        yield path, WHOLE


def _list(path: Path, base: Path, skipped: list[str]) -> Iterator[tuple[Path, Segment]]:
    """The audio items of a list, each once."""
    from preprocess.reasons import RowFault
    from preprocess.sources import find_pair, read_rows
    from shards.writer import Reject

    seen: set[tuple[str, Segment]] = set()
    for row in read_rows(path):
        if isinstance(row, Reject):
            skipped.append(f"{path}: {row.detail}")
            continue
        try:
            pair = find_pair(row.chat)
        except RowFault as fault:
            skipped.append(f"{path}: row {row.row}: {fault.detail}")
            continue
        for item in ((pair.reference_path, pair.reference_segment), (pair.target_path, pair.target_segment)):
            if item not in seen:
                seen.add(item)
                yield base / item[0], item[1]
