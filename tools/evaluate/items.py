"""What is to be said, and in whose voice: one `Item` per utterance, from each kind of list that people evaluate with.

In: DATA. Out: `Items`, and what was skipped with its reason. Paths in a list are taken from the working folder, as
`preprocess` takes them, and where nothing is there from the list's own folder. A seed-tts or ZipVoice list has no speakers:
each reference clip counts as a speaker of its own, which is right for their sets and makes intervals too narrow where one
person's clips are several references.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from preprocess.segment import WHOLE, Segment
from shards.errors import DataError
from shards.sample import dialect_of

HABIBI_KEYS = ("file_name", "text", "speaker_id")
EXPECTED = (
    "a data set folder of `preprocess`, a ChatML list (.json, .jsonl), a seed-tts list (.lst), a ZipVoice list (.tsv), or a "
    "Habibi folder (metadata.jsonl or metadata.csv with file_name, text, speaker_id)"
)


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One utterance. Paths are files; `real` is the recording of the text by the speaker, where there is one."""

    id: str
    speaker: str
    text: str
    reference: str
    reference_text: str
    real: str | None = None
    dialect: str | None = None
    reference_segment: Segment = WHOLE
    real_segment: Segment = WHOLE
    dataset: str = ""  # folder of `preprocess` that the item is of
    row: int | None = None  # in its index: codes stand there instead of files
    audio: list[int] = []  # shards.columns.audio_hash of the files, where they are known without reading them


