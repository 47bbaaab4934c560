"""`preprocess convert hf`: Hugging Face audio data sets on disk, as `datasets` writes them.

In: a folder of save_to_disk (Dataset or DatasetDict), Parquet shards (of push_to_hub), or an .arrow file.
Out: `Clip`s. Audio that stands in the table as bytes is written to a folder once, named by its hash, so the same command
writes nothing twice. pyarrow reads the tables: `datasets` itself would run what a data set brings along, and decode the audio.
The price: a column is known by its type and name; one that is not is refused with what was found. Rows without audio, text or
speaker are skipped and counted, because nobody can edit such a table by hand.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from preprocess.clip_list import AUDIO_SUFFIXES, SPOKEN_WITH, Clip
from shards.errors import DataError
from shards.json_file import read_json_object
from shards.printable import excerpt, first_line
from shards.writer import write_bytes

INSTALL = "pip install -e '.[hf]'"
TEXT_NAMES = ("text", "sentence", "transcription", "transcript", "normalized_text")
SPEAKER_NAMES = ("speaker", "speaker_id", "speaker_name", "client_id")
SHARD_NAME = re.compile(r"(.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
BATCH_ROWS = 64  # clips of half a megabyte
# First bytes -> ending, where the row's own path says none.
ENDINGS = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff": ".mp3"}


@dataclass
class HuggingFaceSource:
    """What is asked for, and where the audio goes. `skipped` counts rows by what they lack."""

    path: Path
    audio_folder: Path
    split: str | None = None
    text_column: str | None = None
    speaker_column: str | None = None
    ignored: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Columns:
    audio: str
    text: str
    speaker: str | None
    kept: tuple[str, ...]
    labels: dict[str, list[str]]  # names of the classes of columns that hold their numbers

    @property
    def wanted(self) -> list[str]:
        return [self.audio, self.text, *([self.speaker] if self.speaker else []), *self.kept]


def read_hugging_face(source: HuggingFaceSource) -> Iterator[Clip]:
    """Raises DataError."""
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{source.path}: needs pyarrow, which is not installed: {INSTALL}") from None
    folder, files = table_files(source.path, source.split)
    columns: Columns | None = None
    try:
        for file in files:
            table = Table(file)
            found = known_columns(table.schema, folder, file, source)
            if columns and found != columns:
                raise DataError(f"{file}: other columns than in {files[0]}; convert them one by one")
            columns = found
            for number, row in table.rows(columns.wanted):
                if clip := _clip(row, f"{file}: row {number}", folder, columns, source):
                    yield clip
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source.path}: {first_line(error)}") from None


def table_files(path: Path, split: str | None) -> tuple[Path, list[Path]]:
    """(folder that relative paths begin at, Arrow or Parquet files in order) of one split. Raises DataError."""
    if path.is_file() and path.suffix in (".arrow", ".parquet"):
        return path.parent, [path]
    if not path.is_dir():
        raise DataError(f"{path}: no folder of save_to_disk, .arrow or .parquet file")
    if (path / "dataset_dict.json").is_file():
        names = read_json_object(path / "dataset_dict.json", "a DatasetDict").get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path / 'dataset_dict.json'}: no list of splits")
        return table_files(_inside(path, _the_split(path, names, split)), None)
    if (path / "state.json").is_file():
        return path, _saved_files(path, split)
    shards: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        named = SHARD_NAME.fullmatch(file.stem)
        shards.setdefault(named[1] if named else file.stem, []).append(file)
    if not shards:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise DataError(
            f"{path}: found {found}; expected state.json or dataset_dict.json of save_to_disk, or Parquet files"
        )
    files = shards[_the_split(path, list(shards), split)]
    if len(folders := {str(file.parent.relative_to(path)) for file in files}) > 1:
        raise DataError(f"{path}: Parquet files of several sets, in {', '.join(sorted(folders)[:5])}; give one of them")
    return path, files


def _saved_files(path: Path, split: str | None) -> list[Path]:
    state = read_json_object(path / "state.json", "a saved data set's state")
    own = state.get("_split")
    if split and split != own:
        raise DataError(f"{path}: is split {own!r}, not {split!r}")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(f"{path}: holds a selection of its rows; save it anew after flatten_indices()")
    names = state.get("_data_files")
    files = [entry.get("filename") for entry in names if isinstance(entry, dict)] if isinstance(names, list) else []
    named = [_inside(path, name) for name in files if isinstance(name, str)]
    if not named or len(named) < len(files):
        raise DataError(f"{path / 'state.json'}: no _data_files with file names")
    return named


def _the_split(path: Path, names: list[str], asked: str | None) -> str:
    if asked in names:
        return str(asked)
    if asked is None and len(names) == 1:
        return names[0]
    wanted = "give one with --split" if asked is None else f"none is {asked!r}"
    raise DataError(f"{path}: splits {', '.join(names) or 'none'}; {wanted}, so that nothing held out is trained on")


def _inside(folder: Path, name: str) -> Path:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        raise DataError(f"{folder}: {excerpt(name)!r} leaves its folder")
    return folder / name


class Table:
    """One Arrow or Parquet file. Of its columns only those that are asked for are read, a few rows at a time."""

    def __init__(self, file: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._parquet = pyarrow.parquet.ParquetFile(file) if file.suffix == ".parquet" else None
        if self._parquet:
            self.schema: Any = self._parquet.schema_arrow
            return
        mapped = pyarrow.memory_map(str(file))
        is_file_form = mapped.read(6) == b"ARROW1"  # the other form is a stream, what `datasets` writes
        mapped.seek(0)
        self._arrow: Any = pyarrow.ipc.open_file(mapped) if is_file_form else pyarrow.ipc.open_stream(mapped)
        self._is_file_form = is_file_form
        self.schema = self._arrow.schema

    def rows(self, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows with their numbers, from 0 on."""
        position = 0
        for batch in self._batches(columns):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from enumerate(batch.slice(start, BATCH_ROWS).to_pylist(), start=position + start)
            position += batch.num_rows

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        if self._parquet:
            yield from self._parquet.iter_batches(BATCH_ROWS, columns=columns)
        elif self._is_file_form:
            yield from (self._arrow.get_batch(n).select(columns) for n in range(self._arrow.num_record_batches))
        else:
            yield from (batch.select(columns) for batch in self._arrow)


