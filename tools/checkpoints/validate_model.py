"""`checkpoints validate` of a finished model: a merged folder, a quantized one, or a base.

In: a folder with config.json. Out: a list of `Finding`s in the order of the checks. What the model was made of is known from
higgs_voice.json; where a base or codec is not here, the check says so and counts as failed, as for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from shards.artifacts import codec_fingerprint, load_tokenizer, resolve
from shards.sequence import check_special_tokens
from tools.checkpoints.evaluations import folder_here
from tools.checkpoints.findings import Failed, Finding, all_checked, some
from tools.checkpoints.model_folder import own_conditioning
from tools.speaker import read_voice
from train.model.config import read_model_config
from train.model.probe import probe_logits
from train.model.quantized import read_quantization
from train.model.weights import load_model, read_tensors, stored_dtype


def validate_model(folder: Path) -> list[Finding]:
    """Every check of the model in `folder`."""
    found = _Model(folder)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("settings", found.check_settings),
        ("weights fit the settings", found.check_weights),
        ("finite", found.check_finite),
        ("tokenizer", found.check_tokenizer),
        ("codec", found.check_codec),
        ("differs from its base", found.check_base),
    ]
    return all_checked(checks)


class _Model:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logits: torch.Tensor | None = None

    def check_settings(self) -> str:
        config, quantization = read_model_config(self._folder), read_quantization(self._folder)
        few = f", {len(quantization.modules)} layers in {quantization.bits} bits" if quantization else ""
        return f"{config.num_layers} layers of {config.hidden_size}{few}"

    def check_weights(self) -> str:
        model = load_model(self._folder, stored_dtype(self._folder), conditioning=own_conditioning(self._folder)).eval()
        self._logits = probe_logits(model)
        if not torch.isfinite(self._logits).all():
            raise Failed("logits are not finite on a seeded input")
        return f"{len(model.state_dict())} tensors; logits of a seeded input are finite"

    def check_finite(self) -> str:
        count, broken = 0, []
        for name, tensor in read_tensors(self._folder):
            count += 1
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                broken.append(name)
        if broken:
            raise Failed(f"not finite: {some(broken)}; merge again from a sound checkpoint")
        return f"{count} tensors"

    def check_tokenizer(self) -> str:
        tokenizer = load_tokenizer(self._folder)
        check_special_tokens(tokenizer)
        return f"{tokenizer.get_vocab_size()} tokens, the special ones at their places"

    def check_codec(self) -> str:
        voice = read_voice(self._folder)
        if voice is None:
            return "none is named: no higgs_voice.json, so this is a base model"
        found = codec_fingerprint(resolve(voice.codec, voice.codec_revision, "codec of higgs_voice.json"))
        if found != voice.codec_fingerprint:
            raise Failed(f"{voice.codec} is {found[:16]}, trained with {voice.codec_fingerprint[:16]}")
        return f"{voice.codec}, fingerprint {found[:16]}"

    def check_base(self) -> str:
        voice = read_voice(self._folder)
        if voice is None:
            return "no higgs_voice.json: a base model"
        base = folder_here(voice.base, voice.base_revision)
        if base is None:
            raise Failed(f"not checked: its base {voice.base} is not here")
        if self._logits is None:
            raise Failed("not checked: its weights do not fit")
        before = probe_logits(load_model(base, stored_dtype(base), conditioning=own_conditioning(base)).eval())
        if self._logits.shape != before.shape or not float((self._logits - before).norm()):
            raise Failed(f"its logits are those of its base {voice.base} on a seeded input: merging did nothing")
        return f"logits by {float((self._logits - before).norm() / before.norm()):.2%} on a seeded input"
