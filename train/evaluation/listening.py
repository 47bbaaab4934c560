"""The listening set: the same few samples, spoken by the model as it is now, as wav files that a person can compare.

    RUN/listening/000000000012/    text.txt, reference.wav, target.wav (both through the codec: the best that can come),
                               then step-000000.wav (the base model), step-000500.wav, ...

In: samples, held-out ones where there are any. Out: the files, and two numbers that losses do not show: how many samples
ended by themselves, and how long they are against the recorded target. The real generation path speaks, with the defaults
of `speak` and a fixed seed. All ranks speak each sample together, since weights may be sharded; the price is that eight
GPUs need as long for it as one. Training is left as it was, to the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shards.encoders.codec import Codec, load_codec, write_wave
from shards.printable import file_name, printable
from shards.sample import Sample
from shards.sequence import SequenceBuilder
from shards.writer import write_bytes
from train.evaluation.held_out import untouched
from train.model.decoder import HiggsAudio
from train.model.generate import Sampling, generate
from train.world import World

LONGEST = 2.0  # times the recorded target; whoever speaks on has not learned to end
SPARE_FRAMES = 25  # a second more, for very short ones
SAMPLING = Sampling()

log = logging.getLogger("train")


@dataclass(frozen=True)
class Listening:
    """Holds the samples; `codec` is there on the first rank only, on the CPU, where it takes no memory of the GPU."""

    samples: list[Sample]
    builder: SequenceBuilder
    codec: Codec | None
    folder: Path
    world: World

    @property
    def folders(self) -> list[Path]:
        """One per sample, inside `folder` whatever its key says; keys of several tars may be equal."""
        wanted = [file_name(sample.key) for sample in self.samples]
        names: list[str] = []
        for number, name in enumerate(wanted):
            if name in names:
                name = f"{name}-{number}"
                while name in wanted or name in names:  # another sample's key
                    name += "_"
            names.append(name)
        return [self.folder / name for name in names]

    def speak(
        self,
        step: int,
        model: HiggsAudio,
        interrupted: Callable[[], bool],
        score: Callable[[int, list[bool]], dict[str, float]] | None = None,
    ) -> dict[str, float]:
        """Write step-N.wav for every sample; returns metrics, none if it was interrupted. Every rank must call this.

        `score`: given the step and which samples ended by themselves, more metrics; on the first rank only.
        """
        lengths, ended = [], []
        with untouched(model, self.world.device), torch.compiler.set_stance("force_eager"):
            for sample, folder in zip(self.samples, self.folders, strict=True):
                target_frames = sample.target_codes.shape[1]
                longest = round(LONGEST * target_frames) + SPARE_FRAMES
                speech = generate(model, self.builder.prompt(sample), longest, SAMPLING, self.world, interrupted)
                if interrupted():
                    return {}
                self._write(folder / f"step-{step:06d}.wav", speech.codes)
                lengths.append(speech.codes.shape[1] / max(1, target_frames))
                ended.append(speech.stopped)
        found = {"eval/speech_ended": float(np.mean(ended)), "eval/speech_length_ratio": float(np.mean(lengths))}
        return found | (score(step, ended) if score else {})

    def begin(self) -> None:
        """The recordings and texts beside which the model's speech will stand."""
        for sample, folder in zip(self.samples, self.folders, strict=True):
            facts = sample.facts
            lines = [
                f"sample {sample.key} ({facts.id}), speaker {facts.speaker}",
                f"reference: {facts.texts[facts.reference_text]}",
                f"target: {facts.texts[facts.target_text]}",
            ]
            if self.world.is_first:
                text = "".join(f"{printable(line)}\n" for line in lines)
                write_bytes(folder / "text.txt", text.encode())
            self._write(folder / "reference.wav", sample.reference_codes)
            self._write(folder / "target.wav", sample.target_codes)

    def waves(self, step: int) -> dict[str, Path]:
        """The files of a step by the names of their samples' folders."""
        return {folder.name: folder / f"step-{step:06d}.wav" for folder in self.folders}

    def _write(self, path: Path, codes: np.ndarray) -> None:
        if self.codec is None:
            return
        try:
            write_wave(path, self.codec.decode(codes))
        except OSError as error:
            log.warning("%s: not written: %s; training goes on", path, error)


def open_listening(
    samples: list[Sample], builder: SequenceBuilder, codec_dir: Path, run_dir: Path, world: World
) -> Listening | None:
    """The listening set with what the first rank has read; None without samples. Every rank must call this.

    Raises CheckpointError when the codec cannot be loaded.
    """
    shared: list[Sample] = world.gather(samples if world.is_first else [])[0]
    if not shared:
        return None
    folder = run_dir / "listening"
    log.info("listening set: samples %s in %s", ", ".join(printable(sample.key) for sample in shared), folder)
    listening = Listening(shared, builder, load_codec(codec_dir) if world.is_first else None, folder, world)
    listening.begin()
    return listening
