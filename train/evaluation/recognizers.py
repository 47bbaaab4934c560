"""Speech recognition of a wave, to count what can be understood: by a model with a name, a version and a hash.

In: waves at 16 kHz. Out: text as the recognizer writes it. Decoding is greedy and without retries at higher temperatures:
these repeat and invent on odd audio, take ten times as long, and would differ from run to run. What a recognizer gets wrong
it gets wrong for every system, so read differences and the real recording's own rate, not one rate alone.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shards.artifacts import weights_fingerprint
from shards.errors import ConfigError
from shards.json_file import read_json_object
from shards.printable import first_line
from train.evaluation.metric_models import (
    INSTALL_EXTRA,
    SAMPLE_RATE,
    ModelIdentity,
    NotInstalled,
    sha256_of,
    whole_model,
)

KNOWN = "faster-whisper:FOLDER, whisper:FOLDER, none"
FILES = {"faster-whisper": "model.bin", "whisper": "config.json"}  # that a folder of the kind has


class Recognizer(Protocol):
    identity: ModelIdentity

    def text_of(self, wave: np.ndarray) -> str:
        """wave [S] float32 at 16 kHz -> what is said in it; "" for nothing."""
        ...


def load_recognizer(name: str, language: str, device: str = "cpu") -> Recognizer | None:
    """Load by the name of --asr; None for "none". Raises NotInstalled, or ConfigError for what is no recognizer."""
    folder = check_recognizer(name)
    if folder is None:
        return None
    return (FasterWhisper if name.startswith("faster-whisper:") else Whisper)(folder, language, device)


def check_recognizer(name: str) -> Path | None:
    """The folder it names, None for "none"; nothing is loaded. Raises ConfigError for what is no recognizer."""
    kind, _, folder = name.partition(":")
    if name == "none":
        return None
    if not folder or kind not in FILES:
        raise ConfigError(f"--asr {name!r}: no such recognizer; known: {KNOWN}")
    path = Path(folder).expanduser()
    if not (path / FILES[kind]).is_file():
        raise ConfigError(f"--asr {name}: no {FILES[kind]} there; give a local folder of the model")
    return path


class FasterWhisper:
    """A CTranslate2 Whisper folder."""

    def __init__(self, folder: Path, language: str, device: str) -> None:
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise NotInstalled(f"faster-whisper: lacks {error.name}; {INSTALL_EXTRA}") from None
        kind = "float16" if device == "cuda" else "int8"
        try:
            self._model: Any = WhisperModel(str(folder), device=device, compute_type=kind, local_files_only=True)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"--asr faster-whisper:{folder}: not loadable: {error}; give a whole folder") from None
        self._language = language
        version = f"{importlib.metadata.version('faster-whisper')} {kind} {language}"
        self.identity = ModelIdentity(f"faster-whisper:{folder.name}", version, sha256_of(folder / "model.bin"))

    def text_of(self, wave: np.ndarray) -> str:
        segments, _ = self._model.transcribe(
            wave,
            language=self._language,
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            no_repeat_ngram_size=3,
            without_timestamps=True,
        )
        return " ".join(segment.text.strip() for segment in segments)


class Whisper:
    """A Whisper folder of transformers. What is longer than 30 s is read in pieces of 30 s."""

    def __init__(self, folder: Path, language: str, device: str) -> None:
        import transformers

        named = f"--asr whisper:{folder}"
        model = whole_model(transformers.WhisperForConditionalGeneration, folder, named)
        try:
            self._processor: Any = transformers.WhisperProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers has many kinds for files that are missing or damaged
            what = f"{type(error).__name__}: {first_line(error)}"
            raise ConfigError(f"{named}: its processor is not loadable: {what}; give a whole folder") from None
        self._model = model.eval().to(device)
        generation = folder / "generation_config.json"
        config = read_json_object(generation, "a recognizer's settings") if _has_generation(folder) else {}
        self._language = {"language": language, "task": "transcribe"} if config.get("lang_to_id") else {}
        version = f"transformers {transformers.__version__} {language}"
        self.identity = ModelIdentity(f"whisper:{folder.name}", version, weights_fingerprint(folder))

    def text_of(self, wave: np.ndarray) -> str:
        import torch

        texts = []
        for start in range(0, len(wave), 30 * SAMPLE_RATE):
            piece = wave[start : start + 30 * SAMPLE_RATE]
            features = self._processor(piece, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
            with torch.inference_mode():
                ids = self._model.generate(
                    features.to(self._model.device), num_beams=1, do_sample=False, **self._language
                )
            texts.append(self._processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
        return " ".join(text for text in texts if text)


def _has_generation(folder: Path) -> bool:
    return (folder / "generation_config.json").is_file()
