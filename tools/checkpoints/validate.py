"""`checkpoints validate`: whether a checkpoint can be trusted, every check by name.

In: a checkpoint folder (a run's, copied or renamed). Out: a list of `Finding`s, in the order of the checks. All of them are
made, also after one has failed, except those whose input is not readable: those are "not checked", which counts as failed.
The base is loaded once in its own dtype, because only its logits show that the adapter does something; the price is a
minute and 6 GB for the released model.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from shards.artifacts import load_tokenizer, resolve
from shards.config import read_config
from shards.encoders.tensor_files import load_tensors
from shards.errors import PipelineError
from shards.manifest import Fingerprints, check_fingerprints, open_dataset
from shards.reader import SampleReader
from shards.sequence import SequenceBuilder
from tools.checkpoints.card import AVERAGE
from tools.checkpoints.evaluations import run_of
from tools.checkpoints.findings import Failed, Finding, all_checked, some
from tools.checkpoints.merge import CheckpointConfig, require_config
from tools.checkpoints.sound import faults_of
from tools.evaluate.systems import run_data
from train.model.batch import PackedBatch, pack
from train.model.conditioning import Conditioning, decide_conditioning
from train.model.decoder import HiggsAudio
from train.model.lora import file_name, group_of, load_adapter
from train.model.probe import probe_logits
from train.model.weights import empty_model, load_model, stored_dtype
from train.preflight import NUM_SAMPLES, check_vote
from train.run_folder.checkpoint_folders import read_step
from train.run_folder.identity import find_model_files, model_differences, read_identity
from train.run_folder.state import TENSORS

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW


def validate_checkpoint(folder: Path, data: Path | None = None) -> list[Finding]:
    """Every check of the checkpoint in `folder`; passed means all of them have.

    `data`: whose labels the trained model votes on; by default the data set of its run, where that is here.
    """
    found = _Checkpoint(folder, data)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("files", found.check_files),
        ("step", found.check_step),
        ("metrics", found.check_metrics),
        ("base", found.check_base),
        ("adapter fits the base", found.check_shapes),
        ("finite", found.check_finite),
        ("state equals adapter", found.check_state),
        ("resumable", found.check_moments),
        ("every group acts", found.check_groups),
        ("adapter changes logits", found.check_logits),
        ("its own vote on labels", found.check_vote),
    ]
    return all_checked(checks)


class _Checkpoint:
    """What the checks read, each file once."""

    def __init__(self, folder: Path, data: Path | None) -> None:
        self._folder = folder
        self._data = data
        self._trained: HiggsAudio | None = None
        self._files: dict[str, dict[str, Tensor]] = {}

    def check_files(self) -> str:
        if faults := faults_of(self._folder):
            raise Failed(some(faults))
        count = sum(path.is_file() for path in self._folder.rglob("*"))
        return f"{count} files, every byte as written"

    def check_step(self) -> str:
        return f"{read_step(self._folder)} finished steps"

    def check_metrics(self) -> str:
        """`list`, `compare` and RUN/best judge by them, and take an unreadable file for no metrics at all."""
        path = self._folder / "metrics.json"
        try:
            metrics = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.DecodeError, RecursionError) as error:
            raise Failed(f"metrics.json is not readable: {error}; its losses are lost, its weights are not") from None
        losses = sum(name.startswith("eval/") and name.endswith("_loss") for name in metrics)
        return f"{len(metrics)} values, {losses} of them held-out losses"

    def check_base(self) -> str:
        """Weights, tokenizer, codec and tower, by the fingerprints that the checkpoint keeps."""
        config = read_config(CheckpointConfig, require_config(self._folder / "config.toml"))
        base, conditioning = self._base()
        codec_dir = resolve(config.model.codec, config.model.codec_revision, "model.codec")
        found = find_model_files(base, codec_dir, conditioning)
        trained_on = read_identity(self._folder).model
        differing = [
            f"{what} of {key} is {now}, trained with {was}"
            for what, key, was, now in model_differences(trained_on, found)
        ]
        if differing:
            raise Failed(f"{base}: {some(differing)}")
        return f"{base}, fingerprint {found.base[:16]}"

    def check_shapes(self) -> str:
        base, conditioning = self._base()
        load_adapter(empty_model(base, conditioning), self._folder / "adapter")
        return f"{len(self._adapter())} tensors"

    def check_finite(self) -> str:
        tensors = {**self._adapter(), **self._state()}
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
        if broken:
            raise Failed(f"not finite: {some(broken)}; go back to an older checkpoint")
        return f"{len(tensors)} tensors"

    def check_state(self) -> str:
        """The adapter is what inference loads, the state what a resume loads."""
        adapter = self._adapter()
        weights = {file_name(name.removeprefix("model/")): tensor for name, tensor in self._weights().items()}
        differing = list(weights.keys() ^ adapter.keys())
        differing += [name for name in weights.keys() & adapter.keys() if not torch.equal(weights[name], adapter[name])]
        if differing:
            raise Failed(f"adapter/ and state/ hold other values of {some(sorted(differing))}")
        return f"{len(weights)} tensors, the same in both"

    def check_moments(self) -> str:
        if (self._folder / AVERAGE).is_file():
            return "no: an average has no optimizer's state; it is for merge, speak and evaluate"
        state, weights = self._state(), self._weights()
        lacking = [
            f"{moment} of {name.removeprefix('model/')}"
            for name, tensor in weights.items()
            for moment in MOMENTS
            if not _fits(state.get(f"optimizer/{name.removeprefix('model/')}/{moment}"), tensor, moment)
        ]
        if lacking:
            raise Failed(f"the optimizer's state lacks {some(lacking)}; `train --resume` would refuse it")
        return f"moments of {len(weights)} tensors"

    def check_groups(self) -> str:
        """B of an untrained LoRA layer is zero, so a group whose every B is zero has learned nothing."""
        largest: defaultdict[str, float] = defaultdict(float)
        for name, tensor in self._weights().items():
            if ".lora_A." not in name and ".lora_magnitude_vector." not in name:
                group = group_of(name.removeprefix("model/"))
                largest[group] = max(largest[group], float(tensor.abs().max()))
        idle = [group for group, value in largest.items() if value == 0.0]
        if idle or not largest:
            raise Failed(f"still at its start, as untrained: {some(sorted(idle)) or 'there is no LoRA weight'}")
        return ", ".join(sorted(largest))

    @torch.no_grad()
    def check_logits(self) -> str:
        base, conditioning = self._base()
        model = load_model(base, stored_dtype(base), conditioning=conditioning).eval()
        before = probe_logits(model)
        load_adapter(model, self._folder / "adapter")
        after = probe_logits(model)
        if not torch.isfinite(after).all():
            raise Failed("logits with the adapter are not finite on a seeded input")
        change = float((after - before).norm() / before.norm())
        if change == 0.0:
            raise Failed("logits with and without the adapter are the same on a seeded input: it does nothing")
        self._trained = model
        return f"by {change:.2%} on a seeded input"

    @torch.no_grad()
    def check_vote(self) -> str:
        """As preflight asks the base before training: labels moved by a column or two must fit the trained model worse."""
        if self._trained is None:
            raise Failed("not checked: the adapter could not be loaded, or does nothing")
        data = self._data or self._own_data()
        if data is None:
            return "not asked: its data set is not here; name one with --data"
        batch = labelled_batch(data, self._folder, self._base()[1].name)
        model = self._trained
        model.config = dataclasses.replace(model.config, is_random=False)  # it has been trained
        verdict = check_vote(model, batch)
        if not verdict.ok:
            raise Failed(verdict.found)
        return f"{len(batch.keys)} samples: {verdict.found}"

    def _own_data(self) -> Path | None:
        run = run_of(self._folder)
        try:
            return run_data(run) if run and (run / "environment.json").is_file() else None
        except (PipelineError, msgspec.DecodeError):
            return None

    def _base(self) -> tuple[Path, Conditioning]:
        config = read_config(CheckpointConfig, require_config(self._folder / "config.toml"))
        base = resolve(config.model.base, config.model.revision, "model.base")
        return base, decide_conditioning(config.sequence, config.features, base)

    def _adapter(self) -> dict[str, Tensor]:
        return self._load("adapter/adapter_model.safetensors")

    def _state(self) -> dict[str, Tensor]:
        return self._load(TENSORS)

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._state().items() if name.startswith("model/")}

    def _load(self, name: str) -> dict[str, Tensor]:
        if name not in self._files:
            self._files[name] = load_tensors(self._folder / name)
        return self._files[name]


def labelled_batch(data: Path, checkpoint: Path, conditioning: str) -> PackedBatch:
    """A pack of the first samples of a data set, laid out as the checkpoint was trained. Raises PipelineError."""
    config = read_config(CheckpointConfig, require_config(checkpoint / "config.toml"))
    base = resolve(config.model.base, config.model.revision, "model.base")
    dataset, index = open_dataset(data)
    trained_on = read_identity(checkpoint).model
    check_fingerprints(dataset, Fingerprints(trained_on.codec, trained_on.tokenizer, None))
    section = msgspec.structs.replace(config.sequence, conditioning=conditioning)
    builder = SequenceBuilder(load_tokenizer(base), section)
    reader = SampleReader(data)
    samples = [reader.read(row) for row in index[:NUM_SAMPLES]]
    return pack(
        [builder.training(sample) for sample in samples], [0] * len(samples), [sample.key for sample in samples]
    )


def _fits(moment: Tensor | None, weight: Tensor, name: str) -> bool:
    return moment is not None and (name == "step" or moment.shape == weight.shape)