class Items(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    source: str
    items: list[Item]
    skipped: list[str] = []


def read_items(data: Path, limit: int | None = None) -> Items:
    """Items of a list or folder of files; a data set of `preprocess` is read by `dataset_items`. Raises DataError."""
    kind, reader = reader_of(data)
    skipped: list[str] = []
    items: list[Item] = []
    for item in reader(data, skipped):
        if limit is not None and len(items) == limit:
            break
        items.append(item)
    if not items:
        first = f"; the first of {len(skipped)} skipped: {skipped[0]}" if skipped else ""
        raise DataError(f"{data}: nothing to evaluate in this {kind}{first}")
    return Items(kind=kind, source=str(data), items=with_distinct_ids(items), skipped=skipped)


Reader = Callable[[Path, list[str]], Iterator[Item]]


def reader_of(data: Path) -> tuple[str, Reader]:
    if data.is_dir():
        if (data / "metadata.jsonl").is_file() or (data / "metadata.csv").is_file():
            return "Habibi folder", habibi_items
        lists = [path for path in (data / "meta.lst", data / "chatml.json", data / "chatml.jsonl") if path.is_file()]
        if not lists:
            raise DataError(f"{data}: no list found in this folder; expected {EXPECTED}")
        data = lists[0]
        kind, reader = reader_of(data)
        return kind, lambda _, skipped: reader(data, skipped)
    if not data.is_file():
        raise DataError(f"{data}: no such file or folder; expected {EXPECTED}")
    if data.suffix == ".lst":
        return "seed-tts list", seed_tts_items
    if data.suffix == ".tsv":
        return "ZipVoice list", zipvoice_items
    return "ChatML list", chatml_items


def with_distinct_ids(items: list[Item]) -> list[Item]:
    """Waves are named by id: the second of two equal ids gets a number, so no wave overwrites another."""
    seen: Counter[str] = Counter()
    taken = {item.id for item in items}
    named = []
    for item in items:
        seen[item.id] += 1
        name = item.id
        if seen[item.id] > 1:
            number = seen[item.id]
            while f"{item.id}-{number}" in taken:
                number += 1
            name = f"{item.id}-{number}"
            taken.add(name)
        named.append(msgspec.structs.replace(item, id=name))
    return named


def located(name: str, beside: Path) -> str:
    """The file that a list names: from the working folder, else from the list's own."""
    return name if is_file(name) or not is_file(beside / name) else str(beside / name)


def is_file(path: str | Path) -> bool:
    """A name that no file can have (too long, with a NUL) costs its item, not the list."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def chatml_items(data: Path, skipped: list[str]) -> Iterator[Item]:
    from preprocess.reasons import RowFault
    from preprocess.row_checks import check_row
    from preprocess.sources import read_rows
    from preprocess.text import TextSection
    from shards.writer import Reject

    for row in read_rows(data):
        if isinstance(row, Reject):
            skipped.append(row.detail)
            continue
        try:
            pair = check_row(row, TextSection()).pair  # the rules of the voice come when it speaks
        except RowFault as fault:
            skipped.append(f"row {row.row}: {fault.detail}")
            continue
        facts = {**(row.chat.misc or {}), **row.extra}
        yield Item(
            id=row.id,
            speaker=row.chat.speaker or pair.reference_path,
            text=pair.target_text,
            reference=located(pair.reference_path, data.parent),
            reference_text=pair.reference_text,
            real=located(pair.target_path, data.parent),
            dialect=dialect_of(facts),
            reference_segment=pair.reference_segment,
            real_segment=pair.target_segment,
        )


def seed_tts_items(data: Path, skipped: list[str]) -> Iterator[Item]:
    """utterance|reference text|reference wav|text, and a fifth column or wavs/UTTERANCE.wav for the recording."""
    for number, line in lines_of(data):
        fields = line.split("|")
        if len(fields) not in (4, 5):
            skipped.append(f"line {number}: {len(fields)} fields between |; expected 4 or 5")
            continue
        name, reference_text, reference, text, *real = (field.strip() for field in fields)
        recording = real[0] if real else f"wavs/{name.removesuffix('.wav')}.wav"
        yield from checked(data, number, skipped, name.removesuffix(".wav"), reference_text, reference, text, recording)


def zipvoice_items(data: Path, skipped: list[str]) -> Iterator[Item]:
    """wave name, reference text, reference wav, text; separated by tabs."""
    for number, line in lines_of(data):
        fields = line.split("\t")
        if len(fields) != 4:
            skipped.append(f"line {number}: {len(fields)} fields between tabs; expected 4")
            continue
        name, reference_text, reference, text = (field.strip() for field in fields)
        yield from checked(data, number, skipped, name.removesuffix(".wav"), reference_text, reference, text, "")


def checked(
    data: Path,
    number: int,
    skipped: list[str],
    name: str,
    reference_text: str,
    reference: str,
    text: str,
    recording: str,
) -> Iterator[Item]:
    if not (name and reference_text and reference and text):
        skipped.append(f"line {number}: an empty field; expected a name, two texts and a wave")
        return
    real = located(recording, data.parent) if recording else ""
    yield Item(
        id=name,
        speaker=reference,
        text=text,
        reference=located(reference, data.parent),
        reference_text=reference_text,
        real=real if real and is_file(real) else None,
    )


def lines_of(data: Path) -> Iterator[tuple[int, str]]:
    try:
        text = data.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{data}: not readable as UTF-8 text: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def habibi_items(data: Path, skipped: list[str]) -> Iterator[Item]:
    """The benchmark's own pairing (habibi-tts 0.1.1, eval/0_benchmark.py): an entry's reference is the speaker's entry before
    it, and the first one's is the last. A speaker with one entry would be its own reference and is skipped."""
    by_speaker: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, row in enumerate(metadata_rows(data), 1):
        entry = {key: plain_text(row.get(key)) for key in HABIBI_KEYS}
        lacking = [key for key, value in entry.items() if not value]
        if lacking or not Path(entry["file_name"]).name:
            skipped.append(f"entry {number}: lacks {', '.join(lacking) or 'a file in file_name'}")
            continue
        by_speaker[entry["speaker_id"]].append({**row, **entry})
    for speaker, rows in by_speaker.items():
        if len(rows) == 1:
            skipped.append(f"{rows[0]['file_name']}: the only entry of speaker {speaker}, so without a reference")
            continue
        for number, row in enumerate(rows):
            before = rows[number - 1]
            yield Item(
                id=str(Path(row["file_name"]).with_suffix("")),
                speaker=speaker,
                text=row["text"],
                reference=str(data / before["file_name"]),
                reference_text=before["text"],
                real=str(data / row["file_name"]),
                dialect=dialect_of(row),
            )


def plain_text(value: Any) -> str:
    """A text or a number as text; "" for what is neither."""
    return str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def metadata_rows(data: Path) -> Iterator[dict[str, Any]]:
    """Raises DataError for what is no metadata."""
    path = data / "metadata.jsonl"
    if not path.is_file():
        yield from csv_rows(data / "metadata.csv")
        return
    for number, line in lines_of(path):
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number}: expected an object, got {line[:40]!r}")
        yield row


def csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            if lacking := [key for key in HABIBI_KEYS if key not in names]:
                found = ",".join(names)[:80]
                raise DataError(
                    f"{path}: its first line lacks {', '.join(lacking)}; expected names of columns, got {found!r}"
                )
            for number, row in enumerate(reader, 1):  # noqa: B007 - of a fault's message
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 CSV after {number} entries: {error}") from None
