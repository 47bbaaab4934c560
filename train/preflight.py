"""Checks before the first optimizer step, on a few samples of the first pack: is what will be learned what should be?

In: the model with its adapter, one small pack, the loss weights. Out: one verdict line each; a failed one stops the run,
because every one of these faults trains to a beautiful loss and a silent model. The surprising decision: a base that
`tiny` marked as random may have losses as high as guessing, and only there that is a warning. The price is some seconds
at the start; random state and gradients are left as they were, so a run is the same with and without it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from shards.delay_pattern import CODEBOOK_SIZE, STREAM_BOS, STREAM_EOS
from shards.errors import PipelineError
from shards.label_shift import IGNORE
from train.config import LossSection
from train.model.batch import PackedBatch
from train.model.decoder import HiggsAudio
from train.model.fsdp import full_tensor
from train.model.lora import group_of, lora_parameters
from train.model.loss import LossCounts, LossTerms, step_losses

NUM_SAMPLES = 8  # enough for neighbours to leak into each other, few enough to cost seconds
# "Well under guessing": the released model is at about half of it on clear speech, a model that reads wrong codes or wrong
# tokens is at or above it. A guess until measured on real weights.
LEARNED_BELOW = 0.9
# Columns that labels are moved by: a lost shift is seen at +1, a double one at -1, a lost delay in codebooks 1 and 2 at -1, -2.
VOTE_MOVES = (-2, -1, 0, 1)
VOTE_MARGIN = 0.05  # of guessing: with a few hundred labels two places that fit alike differ by less; an estimate
UNCHANGED = 1e-3  # of a loss term; bf16 kernels of equal shape repeat exactly, other builds of them may not

log = logging.getLogger("train")


class Verdict(NamedTuple):
    what: str
    ok: bool
    found: str
    only_warns: bool = False


def check_before_training(model: HiggsAudio, batch: PackedBatch, section: LossSection) -> LossTerms:
    """Log a verdict for every check and return the losses at the start. Raises PipelineError naming those that failed."""
    training = model.training
    model.eval()
    with untouched_random_state(batch):
        terms = loss_terms(model, batch)
        verdicts = [
            check_losses(model, terms, batch),
            check_leak(model, terms, batch),
            check_delay(batch),
            check_shift(batch),
            check_vote(model, batch),
            check_supervision(batch),
            check_end_of_speech(batch),
            check_adapter_is_neutral(model, terms, batch),
            check_gradients(model, batch, section),
        ]
    model.train(training)
    report(verdicts)
    return terms


def check_after_first_step(model: HiggsAudio, batch: PackedBatch, start: LossTerms) -> None:
    """The adapter must say something now. Raises PipelineError when losses are still those of the start, without it.

    A first step of a long warm-up may be lost in bf16's rounding; then it must at least stand in the model's own weights.
    """
    training = model.training
    model.eval()
    with untouched_random_state(batch):
        difference = largest_difference(start, loss_terms(model, batch))
        moved = sum(
            full_tensor(weight.abs().sum()).item() for name, weight in lora_parameters(model) if ".lora_B." in name
        )
    model.train(training)
    found = f"losses differ from those of the start by up to {difference:.2g}"
    if moved and not difference:
        found += "; its weights have moved, by less than shows in a loss"
    report([Verdict("adapter after step 1", difference > 0, found, only_warns=moved > 0)])


# --- the checks -----------------------------------------------------------------------------------------------------


def check_losses(model: HiggsAudio, terms: LossTerms, batch: PackedBatch) -> Verdict:
    """A pretrained base already does far better than guessing, if codes, ids and shift are what it was trained on."""
    audio = terms.audio.sum().item() / max(1, int((batch.audio_targets != IGNORE).sum()))
    text = terms.text.sum().item() / max(1, len(batch.text_targets))
    guess_audio, guess_text = math.log(model.config.codebook_vocab), math.log(model.config.vocab_size)
    ok = audio < LEARNED_BELOW * guess_audio and text < LEARNED_BELOW * guess_text
    found = f"audio {audio:.2f} (guessing {guess_audio:.2f}), text {text:.2f} (guessing {guess_text:.2f})"
    if model.config.is_random and not ok:
        found += "; the base has random weights"
    elif not ok:
        found += (
            ", near guessing, so the base was trained on something else: compare model.base and its revision, the codec that "
            "the shards were made with, and sequence.layout"
        )
    return Verdict("step-0 losses", ok, found, only_warns=model.config.is_random)


def check_leak(model: HiggsAudio, terms: LossTerms, batch: PackedBatch) -> Verdict:
    """Changing one column of a target may change no loss of an earlier column, nor of another sample.

    With the delay pattern column j holds frame j - k - 1 of codebook k, so the losses of column j are those of what column
    j + 1 holds: a column is the unit of time here, not a frame.
    """
    columns = (batch.segments == 1).nonzero()[:, 0]  # the first sample's target
    place = len(columns) // 2
    changed_row = columns[place]
    codes = batch.codes.clone()
    real = codes[changed_row] < CODEBOOK_SIZE
    codes[changed_row] = torch.where(real, (codes[changed_row] + 511) % CODEBOOK_SIZE, codes[changed_row])
    after = loss_terms(model, batch.with_codes(codes))
    difference = (after.audio - terms.audio).abs().amax(dim=1)  # [m]
    later = (batch.audio_rows >= changed_row) & (batch.audio_rows <= columns[-1])
    leaked = difference[~later].max().item() if (~later).any() else 0.0
    seen = difference[later].max().item() if later.any() else 0.0
    found = f"changing target column {place} of {len(columns)} moves later losses by {seen:.2g}, others by {leaked:.2g}"
    return Verdict("no leak", leaked <= UNCHANGED and seen > UNCHANGED, found)


def check_delay(batch: PackedBatch) -> Verdict:
    """Every audio starts with its staircase: codebook k has k + 1 BOS, so it runs k columns late."""
    num_codebooks = batch.codes.shape[1]
    book = torch.arange(num_codebooks, device=batch.codes.device)
    staircase = book[None, :] >= book[:, None]  # [K columns, K]: BOS where the codebook has not begun
    segments = batch.segments.unique().tolist()
    wrong = [
        segment
        for segment in segments
        if not torch.equal(batch.codes[batch.segments == segment][:num_codebooks] == STREAM_BOS, staircase)
    ]
    return Verdict("delay pattern", not wrong, f"{len(segments)} audios, {len(wrong)} of them without it")


def check_shift(batch: PackedBatch) -> Verdict:
    """What a column or token must predict is the one after it. Unshifted, the loss falls to nothing and nothing is said."""
    wanted = batch.audio_targets != IGNORE
    following = batch.codes[(batch.audio_rows + 1).clamp(max=len(batch.codes) - 1)]
    wrong_codes = int(((following != batch.audio_targets) & wanted).sum())
    documents = batch.documents
    next_row = documents.order[(documents.place[batch.text_rows] + 1).clamp(max=len(documents.order) - 1)]
    wrong_text = int((batch.text_ids[next_row.clamp(max=len(batch.text_ids) - 1)] != batch.text_targets).sum())
    found = f"{wrong_codes} of {int(wanted.sum())} codes and {wrong_text} of {len(batch.text_targets)} tokens are not the next"
    return Verdict("shift", wrong_codes + wrong_text == 0, found)


def check_vote(model: HiggsAudio, batch: PackedBatch) -> Verdict:
    """The base's own vote on where labels belong: moved by a column or two they must fit worse, in every codebook.

    `check_shift` compares labels with inputs; this compares them with what the base has learned, so it also finds faults
    that are in both. In a codebook where it guesses at every place it has no vote. Measured elsewhere on a
    trained codec LM: 1.87 at the right place, 6.29 one column on (QwenLM/Qwen3-TTS#371).
    """
    if model.config.is_random:
        return Verdict("base's vote on labels", True, "none: the base has random weights")
    moved = moved_labels(batch)
    losses = torch.stack([codebook_losses(model, batch, labels) for labels in moved.values()])  # [moves, K]
    guess = math.log(model.config.codebook_vocab)
    as_given = losses[list(moved).index(0)]
    votes = losses.amin(dim=0) < LEARNED_BELOW * guess  # [K]
    better = votes & (losses < as_given - VOTE_MARGIN * guess).any(dim=0)  # [K]
    lowest = losses.argmin(dim=0)
    mean = ", ".join(f"{move:+d}: {loss:.2f}" for move, loss in zip(moved, losses.mean(dim=1).tolist(), strict=True))
    found = f"mean loss of labels moved by columns {mean}"
    if better.any():
        wrong = [f"codebook {book} by {list(moved)[lowest[book]]:+d}" for book in better.nonzero()[:, 0].tolist()]
        found += f"; better elsewhere: {', '.join(wrong)}"
    elif not votes.all():
        found += f"; no vote in {int((~votes).sum())} codebooks, in which it guesses"
    return Verdict("base's vote on labels", not bool(better.any()), found)


def check_supervision(batch: PackedBatch) -> Verdict:
    """Every codebook must have something to learn."""
    per_codebook = (batch.audio_targets != IGNORE).sum(dim=0).tolist()
    found = f"{len(batch.text_targets)} text, {min(per_codebook)}-{max(per_codebook)} codes per codebook"
    return Verdict("targets", min(per_codebook) > 0, found)


def check_end_of_speech(batch: PackedBatch) -> Verdict:
    """Exactly one end of speech per codebook of every target that is learned."""
    sample = batch.segments[batch.audio_rows] // 2  # [m]
    counts = torch.zeros(len(batch.speakers), batch.audio_targets.shape[1], dtype=torch.long, device=sample.device)
    counts.index_add_(0, sample, (batch.audio_targets == STREAM_EOS).long())
    learned = sample.unique()
    wrong = int((counts[learned] != 1).any(dim=1).sum())
    found = f"{len(learned)} targets, {wrong} of them without exactly one per codebook"
    return Verdict("end of speech", len(learned) > 0 and wrong == 0, found)


def check_adapter_is_neutral(model: HiggsAudio, terms: LossTerms, batch: PackedBatch) -> Verdict:
    """B = 0: training starts from the base model exactly."""
    difference = adapter_difference(model, terms, batch)
    return Verdict(
        "adapter at start", difference <= UNCHANGED, f"losses with and without it differ by up to {difference:.2g}"
    )


def check_gradients(model: HiggsAudio, batch: PackedBatch, section: LossSection) -> Verdict:
    """Every group of trainable weights must receive a finite gradient that is not zero."""
    step_losses(model(batch), LossCounts.of([batch]), section, ramp=1.0).total.backward()
    norms: dict[str, Tensor] = {}
    for name, parameter in lora_parameters(model):
        if parameter.grad is not None:
            squares = full_tensor(parameter.grad.float().pow(2).sum())
            norms[group_of(name)] = norms.get(group_of(name), torch.zeros_like(squares)) + squares
        else:
            norms.setdefault(group_of(name), torch.zeros(()))
        parameter.grad = None
    bad = [f"{group}: {norm.sqrt().item():.2g}" for group, norm in norms.items() if not 0 < norm.item() < math.inf]
    found = f"{len(norms)} groups of LoRA weights" + (f", without a usable one: {', '.join(bad)}" if bad else "")
    return Verdict("gradients", not bad, found)


# --- around them ----------------------------------------------------------------------------------------------------


def loss_terms(model: HiggsAudio, batch: PackedBatch) -> LossTerms:
    with torch.no_grad():
        return model(batch, per_target=True)


def moved_labels(batch: PackedBatch) -> dict[int, Tensor]:
    """{columns moved: labels [m, K]} at the learned rows; only those that are codes of the same target for every move."""
    dense = torch.full_like(batch.codes, IGNORE)
    dense[batch.audio_rows] = batch.audio_targets
    moved: dict[int, Tensor] = {}
    for move in VOTE_MOVES:
        rows = batch.audio_rows + move
        inside = rows.clamp(0, len(dense) - 1)
        same = (rows == inside) & (batch.segments[inside] == batch.segments[batch.audio_rows])
        moved[move] = torch.where(same[:, None], dense[inside], IGNORE)
    everywhere = torch.stack([(labels >= 0) & (labels < CODEBOOK_SIZE) for labels in moved.values()]).all(dim=0)
    return {move: torch.where(everywhere, labels, IGNORE) for move, labels in moved.items()}


def codebook_losses(model: HiggsAudio, batch: PackedBatch, labels: Tensor) -> Tensor:
    """Mean loss [K] of other labels [m, K] at the learned rows, on the CPU."""
    sums = loss_terms(model, dataclasses.replace(batch, audio_targets=labels)).audio.sum(dim=0)
    return (sums / (labels != IGNORE).sum(dim=0).clamp(min=1)).float().cpu()


def adapter_difference(model: HiggsAudio, terms: LossTerms, batch: PackedBatch) -> float:
    """Largest change of a loss term when the adapter is switched off."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trainable = lora_parameters(model)
    for layer in layers:
        layer.enable_adapters(False)
    for _, parameter in trainable:
        parameter.requires_grad_(True)  # switched off with the adapter, which sharding must not see
    without = loss_terms(model, batch)
    for layer in layers:
        layer.enable_adapters(True)
    return largest_difference(terms, without)


def largest_difference(one: LossTerms, other: LossTerms) -> float:
    differences = [(before - after).abs() for before, after in zip(one, other, strict=True) if before.numel()]
    return max(difference.max().item() for difference in differences)


@contextmanager
def untouched_random_state(batch: PackedBatch) -> Iterator[None]:
    device = batch.text_ids.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def report(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        word = "ok  " if verdict.ok else "warn" if verdict.only_warns else "FAIL"
        log.info("preflight %s %-22s %s", word, verdict.what, verdict.found)
    failed = [f"{verdict.what}: {verdict.found}" for verdict in verdicts if not verdict.ok and not verdict.only_warns]
    if failed:
        raise PipelineError(
            f"preflight stopped the run before anything was trained: {'; '.join(failed)}; read a sample with "
            "inspect-shards show KEY --sequence, or train anyway with --skip-preflight"
        )
