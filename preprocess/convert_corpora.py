"""`preprocess convert` for the layouts of published corpora: a folder or manifest in, `Clip`s out.

    ljspeech      metadata.csv (id|text or id|text|normalized text) beside wavs/; one voice, named by --speaker
    commonvoice   a .tsv with client_id, path and sentence, beside clips/
    kaldi         a folder with wav.scp, text, utt2spk and perhaps segments
    lhotse        cuts.jsonl or cuts.jsonl.gz of MonoCuts, each with one supervision

A header or field that is not known is refused with what was found. wav.scp and lhotse may name commands whose output is the
audio: they are never run, but refused. Of a layout that brings its audio along, a path that leaves its folder is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from preprocess.clip_list import SPOKEN_WITH, Clip, read_text, spoken_with
from preprocess.list_encoding import UNREADABLE, open_list
from preprocess.list_row import STRICT
from shards.errors import DataError
from shards.printable import excerpt

COMMON_VOICE = ("client_id", "path", "sentence")
MAX_MANIFEST_LINE = 4 << 20


def read_ljspeech(path: Path, ignored: list[str]) -> Iterator[Clip]:
    path = path / "metadata.csv" if path.is_dir() else path
    texts: set[str] = set()
    thirds: set[str] = set()
    for number, line in _lines(path):
        fields = [field.strip() for field in line.split("|")]
        where = f"{path}: line {number}"
        if len(fields) not in (2, 3) or not fields[0] or not fields[-1]:
            raise DataError(
                f"{where}: {len(fields)} fields, {excerpt(line)!r}; expected id|text or id|text|normalized text, none empty"
            )
        name = fields[0] if fields[0].lower().endswith((".wav", ".flac")) else f"{fields[0]}.wav"
        audio = _inside(path.parent / "wavs", name, where)
        if number == 1 and not audio.is_file():
            raise DataError(
                f"{where}: no file {audio}: {excerpt(line)!r} is a header, or wavs/ is not beside metadata.csv"
            )
        if len(fields) == 3:
            texts.add(fields[1])
            thirds.add(fields[2])
        yield Clip(str(audio), fields[-1], None)
    if texts and 2 * len(thirds) <= len(texts):  # names of speakers stand there, and would be learned as texts
        raise DataError(
            f"{path}: {len(thirds)} values in the third column for {len(texts)} texts, first {excerpt(min(thirds))!r}: no texts; "
            "take it out, or write speakers as csv: audio_file|text|speaker"
        )


def read_common_voice(path: Path, ignored: list[str]) -> Iterator[Clip]:
    if path.is_dir():
        found = sorted(file.name for file in path.glob("*.tsv"))
        raise DataError(
            f"{path}: a folder; give one of its lists, e.g. validated.tsv (found: {', '.join(found) or 'none'})"
        )
    names: list[str] = []
    for number, line in _lines(path):
        fields = line.split("\t")
        where = f"{path}: line {number}"
        if not names:
            names = [field.strip() for field in fields]
            if not set(COMMON_VOICE) <= set(names) or len(set(names)) != len(names):
                raise DataError(
                    f"{where}: the header is {excerpt(line)!r}; expected {', '.join(COMMON_VOICE)} among its columns"
                )
            if not (path.parent / "clips").is_dir():
                raise DataError(f"{path}: no folder clips/ beside it; put it there, its audio is needed to train")
            ignored += [name for name in names if name not in (*COMMON_VOICE, *SPOKEN_WITH)]
            continue
        if len(fields) != len(names):
            raise DataError(f"{where}: {len(fields)} fields for {len(names)} columns: {excerpt(line)!r}")
        row = {name: field.strip() for name, field in zip(names, fields, strict=True)}
        if not row["sentence"] or not row["client_id"]:
            raise DataError(f"{where}: no sentence or no client_id; take the line out")
        audio = _inside(path.parent / "clips", row["path"], where)
        yield Clip(str(audio), row["sentence"], row["client_id"], spoken_with(row))


def read_kaldi(path: Path, ignored: list[str]) -> Iterator[Clip]:
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected one with wav.scp, text and utt2spk")
    audios = {
        name: _kaldi_audio(rest, f"{path / 'wav.scp'}: {name}") for name, rest in _table(path / "wav.scp").items()
    }
    texts, speakers = _table(path / "text"), _table(path / "utt2spk")
    segments = _table(path / "segments") if (path / "segments").is_file() else None
    for name, text in texts.items():
        if name not in speakers:
            raise DataError(f"{path / 'utt2spk'}: no speaker of {excerpt(name)!r}, which text has")
        recording, offset_s, duration_s = name, 0.0, None
        if segments is not None:
            recording, offset_s, duration_s = _kaldi_segment(segments.get(name, ""), f"{path / 'segments'}: {name}")
        if recording not in audios:
            raise DataError(
                f"{path / 'wav.scp'}: no recording {excerpt(recording)!r}, which utterance {excerpt(name)!r} needs"
            )
        yield Clip(audios[recording], text, speakers[name], offset_s=offset_s, duration_s=duration_s)
    if lacking := sorted({*speakers, *(segments or {})} - set(texts)):
        ignored.append(f"{len(lacking)} utterances without a text, first {excerpt(lacking[0])}")


def _kaldi_audio(entry: str, where: str) -> str:
    if entry.endswith("|") or entry.startswith("|") or entry == "-":
        raise DataError(
            f"{where}: {excerpt(entry)!r} is a command, which is never run here; write its audio to a file first"
        )
    if ".ark:" in entry:
        raise DataError(f"{where}: {excerpt(entry)!r} is a place inside an archive; write its audio to files first")
    _refuse_upwards(entry, where)
    return entry


def _kaldi_segment(entry: str, where: str) -> tuple[str, float, float]:
    try:
        recording, start, end = entry.split()
        start_s, end_s = float(start), float(end)
    except ValueError:
        raise DataError(f"{where}: {excerpt(entry)!r}; expected RECORDING START END in seconds") from None
    return recording, start_s, _length(start_s, end_s - start_s, where)


def read_lhotse(path: Path, ignored: list[str]) -> Iterator[Clip]:
    try:
        with open_list(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_MANIFEST_LINE), b""), start=1):
                if line.strip():
                    yield _cut(line, path, f"{path}: line {number}")
    except UNREADABLE as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _cut(line: bytes, path: Path, where: str) -> Clip:
    try:
        cut = STRICT.decode(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object on one line: {error}") from None
    if not isinstance(cut, dict) or cut.get("type") not in (None, "MonoCut") or "recording" not in cut:
        kind = cut.get("type", "no type") if isinstance(cut, dict) else type(cut).__name__
        raise DataError(
            f"{where}: {excerpt(str(kind))!r} without a recording of its own; expected a MonoCut (lhotse cut simple)"
        )
    try:
        (supervision,) = cut["supervisions"]
        (source,) = cut["recording"]["sources"]
        text, speaker, audio = supervision["text"], supervision.get("speaker"), source["source"]
        offset_s = float(cut["start"]) + float(supervision["start"])
        duration_s = float(supervision["duration"])
        whole_s = float(cut["recording"].get("duration", 0.0))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        detail = f"{type(error).__name__} {error}"
        raise DataError(
            f"{where}: {detail}; expected one supervision with text, start and duration (lhotse cut "
            "trim-to-supervisions), and one source"
        ) from None
    if len(source.get("channels") or [0]) > 1:
        raise DataError(
            f"{where}: channel {cut.get('channel')} of a file with {len(source['channels'])}, and whole files are read here; "
            "write each channel to a file of its own first, or two voices are mixed"
        )
    if transforms := cut["recording"].get("transforms"):
        raise DataError(
            f"{where}: the recording is changed while lhotse reads it ({excerpt(str(transforms))}), which is not done here; "
            "write its audio to a file first (CutSet.save_audios)"
        )
    if source.get("type") != "file":
        kind = excerpt(str(source.get("type")))
        raise DataError(
            f"{where}: the source is a {kind!r}, which is neither run nor fetched here; write its audio to a file first"
        )
    if not all(isinstance(value, str) and value.strip() for value in (text, audio)) or not isinstance(
        speaker, str | None
    ):
        raise DataError(f"{where}: text, speaker and source must be texts that are not empty")
    _refuse_upwards(audio, where)
    duration_s = _length(offset_s, duration_s, where)
    extra = spoken_with({**_fields(supervision.get("custom")), **supervision})
    if offset_s == 0 and abs(duration_s - whole_s) < 1e-3:
        return Clip(audio, text.strip(), speaker, extra)
    return Clip(audio, text.strip(), speaker, extra, offset_s, duration_s)


def _fields(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _length(start_s: float, duration_s: float, where: str) -> float:
    if not (math.isfinite(start_s) and math.isfinite(duration_s) and start_s >= 0 and duration_s > 0):
        raise DataError(f"{where}: from {start_s:g} s on for {duration_s:g} s; expected a part of the recording")
    return round(duration_s, 6)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line


def _table(path: Path) -> dict[str, str]:
    """Kaldi's tables: a name, blanks, the rest of the line."""
    table: dict[str, str] = {}
    for number, line in _lines(path):
        name, *rest = line.split(maxsplit=1)
        if not rest:
            raise DataError(f"{path}: line {number}: nothing behind {excerpt(name)!r}")
        if name in table:
            raise DataError(f"{path}: line {number}: {excerpt(name)!r} stands there twice")
        table[name] = rest[0].strip()
    return table


def _inside(folder: Path, name: str, where: str) -> Path:
    if not name or "\0" in name or PurePosixPath(name).is_absolute():
        raise DataError(f"{where}: {excerpt(name)!r} is no path inside {folder}")
    _refuse_upwards(name, where)
    return folder / name


def _refuse_upwards(name: str, where: str) -> None:
    if ".." in PurePosixPath(name).parts:
        raise DataError(f"{where}: {excerpt(name)!r} leaves its folder; write the path without ..")
