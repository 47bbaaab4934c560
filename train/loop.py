"""MAIN PATH of stage two: shards in, a run directory with LoRA checkpoints out.

`train` is the numbered story; `train_step` is the step. Losses are sums divided by what the whole step counted, so the
result does not depend on how a step is cut into packs. A number that is not finite stops the run before the optimizer
touches a weight.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from shards.artifacts import codec_fingerprint, load_tokenizer, mel_fingerprint, resolve, tokenizer_fingerprint
from shards.config import to_toml
from shards.errors import CheckpointError, ConfigError, PipelineError
from shards.manifest import Fingerprints
from shards.sequence import SequenceBuilder
from shards.writer import write_bytes, write_json
from train import checkpoint, preflight
from train.conditioning import decide_conditioning
from train.config import LossSection, TrainConfig
from train.data import Share
from train.feed import Feed
from train.lora import add_lora, lora_parameters, trainable_table
from train.loss import LossCounts, curriculum_factor, step_losses
from train.metrics import Metrics, console_line, log, open_log
from train.optim import learning_rate_at, make_optimizer
from train.packing import PackedBatch
from train.parallel import join_ranks
from train.plan import PLAN_VERSION
from train.sources import PlannedSource
from train.stream import StreamedSource
from train.weights import load_model


@dataclass(frozen=True)
class RunOptions:
    """How to run this time; what to train stands in the configuration."""

    resume: str = "auto"  # auto, never, or a checkpoint folder
    dry_run: bool = False
    skip_preflight: bool = False


def train(config: TrainConfig, shards: str | Path, run_dir: Path, options: RunOptions) -> Path | None:
    """Train to the end and return the last checkpoint; None for a dry run. Raises PipelineError."""
    # 1. The data set, and whether it was made for this model.
    kind = PlannedSource if config.train.loader == "plan" else StreamedSource
    source = kind(str(shards), config.train)
    base_dir = resolve(config.model.base, config.model.revision, "model.base")
    codec_dir = resolve(config.model.codec, config.model.codec_revision, "model.codec")
    expected = Fingerprints(codec_fingerprint(codec_dir), tokenizer_fingerprint(base_dir), mel_fingerprint())
    conditioning = source.check(expected, decide_conditioning(config.sequence, config.features, base_dir))
    sequence = msgspec.structs.replace(config.sequence, conditioning=conditioning.name)
    config = msgspec.structs.replace(config, sequence=sequence)  # "auto" is decided from here on

    # 2. The plan: every epoch follows from lengths and seed alone. The ranks must agree on it.
    ranks = join_ranks()
    if ranks.world_size > 1:
        raise ConfigError(f"{ranks.world_size} processes: training on more than one is not built yet; start one")
    section = config.train
    source.prepare(SequenceBuilder(load_tokenizer(base_dir), config.sequence), run_dir / "plan.json")
    total_steps = source.total_steps
    ranks.require_equal(source.facts(0))

    # 3. The run directory and where to start from.
    start_from = find_start(run_dir, options.resume)
    open_log(run_dir)
    source.describe()
    evaluation = source.evaluation(ranks)
    log.info("layout %s, %s", config.sequence.layout, conditioning)

    # 4. The frozen base with LoRA, and its optimizer.
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if section.device == "auto" else section.device
    )
    bf16 = section.precision == "bf16" or (section.precision == "auto" and device.type == "cuda")
    torch.manual_seed(section.seed)
    model = load_model(base_dir, torch.bfloat16 if bf16 else torch.float32, device, conditioning=conditioning)
    lora_config = add_lora(model, config.lora, config.model.base, section.seed, conditioning)
    describe_model(model)
    optimizer = make_optimizer([parameter for _, parameter in lora_parameters(model)], section)

    # 5. Preflight: what would train to a silent model is found here.
    trial = None
    if options.skip_preflight:
        log.info("preflight skipped: --skip-preflight")
    elif start_from is None:
        trial = source.trial(preflight.NUM_SAMPLES).to(device)
        preflight.check_before_training(model, trial, config.loss)
    if options.dry_run:
        log.info("dry run: everything fits together; nothing was trained")
        return None

    # 6. Resume, or begin.
    identity = make_identity(config, source.digest)
    config_toml = to_toml(config)
    step = checkpoint.restore(start_from, model, optimizer, identity) if start_from else 0
    write_bytes(run_dir / "config.toml", config_toml.encode())
    write_json(run_dir / "environment.json", environment())
    metrics = Metrics(run_dir, config.wandb, msgspec.to_builtins(config), step)
    log.info("step %d of %d%s", step, total_steps, f", resumed from {start_from}" if start_from else "")

    # 7. Steps.
    share = Share(ranks.rank, ranks.world_size, section.num_workers)
    deliveries = source.deliveries(step, share)
    feed = Feed(deliveries, section.packs_per_step, step, device, ranks, source.limits())
    clock = StepClock()
    values: dict[str, float] = {}
    last = start_from
    model.train()
    while step < total_steps:
        with clock.waiting():
            given = next(feed)
        learning_rate = learning_rate_at(step, total_steps, section)
        result = train_step(
            model, optimizer, given.batches, config.loss, step, learning_rate, section.max_grad_norm, given.counts
        )
        clock.count(given.batches)
        step += 1
        if trial is not None:
            preflight.check_after_first_step(model, trial)
            trial = None
        evaluates = evaluation is not None and (step % section.eval_every == 0 or step == total_steps)
        if step % section.log_every == 0 or step in (1, total_steps) or evaluates:
            values = {"epoch": given.epoch, **result.values(), "metrics/learning_rate": learning_rate}
            values |= {**clock.values(device), **feed.values()}
            if evaluation is not None and evaluates:
                values |= evaluation.losses(model, device, config.loss)
                clock = StepClock()  # throughput is that of training
            metrics.write(step, values)
            log.info(console_line(step, total_steps, values))
        if step % section.save_every == 0 or step == total_steps:
            last = checkpoint.save(
                run_dir, step, model, optimizer, lora_config, identity, config_toml, values, section.keep_checkpoints
            )
            log.info("saved %s", last)

    # 8. Done.
    metrics.close()
    return last


# --- one step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepResult:
    """Normalised losses of a step, still on the device, so that an unlogged step needs no synchronisation for them."""

    total: Tensor  # []
    text: Tensor  # []
    codebooks: Tensor  # [K]
    contrastive: Tensor  # []
    grad_norm: Tensor  # []

    def values(self) -> dict[str, float]:
        codebooks = self.codebooks.tolist()
        return {
            "loss/total_loss": self.total.item(),
            "loss/text_loss": self.text.item(),
            "loss/audio_loss": sum(codebooks) / len(codebooks),
            "loss/contrastive_loss": self.contrastive.item(),
            **{f"loss/codebook_{k}": value for k, value in enumerate(codebooks)},
            "metrics/grad_norm": self.grad_norm.item(),
        }


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[PackedBatch],
    section: LossSection,
    step: int,
    learning_rate: float,
    max_grad_norm: float,
    counts: LossCounts | None = None,
) -> StepResult:
    """Gradients of all packs of the step, clip, update. `counts`: their targets, where the loader counted them.

    Raises PipelineError when a number is not finite.
    """
    counts = counts or LossCounts.of(batches)
    ramp = curriculum_factor(step, section.curriculum_steps, section.enable_curriculum_learning)
    parts: list[StepResult] = []
    for batch in batches:
        losses = step_losses(model(batch), counts, section, ramp)
        losses.total.backward()
        zero = torch.zeros_like(losses.total)
        parts.append(StepResult(*(value.detach() for value in losses), grad_norm=zero))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    total = torch.stack([part.total for part in parts]).sum()
    if not (torch.isfinite(total) & torch.isfinite(grad_norm)).item():
        keys = [key for batch in batches for key in batch.keys]
        raise PipelineError(
            f"step {step + 1}: loss {total.item()}, gradient norm {grad_norm.item()}: not finite, stopped before the "
            f"update; samples {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}; lower train.learning_rate or "
            "look at them with inspect-shards show"
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        total,
        torch.stack([part.text for part in parts]).sum(),
        torch.stack([part.codebooks for part in parts]).sum(dim=0),
        torch.stack([part.contrastive for part in parts]).sum(),
        grad_norm,
    )


# --- around the loop ------------------------------------------------------------------------------------------------


class StepClock:
    """Throughput and the share of time spent waiting for data, since the last report."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._waited_s = 0.0
        self._num_samples = self._num_tokens = 0

    def waiting(self) -> StepClock:
        return self

    def __enter__(self) -> None:
        self._wait_start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._waited_s += time.monotonic() - self._wait_start

    def count(self, batches: list[PackedBatch]) -> None:
        self._num_samples += sum(len(batch.keys) for batch in batches)
        self._num_tokens += sum(batch.num_tokens for batch in batches)

    def values(self, device: torch.device) -> dict[str, float]:
        elapsed_s = time.monotonic() - self._start
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        values = {
            "metrics/samples_per_second": self._num_samples / elapsed_s,
            "metrics/tokens_per_second": self._num_tokens / elapsed_s,
            "metrics/data_wait_fraction": self._waited_s / elapsed_s,
            "metrics/gpu_memory_gb": memory / 1e9,
        }
        self.__init__()
        return values


