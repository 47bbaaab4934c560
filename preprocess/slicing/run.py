"""MAIN PATH of `preprocess slice`: a folder of recordings in, FLAC pieces and a ChatML list of them out.

A recording is read twice from front to back: once to find speech, once to write the pieces. What is in no piece is
counted by reason and listed. The same command continues after a kill, and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from preprocess.clip_list import Clip, paired_rows, write_list
from preprocess.reasons import AudioFault
from preprocess.slicing.cutting import CutRules, Piece, Skipped, cut, units_of
from preprocess.slicing.labelling import labelled
from preprocess.slicing.pieces_folder import (
    SKIPPED_FILE,
    CutPiece,
    CutRecording,
    Heard,
    PiecesFolder,
    SkippedPart,
    digest_of,
)
from preprocess.slicing.recognition import HearingLimits, Recognizer, fields_of, hear_pieces
from preprocess.slicing.recording import Recording, open_recording, sha256_of
from preprocess.slicing.recordings_folder import (
    Source,
    find_recordings,
    other_files,
    warn_of_named_speakers,
    with_transcripts,
    with_turns,
)
from preprocess.slicing.report import Outcome, counts_of, print_outcome
from preprocess.slicing.transcripts import read_transcript, texts_without_speech
from preprocess.slicing.voice_activity import FRAME_S, VoiceActivity, loud_elsewhere, speech_stretches
from shards.errors import DataError
from shards.folder_lock import hold_folder
from shards.terminal import print_line, progress_bar

SLICE_RULES = 5  # counted up when the same recording would be cut, or what is skipped told, otherwise
# Whose a piece is: the folder's name, or by turns, whose names mean one person in a recording or in all of them.
Speakers = Literal["folder", "rttm", "rttm-names"]


class SliceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for."""

    source: Path
    out: Path
    pieces: Path
    rules: CutRules = CutRules()
    without_text: bool = False
    speakers: Speakers = "folder"
    limits: HearingLimits = HearingLimits()
    seed: int = 0


def slice_folder(request: SliceRequest, recognizer: Recognizer | None = None) -> None:
    """Cut every recording under the folder and write the list; `recognizer` for those without a transcript.

    Raises PipelineError.
    """
    # 1. The recordings, and what says where speech is.
    if request.pieces.resolve().is_relative_to(request.source.resolve()):
        raise DataError(
            f"{request.pieces}: lies in {request.source}, where the next run would cut the pieces again; give another LIST or "
            "--pieces"
        )
    sources = find_recordings(request.source)
    others = other_files(request.source, sources)
    if not request.without_text:
        sources = with_transcripts(sources, is_needed=recognizer is None)
    if request.speakers == "folder":
        warn_of_named_speakers(sources)
    else:
        sources = with_turns(sources)
    voice = VoiceActivity()
    folder = PiecesFolder(request.pieces)
    with hold_folder(request.pieces):
        folder.begin()
        # 2. Each recording into pieces, unless it was.
        cuts, num_standing = cut_recordings(sources, request, voice, folder)
        num_removed = folder.remove_others(cuts)
        # 3. The texts of those that nobody has written down.
        written_down = {source.relative for source in sources if source.transcript}
        unheard = [item for item in cuts if item.recording not in written_down]
        heard, num_heard_before = hear_pieces(folder, unheard, recognizer) if recognizer else ({}, 0)
        # 4. The list: every piece is a target, another piece of its speaker is its reference.
        clips, skipped = clips_of(cuts, heard, request)
        rows, lonely, num_speakers = paired_rows(clips, request.seed)
        alone = frozenset(lonely)
        skipped += [only_piece(clip) for clip in clips if clip.audio in alone]
        folder.write_skipped(sorted(skipped, key=lambda row: (row["recording"], row["recording_start_s"])))
        counts = counts_of(skipped)
        if not rows:
            what = (
                "every speaker has one piece only; cloning needs another one as the reference" if clips else "no piece"
            )
            raise DataError(
                f"{request.source}: {what} in {len(cuts)} recordings: {counts or 'no speech found'}; see "
                f"{request.pieces / SKIPPED_FILE}"
            )
        write_list(request.out, rows)
    # 5. What happened.
    print_outcome(
        Outcome(
            num_sources=len(sources),
            num_standing=num_standing,
            cuts=cuts,
            num_rows=len(rows),
            num_speakers=num_speakers,
            heard=f"{len(heard)} pieces, {num_heard_before} of them before" if recognizer else "",
            skipped=skipped,
            num_removed=num_removed,
            others=others,
        ),
        request.pieces,
    )
    print_line(f"{request.out}: {len(rows)} rows; the pieces are in {request.pieces}")


