"""Whose checkpoint: what must be equal for a run to go on, and for an adapter to be merged or spoken with.

In: the configuration, the folders it names and the data's digests. Out: an `Identity`, kept in every checkpoint as
identity.json, and its differences from another one, in words. Every key of the configuration stands in one of four groups
here; what a key names (a base, a codec, a data set) is compared by content, so folders may be moved and renamed.

The base is known by its settings, the headers of its files and the first 4 kB of each tensor, because reading 6 GB at each
start costs more than the check is worth. The price: a base that differs further on only is taken for the same.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from shards.artifacts import codec_fingerprint, tokenizer_fingerprint, weights_fingerprint
from shards.config import FeaturesSection, ModelSection, parse_toml
from shards.errors import CheckpointError
from shards.printable import redact_values
from train.config import TrainConfig
from train.model.conditioning import Conditioning
from train.model.config import read_model_config

log = logging.getLogger("train")
IDENTITY = "identity.json"
IDENTITY_FORMAT = 2  # 1 held neither codec, tokenizer, tower, held-out data nor system prompt

# Sequences and the plan depend on these, and the shape of what is trained.
MUST_BE_EQUAL = frozenset(
    {
        "sequence.layout", "sequence.conditioning", "sequence.system_prompt", "sequence.reference_text_dropout",
        "lora.mode", "lora.targets", "lora.rank", "lora.alpha", "lora.dropout", "lora.use_rslora", "lora.use_dora",
        "lora.text_head",
        "train.seed", "train.batch_tokens", "train.packs_per_step", "train.max_supervised_tokens", "train.max_references",
        "train.loader", "train.order", "train.shuffle_window", "train.validation_fraction",
        "train.data_temperature", "train.speaker_temperature", "train.reference",
    }
)  # fmt: skip
# Of these, keys that came later are kept only with another value than the default: older checkpoints are without them.
CAME_LATER = {
    "sequence.reference_text_dropout": 0.0,
    "train.data_temperature": 1.0,
    "train.speaker_temperature": 1.0,
    "train.reference": "as_listed",
}
# What they name must be equal; where it lies may change, which is logged.
BY_CONTENT = frozenset(
    {
        "model.base", "model.revision", "model.codec", "model.codec_revision", "features.whisper_model",
        "features.whisper_revision", "train.validation_data", "train.data",
    }
)  # fmt: skip
# Logged when a run goes on with another value.
MAY_CHANGE = frozenset(
    {
        "loss.text_loss_weight", "loss.audio_loss_weight", "loss.contrastive_loss_weight",
        "loss.codebook_weights",
        "loss.enable_curriculum_learning", "loss.curriculum_steps",
        "train.num_epochs", "train.max_steps", "train.learning_rate", "train.warmup_steps", "train.schedule",
        "train.weight_decay", "train.max_grad_norm", "train.memory_share", "train.eval_every", "train.listening_samples",
        "train.patience", "train.save_every", "train.keep_checkpoints", "train.log_every", "train.shuffle_buffer",
        "train.num_workers", "train.max_bad_fraction", "train.device", "train.precision", "train.shard_base",
        "train.activation_checkpointing", "train.attention", "train.fused_lora", "train.compile",
        "train.best_by", "eval.score", "eval.similarity", "eval.asr", "eval.language",
    }
)  # fmt: skip
# Of stage one, or of where copies and curves go: no number of the run depends on them.
NO_EFFECT = frozenset(
    {"features.whisper", "train.tensorboard", "train.cache_dir", "train.cache_gb", "wandb.mode", "wandb.project"}
)

BATCH_TOKENS = "train.batch_tokens"
NAMED_BY = {
    "base": "model.base",
    "tokenizer": "model.base",
    "codec": "model.codec",
    "whisper": "features.whisper_model",
}
WHAT = {"base": "base", "tokenizer": "tokenizer", "codec": "codec", "whisper": "Whisper tower"}


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Fingerprints of what an adapter was trained on."""

    base: str  # settings and weights
    tokenizer: str
    codec: str
    whisper: str = ""  # of a tower beside the base; "" where there is none

    def named(self) -> dict[str, str]:
        return {f"the {what}": getattr(self, part) for part, what in WHAT.items()}


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal for a run to go on: another value means another run."""

    format: int = IDENTITY_FORMAT
    model: ModelFiles
    dataset_digest: str
    validation_digest: str  # of train.validation_data; "" without
    plan_version: int
    settings: dict[str, Any]  # values of MUST_BE_EQUAL
    data_weights: list[float] | msgspec.UnsetType = msgspec.UNSET  # of [[train.data]], in order; unset: none were given

    @property
    def batch_tokens(self) -> int:
        return self.settings[BATCH_TOKENS]


def find_model_files(base_dir: Path, codec_dir: Path, conditioning: Conditioning) -> ModelFiles:
    """Fingerprints of the files in these folders. Reads the codec whole (0.8 GB of the released one), of base and tower 4 kB
    of each tensor. Raises PipelineError for what is not a model, a tokenizer or a codec."""
    tower = conditioning.tower_dir
    return ModelFiles(
        base=base_fingerprint(base_dir),
        tokenizer=tokenizer_fingerprint(base_dir),
        codec=codec_fingerprint(codec_dir),
        whisper=weights_fingerprint(tower) if tower and tower != base_dir else "",
    )


def base_fingerprint(base_dir: Path) -> str:
    """Weights (`weights_fingerprint`) and the settings that the model computes with, whatever else config.json says."""
    settings = replace(read_model_config(base_dir), is_random=False)
    return hashlib.sha256(f"{weights_fingerprint(base_dir)} {settings}".encode()).hexdigest()


def make_identity(
    config: TrainConfig, model: ModelFiles, dataset_digest: str, validation_digest: str, plan_version: int
) -> Identity:
    """`config` with a number for train.batch_tokens and the conditioning that is in force."""
    values = config_values(config)
    assert values[BATCH_TOKENS] != "auto", "settled before"
    weights = [source.weight for source in config.train.data if source.weight is not None]
    return Identity(
        model=model,
        dataset_digest=dataset_digest,
        validation_digest=validation_digest,
        plan_version=plan_version,
        settings={
            key: values[key] for key in sorted(MUST_BE_EQUAL) if key not in CAME_LATER or values[key] != CAME_LATER[key]
        },
        data_weights=[weight / sum(weights) for weight in weights] if weights else msgspec.UNSET,
    )


def config_values(config: TrainConfig) -> dict[str, Any]:
    """ "section.key" -> value, as TOML holds it."""
    return flat(msgspec.to_builtins(config))


def flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


# --- checks ---------------------------------------------------------------------------------------------------------


def read_identity(folder: Path) -> Identity:
    """What a checkpoint's run is made of. Raises CheckpointError when the file is not readable."""
    path = folder / IDENTITY
    try:
        data = path.read_bytes()
        if msgspec.json.decode(data, type=dict[str, Any]).get("format") != IDENTITY_FORMAT:
            raise CheckpointError(
                f"{path}: of another version, which kept less: which codec, tokenizer and prompt it was trained with is not "
                "known; train anew, or go on with the version that wrote it"
            )
        identity = msgspec.json.decode(data, type=Identity)
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable: {error}; give a checkpoint folder that `train` wrote") from None
    budget = identity.settings.get(BATCH_TOKENS)
    if type(budget) is not int or budget < 1:
        raise CheckpointError(f"{path}: {BATCH_TOKENS} is {budget!r}, expected a number from 1; the file was changed")
    return identity


