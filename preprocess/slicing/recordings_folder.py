"""The recordings under a folder, each with the files beside it that say what is said and who speaks.

In: a folder. Out: `Source`s by name. Two recordings that would share their pieces' names are refused, and so is a recording
without a text where one is needed, both before anything is cut. Files that are no recordings are counted by their ending.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from preprocess.clip_list import AUDIO_SUFFIXES
from preprocess.slicing.transcripts import SUFFIXES, read_transcript, speakers_named, transcript_of
from preprocess.slicing.turns import read_turns, turns_file_of
from shards.errors import DataError
from shards.printable import excerpt
from shards.terminal import print_line


@dataclass(frozen=True)
class Source:
    """A recording under the source folder. `name` begins the names of its pieces."""

    path: Path
    relative: str
    folder: str
    name: str
    transcript: Path | None = None
    turns: Path | None = None

    @property
    def own_name(self) -> str:
        """Its path under the source folder without its ending."""
        return str(Path(self.relative).with_suffix(""))


def find_recordings(folder: Path) -> list[Source]:
    """Audio files under a folder, by name. Raises DataError for none, or for two that would share their pieces' names."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds the recordings, in a folder per speaker")
    sources: list[Source] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in AUDIO_SUFFIXES or path.name.startswith("._") or path.is_dir():
            continue
        relative = path.relative_to(folder)
        inner = str(relative.parent) if relative.parent.parts else folder.resolve().name
        sources.append(Source(path, str(relative), inner, path.stem))
    if not sources:
        raise DataError(f"{folder}: no recording found; looked for {' '.join(AUDIO_SUFFIXES)}")
    seen: dict[tuple[str, str], Source] = {}
    for source in sources:
        other = seen.setdefault((source.folder, source.name), source)
        if other is not source:
            raise DataError(f"{source.path} and {other.path} have one name; leave one, or rename it")
    return sources


def other_files(folder: Path, sources: list[Source]) -> str:
    """The endings of files that are neither recordings nor beside one, with their counts; "" for none."""
    beside = {(source.path.parent, source.path.stem) for source in sources}
    counts = Counter(
        path.suffix.lower() or path.name
        for path in folder.rglob("*")
        if path.is_file() and (path.parent, path.stem) not in beside and not path.name.startswith(".")
    )
    return ", ".join(f"{ending} {count}" for ending, count in sorted(counts.items()))


def with_transcripts(sources: list[Source], is_needed: bool) -> list[Source]:
    """Each with the file that says what is said. Raises DataError, before anything is cut, where one is needed and missing."""
    found = [dataclasses.replace(source, transcript=transcript_of(source.path)) for source in sources]
    lacking = [source.path for source in found if source.transcript is None]
    if lacking and is_needed:
        raise DataError(
            f"{len(lacking)} of {len(found)} recordings have no transcript, first {lacking[0]}; put one of its name beside it "
            f"({' '.join(end for end in SUFFIXES if end != '.textgrid')}), or give --asr or --without-text"
        )
    for source in found:
        if source.transcript:
            read_transcript(source.transcript)
    return found


def warn_of_named_speakers(sources: list[Source]) -> None:
    """Where transcripts name several speakers of a recording and its folder is taken for one voice."""
    named = {source.transcript: speakers_named(source.transcript) for source in sources if source.transcript}
    several = [(path, names) for path, names in named.items() if len(names) > 1]
    if several:
        path, names = several[0]
        print_line(
            f"warning: {len(several)} of {len(named)} transcripts name several speakers, first {path}: "
            f"{excerpt(', '.join(names))}; the folder's name is taken for all of them. Where they are several voices, write who "
            "speaks when into an .rttm beside each recording and give --speakers rttm"
        )


def with_turns(sources: list[Source]) -> list[Source]:
    """Each with the RTTM beside it. Raises DataError where one has none or it cannot be read, before anything is cut."""
    found = [dataclasses.replace(source, turns=turns_file_of(source.path)) for source in sources]
    lacking = [source.path for source in found if source.turns is None]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(found)} recordings have no turns, first {lacking[0]}; put an .rttm of its name beside it, "
            "or leave --speakers at folder"
        )
    for source in found:
        if source.turns:
            read_turns(source.turns)
    return found
