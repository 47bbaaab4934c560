"""`preprocess convert` for the lists that other trainers take: a file or folder in, `Clip`s out.

metadata   metadata.json of train-higgs-audio: {"samples": [{"audio_file", "transcript_file" or "transcript", "speaker_id"}]}
csv        audio_file|text|speaker, as F5-TTS and Coqui use it; tab works too, and "," with a header
folder     x.wav beside x.txt or x.lab; the speaker is the folder a file lies in
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from preprocess.clip_list import AUDIO_SUFFIXES, SPOKEN_WITH, Clip, read_text, spoken_with
from preprocess.list_row import HALF_PAIR, STRICT
from shards.errors import DataError

CSV_COLUMNS = ("audio_file", "text", "speaker", "speaker_name", "speaker_id")
METADATA = '{"samples": [{"audio_file": ..., "transcript_file": ..., "speaker_id": ...}]}'
CSV = "audio_file|text|speaker on every line"


def read_metadata(path: Path, ignored: list[str]) -> Iterator[Clip]:
    path = path / "metadata.json" if path.is_dir() else path
    try:
        content = STRICT.decode(read_text(path))
    except (ValueError, RecursionError) as error:  # JSONDecodeError too
        raise DataError(f"{path}: not readable as metadata.json: {error}") from None
    samples = content.get("samples") if isinstance(content, dict) else content
    if not isinstance(samples, list):
        raise DataError(f"{path}: no list of samples; expected {METADATA}")
    for number, sample in enumerate(samples):
        where = f"{path}: sample {number}"
        fields = sample if isinstance(sample, dict) else {}
        audio = _one_of(fields, ("audio_file",), where)
        if not audio:
            raise DataError(f"{where} has no audio_file")
        text = _one_of(fields, ("transcript", "text"), where)
        if not text:
            transcript = _one_of(fields, ("transcript_file",), where) or f"{audio.removesuffix(Path(audio).suffix)}.txt"
            text = _transcript(path.parent / transcript, where)
        speaker = _one_of(fields, ("speaker_id", "speaker", "speaker_name"), where)
        yield Clip(str(path.parent / audio), text, speaker, spoken_with(fields))


def _one_of(fields: dict[str, Any], names: Iterable[str], where: str) -> str | None:
    """The text or number under one of the names. Raises DataError for another kind, or for two that differ."""
    values: dict[str, str] = {}
    for name in names:
        value = fields.get(name)
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(f"{where}: {name} is {str(value)[:40]!r}; expected a text")
        values[name] = str(value).strip()
        if not values[name].isascii() and HALF_PAIR.search(values[name]):
            raise DataError(f"{where}: {name} holds half of a surrogate pair (\\ud800 to \\udfff)")
    if len(set(values.values())) > 1:
        raise DataError(f"{where}: {' and '.join(values)} differ; leave one")
    return next(iter(values.values()), None)


def read_csv(path: Path, ignored: list[str]) -> Iterator[Clip]:
    lines = read_text(path).split("\n")  # no other line end: U+2028 and its like stand inside texts
    first = next((line for line in lines if line.strip()), "")
    delimiter = next((d for d in ("|", "\t", ",") if d in first), "|")
    names: list[str] | None = None
    has_header = True
    for number, row in _csv_rows(lines, delimiter, path):
        fields = [field.strip() for field in row]
        if not any(fields):
            continue
        if names is None:
            names = _header(fields, path, number)
            if names:
                ignored += [name for name in names if name not in (*CSV_COLUMNS, *SPOKEN_WITH)]
                continue
            names, has_header = ["audio_file", "text", "speaker"], False
        if len(fields) > len(names):
            quotes = " and quotes around texts that hold one" if delimiter == "," else ""
            raise DataError(
                f"{path}: line {number}: {len(fields)} fields for {len(names)} columns ({'|'.join(names)}); expected "
                f"{CSV}, {delimiter!r} between them{quotes}"
            )
        if delimiter == "," and not has_header:
            raise DataError(
                f"{path}: line {number}: commas without a header: what stands behind one may be the rest of a text; put "
                "audio_file,text,speaker on a line before the clips, and quotes around texts that hold a comma"
            )
        if any("\r" in field for field in row):
            raise DataError(f"{path}: line {number}: a carriage return inside a line; end every line with \\n alone")
        named = dict(zip(names, fields, strict=False))
        if not named.get("audio_file") or not named.get("text"):
            raise DataError(f"{path}: line {number}: {len(row)} fields; expected {CSV}")
        speaker = _one_of(named, ("speaker", "speaker_name", "speaker_id"), f"{path}: line {number}")
        yield Clip(str(path.parent / named["audio_file"]), named["text"], speaker, spoken_with(named))


def _csv_rows(lines: list[str], delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields); only commas need quotes, because texts hold commas and quotes alike."""
    if delimiter != ",":
        yield from ((number, line.split(delimiter)) for number, line in enumerate(lines, start=1))
        return
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from None


def _header(fields: list[str], path: Path, number: int) -> list[str] | None:
    """Column names, or None when the first line is a clip already. Raises DataError for a header of other names."""
    names = [field.lower() for field in fields]
    if len(set(names)) == len(names) and {"audio_file", "text"} <= set(names):
        return names
    try:
        is_clip = Path(fields[0]).suffix.lower() in AUDIO_SUFFIXES or (path.parent / fields[0]).is_file()
    except OSError:  # longer than any name
        is_clip = False
    if is_clip:
        return None
    raise DataError(
        f"{path}: line {number}: {fields[0][:40]!r} is no audio file, and {'|'.join(names)[:80]!r} is not the header that is "
        "known; name the columns audio_file, text and speaker, each once"
    )


def read_folder(path: Path, ignored: list[str]) -> Iterator[Clip]:
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    for audio in sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES):
        if audio.name.startswith("._"):
            continue  # macOS keeps a file's icon and colours there
        found = [audio.with_suffix(suffix) for suffix in (".txt", ".lab") if audio.with_suffix(suffix).is_file()]
        if not found:
            raise DataError(f"{audio}: no text beside it; expected {audio.stem}.txt or {audio.stem}.lab")
        texts = [_transcript(text, str(audio)) for text in found]
        if len(set(texts)) > 1:
            raise DataError(f"{audio}: {found[0].name} and {found[1].name} differ; leave one")
        inner = audio.parent.relative_to(path)
        yield Clip(str(audio), texts[0], str(inner) if inner.parts else path.resolve().name)


def _transcript(path: Path, where: str) -> str:
    try:
        text = read_text(path).strip()
    except DataError as error:
        raise DataError(f"{where}: transcript {error}") from None
    if not text:
        raise DataError(f"{where}: transcript {path} is empty")
    return text
