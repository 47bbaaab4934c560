"""`preprocess convert`: the neighbours' data sets as a ChatML list.

    metadata   metadata.json of train-higgs-audio: {"samples": [{"audio_file", "transcript_file" or "transcript", "speaker_id"}]}
    csv        audio_file|text|speaker, as F5-TTS and Coqui use it; tab works too, and "," with a header
    folder     x.wav beside x.txt or x.lab; the speaker is the folder a file lies in
    (of published corpora: convert_corpora.py; of the Hugging Face hub: convert_hugging_face.py)

Every clip becomes a target; its reference is another clip of the same speaker, drawn with a seed, never itself nor the same
recording under another suffix. A clip without another one of its speaker is skipped and counted. Nothing is guessed: a field
without a name, a missing speaker, an unknown header or encoding is an error, because a cut transcript would be trained as it is.
"""

from __future__ import annotations

import csv
import json
import re
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from preprocess.list_encoding import encoding_of, named_encoding
from preprocess.list_row import HALF_PAIR, STRICT
from shards.cloning import cloning_messages
from shards.errors import DataError
from shards.writer import write_bytes

if TYPE_CHECKING:
    from preprocess.convert_hugging_face import HuggingFaceSource

PYAV_SUFFIXES = (".m4a", ".mp4", ".webm", ".mka", ".aac", ".wma", ".amr")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", *PYAV_SUFFIXES)

SPOKEN_WITH = ("dialect", "dialect_tag", "accents", "accent", "variant", "locale", "gender", "age")  # kept where said


class Clip(msgspec.Struct, frozen=True):
    audio: str
    text: str
    speaker: str | None  # None: the source names none
    extra: dict[str, Any] = {}  # more of the target's row, to be kept
    offset_s: float = 0.0
    duration_s: float | None = None  # of the part of the file that is meant; None: to its end

    def recording(self) -> str:
        """The same for a.wav and a.flac of one folder, another one for each part of a file."""
        whole = self.audio.removesuffix(Path(self.audio).suffix)
        return whole if self.is_whole else f"{whole} {self.offset_s!r} {self.duration_s!r}"

    @property
    def is_whole(self) -> bool:
        return self.offset_s == 0 and self.duration_s is None


def spoken_with(fields: dict[str, Any]) -> dict[str, Any]:
    """What a source says of how a clip is spoken: its texts and numbers under the names of SPOKEN_WITH."""
    said = {name: fields.get(name) for name in SPOKEN_WITH}
    return {name: value for name, value in said.items() if isinstance(value, str | int) and value != ""}


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
    clips = list(reader_of(kind)(source, ignored))
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


def paired_rows(clips: Iterable[Clip], seed: int) -> tuple[list[dict[str, Any]], list[str], int]:
    """(ChatML rows, audio of clips without another recording of their speaker, number of speakers in the rows)."""
    by_speaker: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        by_speaker[clip.speaker or ""].append(clip)
    rows: list[dict[str, Any]] = []
    lonely: list[str] = []
    num_speakers = 0
    for number, clips_of in enumerate(by_speaker.values()):
        paired = list(pairs(clips_of, np.random.Generator(np.random.Philox(key=[seed, number]))))
        rows += [chat_row(reference, target) for reference, target in paired if reference]
        lonely += [target.audio for reference, target in paired if not reference]
        num_speakers += any(reference for reference, _ in paired)
    return rows, lonely, num_speakers


def write_list(out: Path, rows: list[dict[str, Any]]) -> None:
    """JSON Lines for .jsonl, else a JSON array. Raises DataError for a file name that neither can hold."""
    for row in rows:
        for item in (row["messages"][1]["content"][1], row["messages"][2]["content"][1]):
            if not is_unicode(item["audio_url"]):
                raise DataError(
                    f"{item['audio_url']}: the name is not valid Unicode, so no list can hold it; rename it"
                )
    if out.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        place = text[max(0, error.start - 40) : error.start]
        raise DataError(
            f"{out}: half of a surrogate pair (\\ud800 to \\udfff) behind {place!r}; correct the source"
        ) from None
    write_bytes(out, data)


