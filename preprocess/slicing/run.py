"""MAIN PATH of `preprocess slice`: a folder of recordings in, FLAC pieces and a ChatML list of them out.

A recording is read twice from front to back: once to find speech, once to write the pieces. What is in no piece is
counted by reason. The same command continues after a kill, and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from preprocess.convert import AUDIO_SUFFIXES, Clip, paired_rows, write_list
from preprocess.reasons import AudioFault
from preprocess.slicing.cutting import SKIP_REASONS, CutRules, Piece, Skipped, Unit, cut, units_of
from preprocess.slicing.pieces_folder import CutPiece, CutRecording, PiecesFolder, SkippedPart, digest_of
from preprocess.slicing.recording import Recording, open_recording, sha256_of
from preprocess.slicing.transcripts import SUFFIXES, read_transcript, texts_of_speech, transcript_of
from preprocess.slicing.voice_activity import FRAME_S, VoiceActivity, speech_stretches
from shards.errors import DataError
from shards.folder_lock import hold_folder
from shards.terminal import print_line, print_table, progress_bar

SLICE_RULES = 1  # counted up when the same recording would be cut otherwise


class SliceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for."""

    source: Path
    out: Path
    pieces: Path
    rules: CutRules = CutRules()
    without_text: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A recording under the source folder. `name` begins the names of its pieces."""

    path: Path
    relative: str
    folder: str
    name: str
    transcript: Path | None = None


def slice_folder(request: SliceRequest) -> None:
    """Cut every recording under the folder and write the list. Raises PipelineError."""
    # 1. The recordings, and what says where speech is.
    sources = find_recordings(request.source)
    if not request.without_text:
        sources = with_transcripts(sources)
    voice = VoiceActivity()
    folder = PiecesFolder(request.pieces)
    with hold_folder(request.pieces):
        folder.begin()
        # 2. Each recording into pieces, unless it was.
        cuts: list[CutRecording] = []
        num_standing = 0
        unreadable: list[str] = []
        with progress_bar("recordings", len(sources)) as advance:
            for source in sources:
                try:
                    recording = open_recording(source.path)
                    key = _key(source, request, voice)
                    standing = folder.standing(source.relative, key)
                    cuts.append(standing or cut_recording(source, recording, request, voice, folder, key))
                    num_standing += standing is not None
                except AudioFault as fault:
                    unreadable.append(f"skipped {source.path}: {fault.reason}: {fault.detail}")
                    print_line(unreadable[-1])
                advance()
        if not cuts:
            raise DataError(f"{request.source}: none of {len(sources)} recordings can be read; first: {unreadable[0]}")
        num_removed = folder.remove_others(cuts)
        # 3. The list: every piece is a target, another piece of its speaker is its reference.
        clips = list(_clips(cuts, request))
        if not clips:
            raise DataError(
                f"{request.source}: no piece in {len(cuts)} recordings: {_skipped(cuts) or 'no speech found'}"
            )
        rows, lonely, num_speakers = paired_rows(clips, request.seed)
        if not rows:
            raise DataError(
                f"{request.source}: every speaker has one piece only; cloning needs another one as the reference"
            )
        write_list(request.out, rows)
    # 4. What happened.
    speech_s, cut_s = (
        sum(item.speech_s for item in cuts),
        sum(clip.end_s - clip.start_s for item in cuts for clip in item.pieces),
    )
    table = [
        ("recordings", f"{len(cuts)} of {len(sources)}, {num_standing} of them cut before"),
        ("audio", f"{sum(item.duration_s for item in cuts) / 3600:.3f} h, {speech_s / 3600:.3f} h of it speech"),
        ("pieces", f"{len(clips)} of {num_speakers} speakers, {cut_s / 3600:.3f} h"),
        ("skipped", _skipped(cuts) or "none"),
    ]
    if num_removed:
        table.append(("removed", f"{num_removed} pieces of an earlier run with other rules or recordings"))
    print_table(table)
    for reason in sorted({part.reason for item in cuts for part in item.skipped}):
        print_line(f"{reason}: {SKIP_REASONS[reason]}")
    if lonely:
        print_line(f"skipped: {len(lonely)} pieces whose speaker has no other piece; first {lonely[0]}")
    print_line(f"{request.out}: {len(rows)} rows; the pieces are in {request.pieces}")


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


def with_transcripts(sources: list[Source]) -> list[Source]:
    """Each with the file that says what is said. Raises DataError where one has none, before anything is cut."""
    found = [dataclasses.replace(source, transcript=transcript_of(source.path)) for source in sources]
    lacking = [source.path for source in found if source.transcript is None]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(found)} recordings have no transcript, first {lacking[0]}; put one of its name beside it "
            f"({' '.join(end for end in SUFFIXES if end != '.textgrid')}), or give --without-text"
        )
    for source in found:
        if source.transcript:
            read_transcript(source.transcript)
    return found


def cut_recording(
    source: Source, recording: Recording, request: SliceRequest, voice: VoiceActivity, folder: PiecesFolder, key: str
) -> CutRecording:
    """Listen, choose, write. Raises AudioFault."""
    probabilities, levels = voice.listen(recording.mono_16k())
    duration_s = len(probabilities) * FRAME_S
    if recording.num_samples:
        duration_s = min(duration_s, recording.num_samples / recording.sample_rate)
    units = units_of(speech_stretches(probabilities, levels), request.rules.min_pause_s)
    units = [dataclasses.replace(unit, end_s=min(unit.end_s, duration_s), label=source.folder) for unit in units]
    texts: dict[Unit, str] = {}
    if source.transcript:
        units, texts = _with_texts(units, source.transcript)
    pieces, skipped = cut(units, duration_s, request.rules)
    # Speech without a label was cut apart from the rest so that it is in no other piece.
    silent = [piece for piece in pieces if not piece.units[0].label]
    skipped += [Skipped(piece.units[0].start_s, piece.units[-1].end_s, "no_text") for piece in silent]
    skipped.sort(key=lambda part: part.start_s)
    written: list[CutPiece] = []
    for number, (piece, samples) in enumerate(
        pieces_of(recording, [piece for piece in pieces if piece.units[0].label])
    ):
        file = str(Path(source.folder) / f"{source.name}-{number:06d}.flac")
        num_bytes = folder.write_piece(file, samples, recording.sample_rate, recording.is_wide)
        text = " ".join(filter(None, (texts.get(unit, "") for unit in piece.units)))
        written.append(CutPiece(file, num_bytes, round(piece.start_s, 4), round(piece.end_s, 4), source.folder, text))
    done = CutRecording(
        key=key,
        recording=source.relative,
        duration_s=round(duration_s, 4),
        speech_s=round(sum(unit.end_s - unit.start_s for unit in units), 4),
        pieces=written,
        skipped=[SkippedPart(round(part.start_s, 4), round(part.end_s, 4), part.reason) for part in skipped],
    )
    folder.finish(done)
    return done


def _with_texts(units: list[Unit], transcript: Path) -> tuple[list[Unit], dict[Unit, str]]:
    """Units without a text, or with one for a part of them only, lose their label; a sentence keeps its units together."""
    spoken = texts_of_speech(read_transcript(transcript), [(unit.start_s, unit.end_s) for unit in units])
    labelled: list[Unit] = []
    texts: dict[Unit, str] = {}
    goes_on = False
    for unit, said in zip(units, spoken, strict=True):
        is_known = said.is_covered and (bool(said.text) or goes_on)
        unit = dataclasses.replace(unit, label=unit.label if is_known else "", goes_on=said.goes_on)
        texts[unit] = said.text
        goes_on = said.goes_on
        labelled.append(unit)
    return labelled, texts


def pieces_of(recording: Recording, pieces: list[Piece]) -> Iterator[tuple[Piece, np.ndarray]]:
    """(piece, its samples [n, channels] float32), in order; no more than one piece and one block are in memory."""
    rate = recording.sample_rate
    waiting = iter(pieces)
    piece = next(waiting, None)
    parts: list[np.ndarray] = []
    position = 0
    for block in recording.blocks():
        end = position + len(block)
        while piece:
            first, last = round(piece.start_s * rate), round(piece.end_s * rate)
            if first >= end:
                break
            parts.append(block[max(0, first - position) : last - position])
            if last > end:
                break
            yield piece, np.concatenate(parts)
            parts = []
            piece = next(waiting, None)
        position = end
    if piece and parts:  # the last frame is rounded up
        yield piece, np.concatenate(parts)


def _key(source: Source, request: SliceRequest, voice: VoiceActivity) -> str:
    rules = dataclasses.asdict(request.rules)
    files = [sha256_of(path) for path in (source.path, source.transcript) if path]
    return digest_of([SLICE_RULES, voice.version, rules, request.without_text, source.folder, files])


def _clips(cuts: list[CutRecording], request: SliceRequest) -> Iterator[Clip]:
    for item in cuts:
        for piece in item.pieces:
            extra = {"recording": item.recording, "recording_start_s": piece.start_s, "recording_end_s": piece.end_s}
            yield Clip(str(request.pieces / piece.file), piece.text, piece.speaker, extra)


def _skipped(cuts: list[CutRecording]) -> str:
    counts: Counter[str] = Counter()
    seconds: dict[str, float] = defaultdict(float)
    for part in (part for item in cuts for part in item.skipped):
        counts[part.reason] += 1
        seconds[part.reason] += part.end_s - part.start_s
    return ", ".join(f"{reason} {count} ({seconds[reason]:.1f} s)" for reason, count in sorted(counts.items()))