def known_columns(schema: Any, folder: Path, file: Path, source: HuggingFaceSource) -> Columns:
    """Which column is what. Raises DataError with all columns and their types where that is not clear."""
    import pyarrow

    types = {name: schema.field(name).type for name in schema.names}
    shown = ", ".join(f"{name}: {excerpt(str(kind))}" for name, kind in types.items()) or "none"
    features = _features(schema, folder)
    audio = [name for name, kind in types.items() if _is_audio(kind) or features.get(name, {}).get("_type") == "Audio"]
    if len(audio) != 1 or not (_is_audio(types[audio[0]]) or pyarrow.types.is_string(types[audio[0]])):
        raise DataError(
            f"{file}: columns {shown}; expected one audio column, a struct of bytes and path (Audio() of datasets); take others "
            "out (remove_columns)"
        )
    text = _named(types, source.text_column, TEXT_NAMES, "text", file, shown)
    if not text or not (pyarrow.types.is_string(types[text]) or pyarrow.types.is_large_string(types[text])):
        raise DataError(f"{file}: columns {shown}; expected the text as a string; name its column with --text-column")
    speaker = _named(types, source.speaker_column, SPEAKER_NAMES, "speaker", file, shown)
    kept = tuple(name for name in SPOKEN_WITH if name in types and name not in (text, speaker))
    labels = {name: value["names"] for name, value in features.items() if value.get("_type") == "ClassLabel"}
    if not source.ignored:
        source.ignored += [name for name in types if name not in (audio[0], text, speaker, *kept)]
    return Columns(audio[0], text, speaker, kept, {name: names for name, names in labels.items() if name in types})


def _named(
    types: dict[str, Any], asked: str | None, known: tuple[str, ...], what: str, file: Path, shown: str
) -> str | None:
    if asked is not None and asked not in types:
        raise DataError(f"{file}: no column {asked!r}; columns {shown}")
    found = [asked] if asked else [name for name in known if name in types]
    if len(found) > 1:
        raise DataError(f"{file}: {' and '.join(found)} may be the {what}; choose one with --{what}-column")
    return found[0] if found else None


def _is_audio(kind: Any) -> bool:
    import pyarrow

    if not pyarrow.types.is_struct(kind):
        return False
    inner = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
    is_binary = pyarrow.types.is_binary, pyarrow.types.is_large_binary
    return set(inner) == {"bytes", "path"} and any(is_kind(inner["bytes"]) for is_kind in is_binary)


def _features(schema: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """What `datasets` wrote about the columns: into the table, or into dataset_info.json beside it."""
    written = (schema.metadata or {}).get(b"huggingface")
    try:
        if written:
            features = json.loads(written)["info"]["features"]
        elif (folder / "dataset_info.json").is_file():
            features = read_json_object(folder / "dataset_info.json", "a data set's description").get("features", {})
        else:
            return {}
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: the data set's description of its columns is damaged: {error}") from None


def _clip(row: dict[str, Any], where: str, folder: Path, columns: Columns, source: HuggingFaceSource) -> Clip | None:
    text = (row[columns.text] or "").strip()
    speaker = _value(row, columns.speaker, columns.labels, where) if columns.speaker else None
    audio = row[columns.audio]
    data, name = (None, audio) if isinstance(audio, str) else (audio["bytes"], audio["path"]) if audio else (None, None)
    lacks = "text" if not text else "speaker" if columns.speaker and not speaker else ""
    if not lacks and not data and not name:
        lacks = "audio"
    if lacks:
        source.skipped[lacks] += 1
        return None
    extra: dict[str, Any] = {
        name: value for name in columns.kept if (value := _value(row, name, columns.labels, where))
    }
    name = name or ""
    if data:
        path = _written(data, name, source.audio_folder)
        if name:
            extra["source_file"] = name
    else:
        path = Path(name) if PurePosixPath(name).is_absolute() else _inside(folder, name)
        if not path.is_file():
            raise DataError(f"{where}: the audio is neither in the table nor at {path}; embed it, or move it there")
    return Clip(str(path), text, speaker, extra)


def _value(row: dict[str, Any], name: str, labels: dict[str, list[str]], where: str) -> str | None:
    value = row[name]
    if value is None:
        return None
    if name in labels and isinstance(value, int):
        if not 0 <= value < len(labels[name]):
            raise DataError(f"{where}: {name} is class {value} of {len(labels[name])}")
        value = labels[name][value]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: {name} is {excerpt(str(value))!r}; expected a text or a number")
    return str(value).strip() or None


def _written(data: bytes, name: str, folder: Path) -> Path:
    """The file of these bytes, written unless it is there."""
    ending = PurePosixPath(name).suffix.lower()
    if ending not in AUDIO_SUFFIXES:
        ending = next((end for mark, end in ENDINGS.items() if data.startswith(mark)), ".audio")
    digest = hashlib.sha256(data).hexdigest()
    path = folder / digest[:2] / f"{digest[:32]}{ending}"
    if not (path.is_file() and path.stat().st_size == len(data)):
        write_bytes(path, data)
    return path
