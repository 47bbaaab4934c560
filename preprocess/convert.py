"""`preprocess convert`: the neighbours' data sets as a ChatML list.

    metadata   metadata.json of train-higgs-audio: {"samples": [{"audio_file", "transcript_file" or "transcript", "speaker_id"}]}
    csv        audio_file|text|speaker, as F5-TTS and Coqui use it; "," and tab work too
    folder     x.wav beside x.txt or x.lab; the speaker is the folder a file lies in

Every clip becomes a target; its reference is another clip of the same speaker, drawn with a seed, never itself. A speaker
with one clip only cannot be cloned from another one: those clips are skipped and counted.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from preprocess.sources import INSTRUCTION_PREFIX
from shards.errors import DataError
from shards.writer import write_bytes

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
SYSTEM_TEXT = "You are a helpful assistant capable of generating speech in the voice of the provided reference audio."


class Clip(msgspec.Struct, frozen=True):
    audio: str
    text: str
    speaker: str


class Conversion(msgspec.Struct, frozen=True):
    num_rows: int
    num_speakers: int
    lonely_clips: list[str]  # of speakers with one clip


def convert(kind: str, source: Path, out: Path, seed: int) -> Conversion:
    """Write the ChatML list `out` (JSON Lines for .jsonl, else a JSON array). Raises DataError."""
    clips = list(READERS[kind](source))
    if not clips:
        raise DataError(f"{source}: no clip found; expected {EXPECTED[kind]}")
    by_speaker: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        by_speaker[clip.speaker].append(clip)
    lonely = [clips_of[0].audio for clips_of in by_speaker.values() if len(clips_of) == 1]
    rows = [
        chat_row(reference, target)
        for number, clips_of in enumerate(by_speaker.values())
        if len(clips_of) > 1
        for reference, target in pairs(clips_of, np.random.Generator(np.random.Philox(key=[seed, number])))
    ]
    if not rows:
        raise DataError(f"{source}: every speaker has one clip only; cloning needs another clip as the reference")
    if out.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    write_bytes(out, text.encode())
    return Conversion(len(rows), len(by_speaker) - len(lonely), lonely)


def pairs(clips: list[Clip], rng: np.random.Generator) -> Iterator[tuple[Clip, Clip]]:
    """(reference, target) for every clip of one speaker."""
    for number, target in enumerate(clips):
        other = int(rng.integers(len(clips) - 1))
        yield clips[other + (other >= number)], target


def chat_row(reference: Clip, target: Clip) -> dict[str, Any]:
    user = [
        {"type": "text", "text": reference.text},
        {"type": "audio", "audio_url": reference.audio},
        {"type": "text", "text": f"{INSTRUCTION_PREFIX} {target.text}"},
    ]
    assistant = [{"type": "text", "text": target.text}, {"type": "audio", "audio_url": target.audio}]
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_TEXT},
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ],
        "speaker": target.speaker,
    }


# --- the neighbours' forms ------------------------------------------------------------------------------------------


def read_metadata(path: Path) -> Iterator[Clip]:
    path = path / "metadata.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not readable as metadata.json: {error}") from None
    samples = content.get("samples") if isinstance(content, dict) else content
    if not isinstance(samples, list):
        raise DataError(f"{path}: no list of samples; expected {EXPECTED['metadata']}")
    for number, sample in enumerate(samples):
        audio = sample.get("audio_file") if isinstance(sample, dict) else None
        if not audio:
            raise DataError(f"{path}: sample {number} has no audio_file")
        text = sample.get("transcript") or sample.get("text")
        if not text:
            transcript = sample.get("transcript_file") or str(Path(audio).with_suffix(".txt"))
            text = _read_text(path.parent / transcript, f"{path}: sample {number}")
        speaker = sample.get("speaker_id") or sample.get("speaker") or sample.get("speaker_name") or "unknown"
        yield Clip(str(path.parent / audio), text, str(speaker))


def read_csv(path: Path) -> Iterator[Clip]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    delimiter = next((d for d in ("|", "\t", ",") if lines and d in lines[0]), "|")
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    rows = list(csv.reader(lines, delimiter=delimiter, quoting=quoting))
    header = [name.strip().lower() for name in rows[0]] if rows else []
    names = ["audio_file", "text", "speaker"]
    if "audio_file" in header and "text" in header:
        names, rows = header, rows[1:]
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        fields = dict(zip(names, (field.strip() for field in row), strict=False))
        if not fields.get("audio_file") or not fields.get("text"):
            raise DataError(f"{path}: line {number}: {len(row)} fields; expected {EXPECTED['csv']}")
        speaker = fields.get("speaker") or fields.get("speaker_name") or "unknown"
        yield Clip(str(path.parent / fields["audio_file"]), fields["text"], speaker)


def read_folder(path: Path) -> Iterator[Clip]:
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    for audio in sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES):
        texts = [audio.with_suffix(suffix) for suffix in (".txt", ".lab") if audio.with_suffix(suffix).is_file()]
        if not texts:
            raise DataError(f"{audio}: no text beside it; expected {audio.stem}.txt or {audio.stem}.lab")
        inner = audio.parent.relative_to(path)
        yield Clip(str(audio), _read_text(texts[0], str(audio)), str(inner) if inner.parts else path.resolve().name)


def _read_text(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: transcript {path}: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[Clip]]] = {
    "metadata": read_metadata,
    "csv": read_csv,
    "folder": read_folder,
}
EXPECTED = {
    "metadata": '{"samples": [{"audio_file": ..., "transcript_file": ..., "speaker_id": ...}]}',
    "csv": "audio_file|text|speaker on every line",
    "folder": "x.wav beside x.txt or x.lab, a folder per speaker",
}
