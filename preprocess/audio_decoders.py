"""From bytes to samples: libsndfile for nearly everything, PyAV for what it lacks.

In: a file's bytes and the segment wanted. Out: `Decoded`. Both are read in blocks, up to one sample more than the longest
clip allowed: a declared length is never trusted with memory. What a decoder raises on damaged bytes, whatever it is, is an
AudioFault of the file.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import soundfile

from preprocess import audio_containers, audio_pyav, mpeg_frames
from preprocess.audio_kinds import CONVERT, Kind, check_form, is_adts, kind_of, unknown
from preprocess.reasons import AudioFault
from preprocess.segment import Segment

BLOCK = 1 << 18  # samples
SEEKABLE = frozenset({"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"})
# What libsndfile knows besides are forms of the 1980s and of samplers: they are read to the end of the bytes, whatever they
# state, so half a file, or two joined ones with a header between them, would pass for one.
KNOWN_FORMS = frozenset({"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "NIST"})


@dataclass(frozen=True)
class Decoded:
    """Samples of the segment; `declared` counts the whole file's, None where its container states no number."""

    samples: np.ndarray  # [S, channels] float32
    sample_rate: int
    declared: int | None


def without_id3(data: bytes) -> bytes:
    """The bytes without an MP3's tag that stands before another format."""
    begin = mpeg_frames.after_id3(data)
    is_other = data[begin : begin + 4] in (b"fLaC", b"OggS", b"RIFF", b"FORM", b"caff") or is_adts(data, begin)
    return data[begin:] if begin and is_other else data


def read_samples(data: bytes, max_duration_s: float, segment: Segment) -> Decoded:
    """Decode a segment, one sample beyond `max_duration_s` at most. Raises AudioFault, and nothing else."""
    try:
        return _read_samples(data, max_duration_s, segment)
    except AudioFault:
        raise
    except MemoryError:
        raise AudioFault("audio_too_large", f"{len(data)} bytes, more than the memory holds when decoded") from None
    except Exception as error:  # damaged bytes make decoders raise anything
        raise AudioFault("audio_unreadable", f"{len(data)} bytes: {type(error).__name__}: {error}") from None


def _read_samples(data: bytes, max_duration_s: float, segment: Segment) -> Decoded:
    kind = kind_of(data)
    if kind and kind.decoder == "none":
        raise AudioFault("audio_unreadable", f"{kind.name}; {kind.advice}")
    if kind:
        return _by_pyav(data, kind, max_duration_s, segment)
    frames = None
    if data[:1] == b"\xff" or data[:3] == b"ID3":
        frames = mpeg_frames.scan(data)
    try:
        if frames:
            return _mpeg(data, frames, max_duration_s, segment)
        return _by_libsndfile(audio_containers.repaired(data), max_duration_s, segment)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        detail = f"{len(data)} bytes: {str(error).rpartition(': ')[2]} {unknown(data)}"
        raise AudioFault("audio_unreadable", detail) from None


class SoundStream(soundfile.SoundFile):
    """A sound file that is read from front to back.

    soundfile seeks after each read of a seekable file; libsndfile's MP3 decoder does not come back to the same samples, and
    FLAC of unknown length and GSM cannot be sought at all.
    """

    def seekable(self) -> bool:
        return False


def _wanted(segment: Segment, max_duration_s: float, sample_rate: int) -> int:
    """How many samples from the segment's start on are read at most."""
    most = int(max_duration_s * sample_rate) + 1
    end = segment.end(sample_rate)
    return most if end is None else min(most, end - segment.start(sample_rate))


def _mpeg(data: bytes, frames: mpeg_frames.MpegFrames, max_duration_s: float, segment: Segment) -> Decoded:
    """MP3 and its elders: their length is a fact where a tag states it, else it is counted."""
    if frames.changes_at and segment.duration_s is None:
        raise AudioFault("audio_several", f"another kind of MPEG audio begins at byte {frames.changes_at}; {CONVERT}")
    if frames.declared is None or frames.declared < frames.count:  # none, or joined files with the first one's count
        if frames.ends_inside_frame and segment.is_whole:
            raise AudioFault("audio_truncated", f"ends inside an MPEG frame, behind {frames.count} whole ones")
        decoded = _by_libsndfile(mpeg_frames.marked(mpeg_frames.with_count(data, frames)), max_duration_s, segment)
        counted = frames.count * frames.num_samples
        declared = decoded.declared or 0  # for layers I and II estimated by all bytes, the mark before them too
        declared = min(declared, counted) if abs(counted - declared) <= 2 * frames.num_samples else None
        return Decoded(decoded.samples, decoded.sample_rate, declared)
    if frames.declared > frames.count + 1 and segment.is_whole:
        raise AudioFault("audio_truncated", f"{frames.count} of {frames.declared} MPEG frames are there")
    return _by_libsndfile(mpeg_frames.marked(data), max_duration_s, segment)


def _by_libsndfile(data: bytes, max_duration_s: float, segment: Segment) -> Decoded:
    with SoundStream(io.BytesIO(data)) as file:
        if file.format not in KNOWN_FORMS:
            detail = f"{file.format_info}: nothing here checks whether it is complete; {CONVERT}"
            raise AudioFault("audio_unreadable", detail)
        check_form(file.channels, file.samplerate)
        declared = file.frames if 0 < file.frames < 1 << 40 else None
        if (
            segment.is_whole and declared and declared > 2 * max_duration_s * file.samplerate
        ):  # an hour is not worth decoding
            stated_s = declared / file.samplerate
            raise AudioFault("audio_too_long", f"{stated_s:.3f} s by its header, at most {max_duration_s:g} s")
        skip = start = segment.start(file.samplerate)
        if start and declared and (file.subtype in SEEKABLE or file.format == "FLAC"):
            file.seek(min(start, declared))
            skip = max(0, start - declared)
        while skip > 0 and len(dropped := file.read(min(skip, BLOCK), dtype="float32", always_2d=True)):
            skip -= len(dropped)  # packed formats seek to a neighbour, so what lies before is decoded and dropped
        wanted = _wanted(segment, max_duration_s, file.samplerate)
        blocks: list[np.ndarray] = []
        while wanted > 0 and skip == 0 and len(block := file.read(min(wanted, BLOCK), dtype="float32", always_2d=True)):
            blocks.append(block)
            wanted -= len(block)
        samples = np.concatenate(blocks) if blocks else np.zeros((0, file.channels), np.float32)
        return Decoded(samples, file.samplerate, declared)


def _by_pyav(data: bytes, kind: Kind, max_duration_s: float, segment: Segment) -> Decoded:
    with audio_pyav.opened(io.BytesIO(data), kind) as sound:
        rate = sound.sample_rate
        position, start, blocks = 0, segment.start(rate), []
        left = _wanted(segment, max_duration_s, rate)
        for samples in sound.frames():
            block = samples[max(0, start - position) :][:left]
            position += len(samples)
            blocks.append(block)
            left -= len(block)
            if left <= 0:
                break
        if segment.is_whole and left > 0:
            sound.check_length(position / rate)
        samples = np.concatenate(blocks) if blocks else np.zeros((0, sound.num_channels), np.float32)
        return Decoded(samples, rate, None)