def find_start(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, if any."""
    if resume not in ("auto", "never"):
        folder = Path(resume)
        if not (folder / "COMPLETE").is_file():
            raise CheckpointError(f"--resume {folder}: not a complete checkpoint folder")
        return folder
    checkpoints = checkpoint.complete_checkpoints(run_dir)
    if resume == "never" and checkpoints:
        raise CheckpointError(f"{run_dir}: holds checkpoints of another run; give a new RUN folder or --resume auto")
    return checkpoints[-1] if checkpoints else None


def make_identity(config: TrainConfig, dataset_digest: str) -> checkpoint.Identity:
    return checkpoint.Identity(
        dataset_digest=dataset_digest,
        model_base=config.model.base,
        lora=msgspec.to_builtins(config.lora),
        seed=config.train.seed,
        batch_tokens=config.train.batch_tokens,
        packs_per_step=config.train.packs_per_step,
        max_supervised_tokens=config.train.max_supervised_tokens,
        max_references=config.train.max_references,
        shuffle_window=config.train.shuffle_window,
        order=config.train.order,
        plan_version=PLAN_VERSION,
        loader=config.train.loader,
        validation_fraction=config.train.validation_fraction,
        layout=config.sequence.layout,
        conditioning=config.sequence.conditioning,
    )


def describe_model(model: nn.Module) -> None:
    table = trainable_table(model)
    total = sum(count for _, count in table.values())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - total
    log.info("LoRA trains %s parameters; %s stay frozen", f"{total:,}", f"{frozen:,}")
    for suffix, (modules, count) in table.items():
        log.info("  %-22s %3d modules %12s parameters", suffix, modules, f"{count:,}")


def environment() -> dict[str, str]:
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "host": platform.node(),
    }
