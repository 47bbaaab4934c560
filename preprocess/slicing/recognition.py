"""What a recognizer hears in pieces that nobody has written down, and which of it is too unsure to train on.

In: pieces on disk. Out: `Heard` for each, kept beside them as soon as it is there, so a killed `slice` hears no piece twice and
other limits need no second hearing. The limits are those below which Whisper's authors call a decoding failed (openai/whisper,
transcribe.py); they retry at a higher temperature, which invents words: here such a piece is skipped, counted and listed.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import soundfile

from preprocess.audio import WHISPER_RATE, mixed
from preprocess.slicing.pieces_folder import CutRecording, Heard, PiecesFolder, digest_of
from preprocess.slicing.recording import sha256_of
from shards.errors import ConfigError, DataError
from shards.printable import first_line
from shards.terminal import progress_bar

INSTALL = "pip install -e '.[slice,asr]'"


class HearingLimits(msgspec.Struct, frozen=True):
    min_log_probability: float = -1.0
    max_no_speech_probability: float = 0.6
    max_compression_ratio: float = 2.4

    def fault(self, heard: Heard) -> str | None:
        """The reason (of `cutting.SKIP_REASONS`) for which a piece is not taken."""
        if not heard.text:
            return "asr_no_text"
        if heard.no_speech_probability > self.max_no_speech_probability:
            return "asr_no_speech"
        if heard.compression_ratio > self.max_compression_ratio:
            return "asr_repeats"
        return None if heard.log_probability >= self.min_log_probability else "asr_unsure"


class Recognizer(Protocol):
    identity: str  # name, version and hash of the model: what it hears depends on nothing else

    def hear(self, wave: np.ndarray) -> Heard:
        """wave [S] float32 at 16 kHz, at most 30 s."""
        ...


def load_recognizer(name: str, language: str, device: str) -> Recognizer:
    """Load by the name of --asr. Raises ConfigError."""
    kind, _, folder = name.partition(":")
    if kind != "faster-whisper" or not folder:
        raise ConfigError(f"--asr {name!r}: no such recognizer; known: faster-whisper:FOLDER")
    path = Path(folder).expanduser()
    if not (path / "model.bin").is_file():
        raise ConfigError(f"--asr {name}: no model.bin there; give a local folder of a faster-whisper model")
    return FasterWhisper(path, language, device)


class FasterWhisper:
    """A CTranslate2 Whisper folder. Raises ConfigError where the package is missing or the folder is not loadable."""

    def __init__(self, folder: Path, language: str, device: str) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise ConfigError(f"--asr needs faster-whisper, {error.name} is not installed: {INSTALL}") from None
        kind = "float16" if device == "cuda" else "int8"
        try:
            self._model: Any = WhisperModel(str(folder), device=device, compute_type=kind, local_files_only=True)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--asr faster-whisper:{folder}: not loadable: {first_line(error)}; give a whole folder"
            ) from None
        if language not in self._model.supported_languages:
            raise ConfigError(f"--language {language!r}: the model knows no such language; give a code like ar")
        self._language = language
        version = importlib.metadata.version("faster-whisper")
        self.identity = f"faster-whisper {version} {kind} {language} {sha256_of(folder / 'model.bin')}"

    def hear(self, wave: np.ndarray) -> Heard:
        segments, _ = self._model.transcribe(
            wave,
            language=self._language,
            beam_size=5,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,  # one segment for all of a piece, so its figures are the piece's
            # The limits are ours: with its own, the library drops a text together with the figures that say why.
            no_speech_threshold=None,
            log_prob_threshold=None,
            compression_ratio_threshold=None,
        )
        found = list(segments)
        if not found:
            return Heard("", 0.0, 1.0, 0.0)
        weights = [max(1, len(segment.tokens)) for segment in found]
        return Heard(
            " ".join(" ".join(segment.text for segment in found).split()),
            float(np.average([segment.avg_logprob for segment in found], weights=weights)),
            max(segment.no_speech_prob for segment in found),
            max(segment.compression_ratio for segment in found),
        )


def hear_pieces(folder: PiecesFolder, cuts: list[CutRecording], recognizer: Recognizer) -> tuple[dict[str, Heard], int]:
    """({file of a piece: what is heard in it}, how many of them were heard by an earlier run). Raises DataError."""
    pieces = [(cut, piece) for cut in cuts for piece in cut.pieces]
    heard: dict[str, Heard] = {}
    num_standing = 0
    with progress_bar("pieces recognized", len(pieces)) as advance:
        for cut, piece in pieces:
            key = digest_of([recognizer.identity, cut.key, piece.start_s, piece.end_s])
            found = folder.heard(piece.file, key)
            num_standing += found is not None
            if found is None:
                found = _hear(folder.path / piece.file, recognizer)
                folder.keep_heard(piece.file, key, found)
            heard[piece.file] = found
            advance()
    return heard, num_standing


def _hear(path: Path, recognizer: Recognizer) -> Heard:
    import soxr

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        wave = mixed(samples)
        if rate != WHISPER_RATE:
            wave = soxr.resample(wave, rate, WHISPER_RATE, quality="HQ")
        heard = recognizer.hear(wave)
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: the recognizer failed: {type(error).__name__}: {first_line(error)}") from None
    return Heard(
        heard.text,
        _known(heard.log_probability, -99.0),
        _known(heard.no_speech_probability, 1.0),
        _known(heard.compression_ratio, 99.0),
    )


def _known(value: float, worst: float) -> float:
    """NaN cannot be written as JSON; it is no reason to trust a text."""
    return round(value, 4) if np.isfinite(value) else worst


def fields_of(heard: Heard) -> dict[str, float]:
    """What a row keeps of it."""
    return {
        "asr_log_probability": heard.log_probability,
        "asr_no_speech_probability": heard.no_speech_probability,
        "asr_compression_ratio": heard.compression_ratio,
    }
