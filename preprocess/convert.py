"""`preprocess convert`: other projects' data sets as a ChatML list.

In: a data set by its kind; its reader is in `convert_lists` (of other trainers), `convert_corpora` (published corpora) or
`convert_hugging_face`. Out: the list, with a reference for every clip (`clip_list`). Nothing is guessed: a field without a
name, a missing speaker, an unknown header or encoding is an error, because a cut transcript would be trained as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from preprocess.clip_list import Clip, paired_rows, write_list
from preprocess.convert_corpora import read_common_voice, read_kaldi, read_lhotse, read_ljspeech
from preprocess.convert_lists import CSV, METADATA, read_csv, read_folder, read_metadata
from shards.errors import DataError

if TYPE_CHECKING:
    from preprocess.convert_hugging_face import HuggingFaceSource

Reader = Callable[[Path, list[str]], Iterator[Clip]]  # adds the names of what it does not use to the list
READERS: dict[str, Reader] = {
    "metadata": read_metadata,
    "csv": read_csv,
    "folder": read_folder,
    "ljspeech": read_ljspeech,
    "commonvoice": read_common_voice,
    "kaldi": read_kaldi,
    "lhotse": read_lhotse,
}
EXPECTED = {
    "metadata": METADATA,
    "csv": CSV,
    "folder": "x.wav beside x.txt or x.lab, a folder per speaker",
    "ljspeech": "metadata.csv with id|text beside wavs/",
    "commonvoice": "a .tsv with client_id, path and sentence beside clips/",
    "kaldi": "a folder with wav.scp, text and utt2spk",
    "lhotse": "cuts.jsonl.gz of MonoCuts",
}


class Conversion(msgspec.Struct, frozen=True):
    num_rows: int
    num_speakers: int
    lonely_clips: list[str]  # without another recording of their speaker
    ignored_columns: list[str] = []
    skipped_rows: dict[str, int] = {}  # by what they lack


def convert(
    kind: str, source: Path, out: Path, seed: int, speaker: str | None = None, speaker_from_folder: bool = False
) -> Conversion:
    """Write the ChatML list `out` (JSON Lines for .jsonl, else a JSON array). Raises DataError.

    `speaker` is who speaks all clips, `speaker_from_folder` takes the folder of each clip: only for sources that name none.
    """
    ignored: list[str] = []
    clips = list(READERS[kind](source, ignored))
    if not clips:
        raise DataError(f"{source}: no clip found; expected {EXPECTED[kind]}")
    named = _with_speakers(clips, source, speaker, speaker_from_folder)
    return Conversion(*_listed(named, source, out, seed), ignored)


def convert_hugging_face(asked: HuggingFaceSource, out: Path, seed: int, speaker: str | None = None) -> Conversion:
    """As `convert`, of a Hugging Face data set, whose audio is written to files. Raises DataError."""
    from preprocess.convert_hugging_face import read_hugging_face

    clips = list(read_hugging_face(asked))
    skipped = dict(asked.skipped)
    if not clips:
        raise DataError(f"{asked.path}: no row with audio, text and speaker; rows that lack one: {skipped or 'none'}")
    named = _with_speakers(clips, asked.path, speaker, False)
    return Conversion(*_listed(named, asked.path, out, seed), asked.ignored, skipped)


def _listed(clips: Iterable[Clip], source: Path, out: Path, seed: int) -> tuple[int, int, list[str]]:
    """Write the list: (rows, speakers, clips without another recording of their speaker)."""
    rows, lonely, num_speakers = paired_rows(clips, seed)
    if not rows:
        raise DataError(f"{source}: every speaker has one clip only; cloning needs another clip as the reference")
    write_list(out, rows)
    return len(rows), num_speakers, lonely


def _with_speakers(clips: list[Clip], source: Path, speaker: str | None, from_folder: bool) -> Iterator[Clip]:
    unnamed = [clip.audio for clip in clips if not clip.speaker]
    if (speaker or from_folder) and len(unnamed) < len(clips):
        raise DataError(f"{source}: names speakers itself; leave --speaker and --speaker-from-folder out")
    if unnamed and not (speaker or from_folder):
        raise DataError(
            f"{source}: {len(unnamed)} of {len(clips)} clips have no speaker, first {unnamed[0]}; add a column, or give "
            "--speaker NAME (one voice speaks all) or, of files, --speaker-from-folder (a folder per speaker)"
        )
    for clip in clips:
        named = clip.speaker or speaker or _folder_of(clip, source)
        yield msgspec.structs.replace(clip, speaker=named)


def _folder_of(clip: Clip, source: Path) -> str:
    """The clip's folder as seen from the source's, or that one's own name."""
    folder, root = Path(clip.audio).parent, source.parent
    inner = str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
    return root.resolve().name if inner == "." else inner
