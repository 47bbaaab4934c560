"""Columns beside the index: what reports, filters and comparisons ask of every sample, without reading one.

OUT/columns.npy has one row per sample, in the order of index.npy. A file of its own, because training plans by the index and
should not carry what it never reads, and because data sets from before it keep their bytes and stay readable: they have no
such file, and `read_columns` returns None. Hashes find the same audio or text in another data set; 0 is "unknown".
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from shards.errors import ShardError
from shards.index import hash64
from shards.npy_file import load_npy
from shards.printable import first_line
from shards.sample import AudioFacts, SampleFacts

COLUMNS_DTYPE = np.dtype(
    [
        ("reference_audio", "<u8"),  # of the file's sha256, and of the segment where the row means a part
        ("target_audio", "<u8"),
        ("target_text", "<u8"),  # hash64 of `comparable` text
        ("reference_s", "<f4"),
        ("target_s", "<f4"),
        # Of the target's text:
        ("num_chars", "<u2"),
        ("num_letters", "<u2"),
        ("num_arabic", "<u2"),  # Arabic letters
        ("num_latin", "<u2"),
        ("num_marks", "<u2"),  # short vowels, tanwin, shadda, sukun
        ("num_digits", "<u2"),
        # Of the decoded files; NaN: unknown.
        ("reference_bandwidth_hz", "<f4"),
        ("target_bandwidth_hz", "<f4"),
        ("reference_level_db", "<f4"),  # RMS of the speech, of full scale
        ("target_level_db", "<f4"),
        ("reference_noise_db", "<f4"),  # RMS of the quietest frames
        ("target_noise_db", "<f4"),
    ]
)
NAME = "columns.npy"
MOST = 65535
ARABIC = re.compile(
    "[\u0620-\u064a\u066e-\u066f\u0671-\u06d3\u06d5\u06fa-\u06ff\u0750-\u077f\u08a0-\u08c9\ufb50-\ufdff\ufe70-\ufefc]"
)
MARK = re.compile("[\u064b-\u0652\u0670]")
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
DIGIT = re.compile(r"\d")
SILENT_MARKS = dict.fromkeys([*range(0x0610, 0x061B), 0x0640, *range(0x064B, 0x0660), 0x0670, *range(0x06D6, 0x06EE)])
ONE_LETTER = str.maketrans("أإآٱىة", "اااايه")
NO_WORD = re.compile(r"[\W_]+")


class SoundMeasures(msgspec.Struct, frozen=True):
    """Of one decoded clip."""

    bandwidth_hz: float = math.nan
    level_db: float = math.nan
    noise_db: float = math.nan


UNKNOWN = SoundMeasures()


def columns_row(facts: SampleFacts, reference: SoundMeasures = UNKNOWN, target: SoundMeasures = UNKNOWN) -> tuple:
    """One row of COLUMNS_DTYPE."""
    text = facts.texts[facts.target_text]
    counts = [
        len(text),
        sum(map(str.isalpha, text)),
        *(len(letters.findall(text)) for letters in (ARABIC, LATIN, MARK, DIGIT)),
    ]
    return (
        audio_hash(facts.reference),
        audio_hash(facts.target),
        text_hash(text),
        facts.reference.duration_s,
        facts.target.duration_s,
        *(min(MOST, count) for count in counts),
        reference.bandwidth_hz,
        target.bandwidth_hz,
        reference.level_db,
        target.level_db,
        reference.noise_db,
        target.noise_db,
    )


def columns_of(rows: Sequence[tuple]) -> np.ndarray:
    return np.array(rows, dtype=COLUMNS_DTYPE)


def audio_hash(audio: AudioFacts) -> int:
    """Of the bytes of the file, and of the part of it that is meant; 0 where no file is known."""
    if not audio.sha256:
        return 0
    part = "" if audio.offset_s is msgspec.UNSET else f" {audio.offset_s:.3f} {audio.duration_s:.2f}"
    return hash64(audio.sha256 + part) or 1


def text_hash(text: str) -> int:
    """Equal for texts that sound alike when they are read; 0 for one without a letter or digit."""
    said = comparable(text)
    return (hash64(said) or 1) if said else 0


def comparable(text: str) -> str:
    """NFKC, lower case; without marks and tatweel; one alef, ya and ha; words with single blanks between them."""
    text = unicodedata.normalize("NFKC", text).translate(SILENT_MARKS).translate(ONE_LETTER).casefold()
    western = "".join(str(unicodedata.decimal(letter)) if letter.isdecimal() else letter for letter in text)
    return " ".join(NO_WORD.sub(" ", western).split())


def read_columns(folder: Path, num_samples: int) -> np.ndarray | None:
    """Memory-map a data set's columns [num_samples]; None where it has none. Raises ShardError for damaged ones."""
    path = folder / NAME
    if not path.is_file():
        return None
    columns = read_columns_file(path)
    if len(columns) != num_samples:
        raise ShardError(
            f"{path}: {len(columns)} rows, the data set has {num_samples} samples; remove the file, or run `preprocess` again"
        )
    return columns


def read_columns_file(path: Path) -> np.ndarray:
    """Raises ShardError when it is missing or of another kind."""
    try:
        columns = load_npy(path, is_mapped=True)
    except Exception as error:  # numpy has many kinds for a header that is not its own
        raise ShardError(
            f"{path}: unreadable columns: {first_line(error)}; run `preprocess` again to make them"
        ) from None
    if columns.dtype != COLUMNS_DTYPE or columns.ndim != 1:
        raise ShardError(f"{path}: other columns than this version writes; run `preprocess` again")
    return columns


def common_rows(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Rows [m] of `ours` whose hash stands in `theirs`; unknown ones are like nothing."""
    return np.flatnonzero((ours != 0) & np.isin(ours, theirs))


def shared_audio(trained: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Rows [m] of `held_out` with an audio that `trained` has too, and that is learned (a target) on one of both sides."""
    everywhere = np.concatenate([trained["target_audio"], trained["reference_audio"]])
    rows = [
        common_rows(held_out["target_audio"], everywhere),
        common_rows(held_out["reference_audio"], trained["target_audio"]),
    ]
    return np.unique(np.concatenate(rows))
