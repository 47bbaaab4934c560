"""Sections of pipeline.toml that only training reads; units and reasons stand in pipeline.toml beside each key."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from shards.config import FeaturesSection, ModelSection, SequenceSection
from shards.delay_pattern import NUM_CODEBOOKS

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # numpy's and torch's generators take no longer ones
# Finite, also when multiplied or summed: TOML has "inf", and what it trains to is not a number.
Weight = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
Share = Annotated[float, msgspec.Meta(gt=0.0, le=1e9)]
CodebookWeights = Annotated[list[Share], msgspec.Meta(min_length=NUM_CODEBOOKS, max_length=NUM_CODEBOOKS)]


class DataSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One entry of [[train.data]]."""

    path: Annotated[str, msgspec.Meta(min_length=1)]  # the OUT folder of `preprocess`, or its URL; shards for a stream
    weight: Share | None = None  # of the audio, against the others' weights


class LoraSection(msgspec.Struct, frozen=True, kw_only=True):
    mode: Literal["comprehensive", "audio_focused", "attention_only", "custom"] = "comprehensive"
    targets: list[str] = []  # module suffixes, for mode "custom"
    rank: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    text_head: bool = False


class LossSection(msgspec.Struct, frozen=True, kw_only=True):
    text_loss_weight: Weight = 1.0
    audio_loss_weight: Weight = 1.0
    codebook_weights: CodebookWeights = msgspec.field(default_factory=lambda: [1.0] * NUM_CODEBOOKS)
    contrastive_loss_weight: Weight = 0.1
    enable_curriculum_learning: bool = False
    curriculum_steps: Positive = 5000


class TrainSection(msgspec.Struct, frozen=True, kw_only=True):
    # Data sets, where the command names none or several
    data: list[DataSource] = []
    data_temperature: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 1.0  # share of a data set ~ hours ** this
    speaker_temperature: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 1.0  # the same of a speaker within one

    # Packs and steps
    seed: Seed = 0
    batch_tokens: Positive | Literal["auto"] = 16384  # "auto": the most that fits
    packs_per_step: Positive = 8
    num_epochs: Positive = 3
    max_steps: NonNegative = 0  # 0: num_epochs decides
    memory_share: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.9  # of the free memory that a step may take
    max_supervised_tokens: NonNegative = 0  # of a pack; 0: no limit of its own
    max_references: NonNegative = 0  # of a pack; 0: no limit

    # Optimizer
    learning_rate: Annotated[float, msgspec.Meta(gt=0.0, le=1e38)] = 1e-4  # float32 holds it
    warmup_steps: NonNegative | Literal["auto"] = "auto"  # 3 % of all steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    weight_decay: Weight = 0.0
    max_grad_norm: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0

    # Validation and the listening set
    validation_fraction: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0  # of the samples, by speaker
    validation_data: str = ""  # another data set instead
    eval_every: Positive = 500
    listening_samples: NonNegative = 4  # spoken at every evaluation; 0: none
    best_by: Literal["audio_loss", "similarity", "cer"] = "audio_loss"  # what RUN/best follows
    patience: NonNegative = 0  # evaluations without a lower held-out audio loss; 0: never stop early

    # Checkpoints and logs
    save_every: Positive = 500
    keep_checkpoints: Positive = 3
    log_every: Positive = 10
    tensorboard: bool = False

    # Order and loading of data
    loader: Literal["plan", "stream"] = "plan"
    order: Literal["random", "short_to_long"] = "random"
    reference: Literal["as_listed", "same_speaker"] = "as_listed"  # "same_speaker": another clip each epoch
    shuffle_window: Positive = 1048576  # samples
    shuffle_buffer: Positive = 2000  # samples, per loader process of a stream
    num_workers: NonNegative = 2
    max_bad_fraction: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.001
    cache_dir: str = "~/.cache/higgs-voice-pipeline/shards"  # copies of remote shards
    cache_gb: Annotated[float, msgspec.Meta(gt=0.0, le=1e9)] = 200.0

    # Device
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 on CUDA, fp32 on CPU
    shard_base: bool = False
    activation_checkpointing: Literal["auto", "off", "full"] = "auto"  # only if packs would not fit otherwise
    attention: Literal["auto", "padded"] = "auto"  # "auto": the fastest way here
    fused_lora: Literal["auto", "on", "off"] = "auto"  # one product with A for layers that read the same rows
    compile: Literal["auto", "on", "off", "aot_eager"] = "auto"  # on CUDA; "aot_eager": graphs without generated code


class EvalSection(msgspec.Struct, frozen=True, kw_only=True):
    score: bool = False  # score the listening set at every evaluation
    similarity: str = "ovfl"  # speaker encoder: ovfl, resemblyzer, wavlm:FOLDER or none
    asr: str = "none"  # recognizer: faster-whisper:FOLDER, whisper:FOLDER or none
    language: str = "ar"  # of the texts, for the recognizer


class WandbSection(msgspec.Struct, frozen=True, kw_only=True):
    mode: Literal["off", "online", "offline"] = "off"
    project: str = "higgs-audio-arabic"


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelSection
    features: FeaturesSection
    sequence: SequenceSection
    lora: LoraSection
    loss: LossSection
    train: TrainSection
    eval: EvalSection
    wandb: WandbSection
