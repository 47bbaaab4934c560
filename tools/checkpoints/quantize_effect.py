"""What quantizing did to a model, on samples: losses, logits, and speech that does not end.

In: the model before and after, the same samples and the same seeds. Out: an `Effect`. Speech is cut at twice its recording
and a second more; what has not ended by then counts as running on, because a mean of errors hides the one prompt in thirty that
speaks for minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.label_shift import IGNORE
from shards.sequence import SequenceBuilder
from train.model.batch import pack
from train.model.decoder import HiggsAudio
from train.model.generate import GREEDY, Sampling, generate

if TYPE_CHECKING:
    from shards.sample import Sample
    from tools.evaluate.systems import EvaluateConfig

EXTRA_FRAMES = 25  # a second beyond twice the recording


class Spoken(msgspec.Struct, frozen=True):
    """Of one model, over all samples."""

    audio_loss: float  # mean over codes that are learned, in nats
    greedy_not_ended: int
    sampled_not_ended: int
    not_ended_rate: float  # share of all speech, greedy and sampled, that did not end by itself


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """The quantized model beside the whole one."""

    samples: int
    source: str  # of the samples, without its path
    whole: Spoken
    quantized: Spoken
    audio_loss_difference: float
    logits_kl: float  # KL(whole || quantized), mean over codes that are learned, in nats
    same_likeliest_code: float  # share of those codes, given the right codes before them
    same_greedy_frames: float  # share of frames that both say, when each goes on from its own; an end counts as a frame


@dataclass(frozen=True)
class Samples:
    """What is measured with."""

    samples: list[Sample]
    builder: SequenceBuilder
    source: str
    seed: int = 0


@dataclass(frozen=True)
class Outputs:
    """Of one model; lists by sample."""

    samples: Samples
    logits: list[Tensor]  # [m, K, V] float16 on the CPU, at learned columns
    targets: list[Tensor]  # [m, K]
    greedy: list[np.ndarray]  # [K, T]
    greedy_ended: list[bool]
    sampled_ended: list[bool]


@torch.no_grad()
def measured(model: HiggsAudio, samples: Samples, report_step: Callable[[str], None]) -> Outputs:
    """Logits at the true codes, and speech, greedy and sampled with the sample's own seed."""
    found = Outputs(samples, [], [], [], [], [])
    device = model.audio_lm_head.weight.device
    for number, sample in enumerate(samples.samples):
        batch = pack([samples.builder.training(sample)], [0], [sample.key]).to(device)
        hidden = model.hidden(batch)[batch.text_ids.shape[0] :]
        found.logits.append(model.audio_logits(hidden[batch.audio_rows]).cpu())
        found.targets.append(batch.audio_targets.cpu())
        prompt = samples.builder.prompt(sample)
        most = 2 * sample.target_codes.shape[1] + EXTRA_FRAMES
        greedy = generate(model, prompt, most, GREEDY)
        sampled = generate(model, prompt, most, Sampling(seed=samples.seed + number))
        found.greedy.append(greedy.codes)
        found.greedy_ended.append(greedy.stopped)
        found.sampled_ended.append(sampled.stopped)
        report_step(f"spoke {number + 1}/{len(samples.samples)} samples")
    return found


def compared(whole: Outputs, quantized: Outputs) -> Effect:
    divergence = same = count = 0.0
    for before, after, targets in zip(whole.logits, quantized.logits, whole.targets, strict=True):
        learned = targets != IGNORE
        before_log, after_log = (F.log_softmax(logits[learned].float(), dim=-1) for logits in (before, after))
        divergence += float(F.kl_div(after_log, before_log, log_target=True, reduction="sum"))
        same += int((before_log.argmax(dim=-1) == after_log.argmax(dim=-1)).sum())
        count += int(learned.sum())
    frames = [same_frames(one, other) for one, other in zip(whole.greedy, quantized.greedy, strict=True)]
    ends = list(zip(whole.greedy_ended, quantized.greedy_ended, strict=True))
    frames += [
        (int(all(both) and equal == longer), int(any(both))) for both, (equal, longer) in zip(ends, frames, strict=True)
    ]
    both = (spoken(whole), spoken(quantized))
    return Effect(
        samples=len(whole.logits),
        source=whole.samples.source,
        whole=both[0],
        quantized=both[1],
        audio_loss_difference=both[1].audio_loss - both[0].audio_loss,
        logits_kl=divergence / count,
        same_likeliest_code=same / count,
        same_greedy_frames=sum(equal for equal, _ in frames) / sum(total for _, total in frames),
    )


def spoken(outputs: Outputs) -> Spoken:
    losses = [
        F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        for logits, targets in zip(outputs.logits, outputs.targets, strict=True)
    ]
    count = sum(int((targets != IGNORE).sum()) for targets in outputs.targets)
    not_ended = outputs.greedy_ended.count(False), outputs.sampled_ended.count(False)
    return Spoken(float(torch.stack(losses).sum()) / count, *not_ended, sum(not_ended) / (2 * len(losses)))


def same_frames(one: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """(frames equal in all codebooks at the same place, frames of the longer)."""
    shorter = min(one.shape[1], other.shape[1])
    return int((one[:, :shorter] == other[:, :shorter]).all(axis=0).sum()), max(one.shape[1], other.shape[1])


def read_held_out(data: Path, model_dir: Path, config: EvaluateConfig, limit: int, seed: int) -> Samples:
    """The first samples of a data set's held-out part, or of a RUN's. Raises PipelineError, also for those of another codec."""
    from shards.artifacts import load_tokenizer, tokenizer_fingerprint
    from shards.errors import DataError
    from shards.manifest import Fingerprints, check_fingerprints, open_dataset
    from tools.evaluate.dataset_items import is_dataset, read_samples
    from tools.evaluate.request import Request
    from tools.evaluate.run import open_items
    from tools.speaker import read_voice
    from train.model.conditioning import decide_conditioning

    is_run = (data / "checkpoints").is_dir() and (data / "config.toml").is_file()
    if not is_run and not is_dataset(data):
        raise DataError(f"--data {data}: neither a data set of `preprocess` nor a RUN of `train`; give one of these")
    items, _ = open_items(Request(data=data, out=data, limit=limit), config)
    dataset, _ = open_dataset(Path(items.items[0].dataset))
    voice = read_voice(model_dir)
    section = voice.sequence if voice else config.sequence
    codec = voice.codec_fingerprint if voice else dataset.fingerprints.codec
    check_fingerprints(dataset, Fingerprints(codec, tokenizer_fingerprint(model_dir), None))
    conditioning = decide_conditioning(section, config.features, model_dir)
    builder = SequenceBuilder(
        load_tokenizer(model_dir), msgspec.structs.replace(section, conditioning=conditioning.name)
    )
    source = f"{items.kind} of {Path(items.source).resolve().name}"
    return Samples([sample for _, sample in read_samples(items)], builder, source, seed)