def check_identity(folder: Path, now: Identity) -> None:
    """Raises CheckpointError naming both values of everything that makes a checkpoint's run another one than this."""
    before = read_identity(folder)
    differing = [f"{what}: trained with {was}, now {found}" for what, was, found in differences(before, now)]
    if differing:
        raise CheckpointError(
            f"{folder}: belongs to another run: {'; '.join(differing)}; restore those settings or give a new RUN folder"
        )


def differences(before: Identity, now: Identity) -> Iterator[tuple[str, str, str]]:
    """(what, its value then, its value now)."""
    for what, key, was, found in model_differences(before.model, now.model):
        yield f"{what} ({key})", was, found
    if before.dataset_digest != now.dataset_digest:
        yield "the data set", before.dataset_digest[:16], now.dataset_digest[:16]
    if before.validation_digest != now.validation_digest:
        none = "no data set"
        yield "train.validation_data", before.validation_digest[:16] or none, now.validation_digest[:16] or none
    if before.plan_version != now.plan_version:
        yield "the way of planning", str(before.plan_version), str(now.plan_version)
    if before.data_weights != now.data_weights:
        yield "the weights of train.data", _shown_weights(before), _shown_weights(now)
    for key in sorted(before.settings.keys() | now.settings.keys()):
        was, found = (one.settings.get(key, CAME_LATER.get(key)) for one in (before, now))
        if was != found:
            yield key, shown(was), shown(found)