def cut_recordings(
    sources: list[Source], request: SliceRequest, voice: VoiceActivity, folder: PiecesFolder
) -> tuple[list[CutRecording], int]:
    """(every recording that can be read, how many were cut by an earlier run). Raises DataError where none can be."""
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
    return cuts, num_standing


def cut_recording(
    source: Source, recording: Recording, request: SliceRequest, voice: VoiceActivity, folder: PiecesFolder, key: str
) -> CutRecording:
    """Listen, choose, write. Raises AudioFault."""
    probabilities, levels = voice.listen(recording.mono_16k())
    duration_s = len(probabilities) * FRAME_S
    if recording.num_samples:
        duration_s = min(duration_s, recording.num_samples / recording.sample_rate)
    stretches = speech_stretches(probabilities, levels)
    units = units_of(stretches, request.rules.min_pause_s)
    units = [dataclasses.replace(unit, end_s=min(unit.end_s, duration_s)) for unit in units]
    units, texts = labelled(units, source, request.speakers == "rttm-names")
    pieces, skipped = cut(units, duration_s, request.rules)
    taken = [(part.start_s, part.end_s) for part in [*pieces, *skipped]]
    skipped += [Skipped(*span, "loud_without_speech") for span in loud_elsewhere(levels, stretches, taken)]
    if source.transcript:
        spans = texts_without_speech(read_transcript(source.transcript), [(unit.start_s, unit.end_s) for unit in units])
        skipped += [Skipped(*span, "text_without_speech") for span in spans]
    written: list[CutPiece] = []
    for number, (piece, samples) in enumerate(pieces_of(recording, pieces)):
        file = str(Path(source.folder) / f"{source.name}-{number:06d}.flac")
        num_bytes = folder.write_piece(file, samples, recording.sample_rate, recording.is_wide)
        text = " ".join(filter(None, (texts.get(unit, "") for unit in piece.units)))
        start_s, end_s = round(piece.start_s, 4), round(piece.end_s, 4)
        written.append(CutPiece(file, num_bytes, start_s, end_s, piece.units[0].label, text))
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
    files = [sha256_of(path) if path else "" for path in (source.path, source.transcript, source.turns)]
    return digest_of([SLICE_RULES, voice.version, rules, source.folder, request.speakers, files])


def clips_of(
    cuts: list[CutRecording], heard: dict[str, Heard], request: SliceRequest
) -> tuple[list[Clip], list[dict[str, Any]]]:
    """(what the list is made of, a row for every part that is in no clip)"""
    clips: list[Clip] = []
    skipped: list[dict[str, Any]] = []
    for item in cuts:
        skipped += [_place(item.recording, part.start_s, part.end_s, reason=part.reason) for part in item.skipped]
        for piece in item.pieces:
            place = _place(item.recording, piece.start_s, piece.end_s)
            path, text = str(request.pieces / piece.file), piece.text
            if said := heard.get(piece.file):
                place |= fields_of(said)
                text = said.text
                if reason := request.limits.fault(said):
                    skipped.append({**place, "reason": reason, "audio": path, "text": text})
                    continue
            clips.append(Clip(path, text, piece.speaker, place))
    return clips, skipped


def only_piece(clip: Clip) -> dict[str, Any]:
    return {**clip.extra, "reason": "only_piece", "audio": clip.audio, "text": clip.text, "speaker": clip.speaker}


def _place(recording: str, start_s: float, end_s: float, **more: Any) -> dict[str, Any]:
    return {"recording": recording, "recording_start_s": start_s, "recording_end_s": end_s, **more}
