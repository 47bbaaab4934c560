"""Scores of the listening set while a run trains: `eval/similarity` to the reference, `eval/cer` of what is recognised.

In: the waves that the listening set has just left in the run. Out: two numbers, or one, by what is installed and named; what is
not is logged once with the line that installs it. A handful of samples says where a run is going, not how good it is: use
`evaluate` for that. Models run on the CPU of the first rank and are let go after each evaluation, so the device keeps its memory;
the price is a second or two of loading. No random number of the training is drawn.
"""

from __future__ import annotations

import gc
import logging
import math
from pathlib import Path

import numpy as np
import torch

from shards.errors import ConfigError
from train.config import EvalSection
from train.evaluation.edits import Edits, character_edits, corpus, failed
from train.evaluation.listening import Listening
from train.evaluation.metric_models import SAMPLE_RATE, NotInstalled
from train.evaluation.recognizers import Recognizer, load_recognizer
from train.evaluation.speaker_encoders import SpeakerEncoder, load_encoder
from train.evaluation.text_protocols import HEADLINE, PROTOCOLS
from train.world import World

log = logging.getLogger("train")


class ListeningScores:
    """Scores the speech of a step. The models are named in `section`; those that cannot be had are skipped and logged."""

    def __init__(self, section: EvalSection, listening: Listening) -> None:
        """Raises ConfigError for a name or a folder that is none."""
        self._section = section
        self._listening = listening
        self.measures = [
            name
            for name, load in (("similarity", self._encoder), ("cer", self._recognizer))
            if self._is_there(name, load)
        ]

    def of_step(self, step: int, ended: list[bool]) -> dict[str, float]:
        """`ended`: of each sample, whether it ended by itself; the text of one that did not counts as all wrong."""
        waves = [self._wave(folder / f"step-{step:06d}.wav") for folder in self._listening.folders]
        found = {}
        for name in self.measures:
            try:
                value = self._similarity(waves) if name == "similarity" else self._cer(waves, ended)
                if not math.isfinite(value):
                    raise ValueError("the score is not finite")
                found[f"eval/{name}"] = value
            except Exception as error:  # whatever somebody else's package raises; other ranks would wait for this one
                log.warning(
                    "step %d: eval/%s not measured: %s: %s; training goes on", step, name, type(error).__name__, error
                )
        gc.collect()
        return found

    def _similarity(self, waves: list[np.ndarray]) -> float:
        encoder = self._encoder()
        assert encoder
        alike = []
        for folder, wave in zip(self._listening.folders, waves, strict=True):
            reference = self._wave(folder / "reference.wav")
            both = len(wave) and len(reference)
            alike.append(float(encoder.embed(wave) @ encoder.embed(reference)) if both else 0.0)
        return float(np.mean(alike))

    def _cer(self, waves: list[np.ndarray], ended: list[bool]) -> float:
        recognizer = self._recognizer()
        assert recognizer
        rule, parts = PROTOCOLS[HEADLINE], list[Edits]()
        for sample, wave, by_itself in zip(self._listening.samples, waves, ended, strict=True):
            asked = rule(sample.facts.texts[sample.facts.target_text])
            recognised = rule(recognizer.text_of(wave)) if len(wave) else ""
            part = character_edits(asked, recognised)
            parts.append(part if by_itself else failed(part))
        return corpus(parts).rate

    def _is_there(self, name: str, load: object) -> bool:
        try:
            return load() is not None  # pyright: ignore[reportCallIssue]
        except NotInstalled as error:
            log.warning("eval.score: eval/%s skipped: %s", name, error)
            return False

    def _encoder(self) -> SpeakerEncoder | None:
        if self._section.similarity == "none":
            return None
        with torch.random.fork_rng(devices=[]):  # a model that is built draws weights before it reads them
            return load_encoder(self._section.similarity)

    def _recognizer(self) -> Recognizer | None:
        with torch.random.fork_rng(devices=[]):
            return load_recognizer(self._section.asr, self._section.language)

    def _wave(self, path: Path) -> np.ndarray:
        """The wave [S] float32 at 16 kHz; an empty one where it could not be written, which was logged."""
        import soundfile
        import soxr

        try:
            wave, rate = soundfile.read(path, dtype="float32")
        except (soundfile.SoundFileError, OSError):
            return np.zeros(0, np.float32)
        return soxr.resample(wave, rate, SAMPLE_RATE, quality="HQ").astype(np.float32)


def open_scores(
    section: EvalSection, best_by: str, listening: Listening | None, world: World
) -> ListeningScores | None:
    """The scores of the first rank; None on others and where none are asked for. Every rank must call this.

    Raises ConfigError for names that are none, and where RUN/best should follow what cannot be measured.
    """
    scores, problem = None, ""
    if section.score and listening and world.is_first:
        try:
            scores = ListeningScores(section, listening)
        except ConfigError as error:
            problem = f"eval: {error}"
    if world.is_first and not problem and best_by != "audio_loss":
        measures = scores.measures if scores else []
        if best_by not in measures:
            has = ", ".join(measures) or "nothing"
            problem = (
                f'train.best_by = "{best_by}": the listening set is scored by {has}; set eval.score = true, '
                f"train.listening_samples from 1 and eval.{'asr' if best_by == 'cer' else 'similarity'}, and install it"
            )
    if problem := world.gather(problem)[0]:
        raise ConfigError(problem)
    return scores