def _shown_weights(identity: Identity) -> str:
    weights = identity.data_weights
    return "none" if weights is msgspec.UNSET else " : ".join(f"{weight:.4g}" for weight in weights)


def model_differences(before: ModelFiles, now: ModelFiles) -> Iterator[tuple[str, str, str, str]]:
    """(what, the key that names it, its fingerprint then, its fingerprint now)."""
    for part, what in WHAT.items():
        was, found = getattr(before, part), getattr(now, part)
        if was != found:
            yield what, NAMED_BY[part], was[:16] or "none", found[:16] or "none"


def check_model_files(
    folder: Path, found: ModelFiles, model: ModelSection, features: FeaturesSection, next_step: str
) -> None:
    """Raises CheckpointError where the checkpoint in `folder` was trained on other files than `found`.

    The sections are those that named the files, for the message; `next_step`: what to do about it.
    """
    before = read_identity(folder).model
    places = {"model.base": model.base, "model.codec": model.codec, "features.whisper_model": features.whisper_model}
    differing = [
        f"{what} of {key} = {places[key]!r} is {now}, trained with {was}"
        for what, key, was, now in model_differences(before, found)
    ]
    if differing:
        raise CheckpointError(f"{folder}: trained with another model: {'; '.join(differing)}; {next_step}")


def check_adapter(adapter: Path, found: ModelFiles, model: ModelSection, features: FeaturesSection) -> None:
    """`check_model_files` for an adapter folder, by the checkpoint that it lies in; without one it is logged that nothing
    is known of its base."""
    folder = adapter.resolve().parent
    if (folder / IDENTITY).is_file():
        check_model_files(folder, found, model, features, "give MODEL and model.codec that it was trained with")
    else:
        log.warning(
            "%s: no %s beside it, so whether it was trained on this model is not checked; give it inside its "
            "checkpoint folder to have it checked",
            adapter,
            IDENTITY,
        )


# --- what may change ------------------------------------------------------------------------------------------------


def log_changes(folder: Path, config: TrainConfig) -> None:
    """Log each setting that may change and did since the checkpoint was written."""
    for line in changes(folder, config):
        log.info("changed since %s: %s", folder.name, line)


def changes(folder: Path, config: TrainConfig) -> list[str]:
    """ "key old -> new" of each; where the configuration cannot be read, that."""
    try:
        before = flat(parse_toml((folder / "config.toml").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return [f"not known: config.toml is not readable: {error}"]
    now = flat(redact_values(msgspec.to_builtins(config)))  # config.toml holds no tokens of URLs either
    return [
        f"{key} {shown(before[key])} -> {shown(now[key])}"
        for key in sorted(MAY_CHANGE | BY_CONTENT)
        if key in before and before[key] != now[key]
    ]


def shown(value: Any) -> str:
    """A value in a message; a long text is cut."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