def is_unicode(name: str) -> bool:
    """False for a file name of other bytes than UTF-8, as old archives have them."""
    return name.isascii() or not HALF_PAIR.search(name)


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


def pairs(clips: list[Clip], rng: np.random.Generator) -> Iterator[tuple[Clip | None, Clip]]:
    """(reference, target) for every clip of one speaker; no reference where all others are the same recording."""
    for number, target in enumerate(clips):
        other = int(rng.integers(len(clips) - 1)) if len(clips) > 1 else 0
        first = other + (other >= number)
        turned = (clips[(first + step) % len(clips)] for step in range(len(clips)))
        yield next((clip for clip in turned if clip.recording() != target.recording()), None), target


def chat_row(reference: Clip, target: Clip) -> dict[str, Any]:
    messages = cloning_messages(reference.text, reference.audio, target.text, target.audio)
    for clip, item in ((reference, messages[1]["content"][1]), (target, messages[2]["content"][1])):
        if not clip.is_whole:
            item["offset"] = clip.offset_s
            if clip.duration_s is not None:
                item["duration"] = clip.duration_s
    return {"messages": messages, "speaker": target.speaker, **target.extra}


# --- the neighbours' forms ------------------------------------------------------------------------------------------


def read_metadata(path: Path, ignored: list[str]) -> Iterator[Clip]:
    path = path / "metadata.json" if path.is_dir() else path
    try:
        content = STRICT.decode(read_text(path))
    except (ValueError, RecursionError) as error:  # JSONDecodeError too
        raise DataError(f"{path}: not readable as metadata.json: {error}") from None
    samples = content.get("samples") if isinstance(content, dict) else content
    if not isinstance(samples, list):
        raise DataError(f"{path}: no list of samples; expected {EXPECTED['metadata']}")
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
                f"{EXPECTED['csv']}, {delimiter!r} between them{quotes}"
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
            raise DataError(f"{path}: line {number}: {len(row)} fields; expected {EXPECTED['csv']}")
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


def read_text(path: Path) -> str:
    """A UTF-8 file's text, lines ending in \\n. Raises DataError that names another encoding and its line."""
    try:
        if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):
            raise DataError(
                f"{path}: not a regular file; write it to a file first"
            )  # a pipe without a writer waits for ever
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    encoding = named_encoding(data[:4])
    if encoding:
        raise DataError(f"{path}: is {encoding}, expected UTF-8; convert it: iconv -f {encoding} -t UTF-8")
    try:
        return re.sub("\r+\n", "\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line}: not UTF-8: {encoding_of(data)}") from None


Reader = Callable[[Path, list[str]], Iterator[Clip]]  # adds the names of what it does not use to the list
CSV_COLUMNS = ("audio_file", "text", "speaker", "speaker_name", "speaker_id")
EXPECTED = {
    "metadata": '{"samples": [{"audio_file": ..., "transcript_file": ..., "speaker_id": ...}]}',
    "csv": "audio_file|text|speaker on every line",
    "folder": "x.wav beside x.txt or x.lab, a folder per speaker",
    "ljspeech": "metadata.csv with id|text beside wavs/",
    "commonvoice": "a .tsv with client_id, path and sentence beside clips/",
    "kaldi": "a folder with wav.scp, text and utt2spk",
    "lhotse": "cuts.jsonl.gz of MonoCuts",
}


def reader_of(kind: str) -> Reader:
    from preprocess import convert_corpora  # it imports this module

    return {
        "metadata": read_metadata,
        "csv": read_csv,
        "folder": read_folder,
        "ljspeech": convert_corpora.read_ljspeech,
        "commonvoice": convert_corpora.read_common_voice,
        "kaldi": convert_corpora.read_kaldi,
        "lhotse": convert_corpora.read_lhotse,
    }[kind]
