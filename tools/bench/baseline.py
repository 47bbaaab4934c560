"""The step a user would run today: transformers' class with peft on right-padded batches; and whether ours computes the same.

In: the weights and samples of `tools.bench.steps`. Out: figures of its steps by batch size, with and without gradient
checkpointing; how far losses and gradients of ours are from it. LoRA is fp32 with dropout 0.05 as in peft's examples, computed
under autocast on a GPU. All its labels are computed, learned or not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.bench.sides import transformers_model
from tools.bench.steps import Shared, Variant, cleaned_up, make_model, peak_gb, rates, timed
from tools.bench.train import padded_batch
from train.config import LossSection
from train.model.batch import pack
from train.model.flops import step_flops
from train.model.fsdp import full_tensor
from train.model.lora import MODES, lora_parameters
from train.model.loss import LossCounts, step_losses

DROPOUT = 0.05
PARITY_SAMPLES = 4
TINY = 1e-30


def measure_padded(
    shared: Shared, size: str, rank: int, batch: int, recompute: bool, seconds_left: Callable[[], float]
) -> dict[str, Any]:
    """Figures of up to `num_steps` steps of `batch` samples."""
    with cleaned_up():
        model = peft_model(shared, size, rank, DROPOUT).train()
        if recompute:
            native = model.get_base_model()
            # transformers renamed it in 5.x.
            enable = getattr(native, "activation_checkpointing_enable", None) or native.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            native.enable_input_require_grads()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        most = min(len(shared.sequences), batch * shared.num_steps)
        groups = [shared.sequences[i : i + batch] for i in range(0, most, batch)]
        batches = [padded_batch(group, shared.device) for group in groups]

        def step(inputs: dict[str, Any]) -> None:
            with autocast(shared):
                loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        took, warm_up_s = timed([lambda b=b: step(b) for b in batches], shared.device, seconds_left)
        done = groups[: len(took)]
        num_tokens = sum(len(sequence) for group in done for sequence in group)
        places = sum(inputs["input_ids"].numel() for inputs in batches[: len(took)])
        packs = [pack([sequence], [0], ["k"]) for group in done for sequence in group]
        flops = step_flops(shared.config, peft_sizes(model), packs)
        return {
            **rates(took, sum(len(group) for group in done), num_tokens),
            "useful_tflops": flops / sum(took) / 1e12,
            "useful_share": num_tokens / places,
            "warm_up_s": warm_up_s,
            "peak_gb": peak_gb(shared.device),
        }


def peft_model(shared: Shared, size: str, rank: int, dropout: float) -> Any:
    from peft import LoraConfig, get_peft_model

    model = transformers_model(size, shared.device, 0, shared.weights)
    targets = MODES["comprehensive"]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets))


def peft_sizes(model: Any) -> dict[str, int]:
    """As `train.model.flops.lora_sizes_of`, of a model whose names begin with peft's prefix."""
    from train.model.lora import PEFT_PREFIX, group_of

    sizes: dict[str, int] = {}
    for name, parameter in lora_parameters(model):
        group = group_of(name.removeprefix(PEFT_PREFIX))
        sizes[group] = sizes.get(group, 0) + parameter.numel()
    return sizes


def autocast(shared: Shared) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if shared.device == "cuda" else nullcontext()


# --- the same numbers -----------------------------------------------------------------------------------------------


def measure_parity(shared: Shared, size: str, variants: dict[str, Variant]) -> dict[str, Any]:
    """Of each variant against transformers + peft without dropout: relative loss difference, least cosine of a gradient.

    The adapters are equal and say something; the reference sees its samples one by one.
    """
    rank = next(iter(variants.values())).rank
    sequences = shared.sequences[:PARITY_SAMPLES]
    batch = pack(sequences, list(range(len(sequences))), [str(i) for i in range(len(sequences))])
    counts = LossCounts.of([batch])
    with cleaned_up():
        expected = reference_results(shared, size, rank, sequences, counts)
    found: dict[str, Any] = {}
    for name, variant in variants.items():
        with cleaned_up():
            model = make_model(shared, variant)
            fill_adapter(model, prefix="")
            sums = model(batch.to(shared.world.device))
            total = step_losses(sums, counts, LossSection(contrastive_loss_weight=0.0), 1.0).total
            total.backward()
            gradients = {plain(n): full_tensor(p.grad) for n, p in lora_parameters(model) if p.grad is not None}
            found[name] = apart(total.item(), gradients, *expected)
    return found


def reference_results(
    shared: Shared, size: str, rank: int, sequences: list[Any], counts: LossCounts
) -> tuple[float, dict[str, Tensor]]:
    from train.model.lora import PEFT_PREFIX

    model = peft_model(shared, size, rank, dropout=0.0).train()
    fill_adapter(model, PEFT_PREFIX)
    native = model.get_base_model()
    total = 0.0
    for sequence in sequences:
        with autocast(shared):
            inputs = padded_batch([sequence], shared.device)
            inputs = {name: value for name, value in inputs.items() if "labels" not in name}
            hidden = native.model(**inputs).last_hidden_state[0]
            text_logits, audio_logits = native.text_lm_head(hidden), native.audio_lm_head(hidden)
        is_audio = torch.from_numpy(sequence.token_ids == 128016).to(hidden.device)
        codebooks = audio_logits[is_audio].float().view(-1, *shared_shape(shared))
        text_targets, targets = (
            torch.from_numpy(labels.astype(np.int64)).to(hidden.device)
            for labels in (sequence.next_token, sequence.next_codes)
        )
        loss = F.cross_entropy(text_logits.float(), text_targets, reduction="sum") / counts.text
        for k in range(codebooks.shape[1]):
            one = F.cross_entropy(codebooks[:, k], targets[k], reduction="sum")
            loss = loss + one / counts.audio[k].item() / codebooks.shape[1]
        loss.backward()
        total += loss.item()
    gradients = {n.removeprefix(PEFT_PREFIX): p.grad for n, p in lora_parameters(model) if p.grad is not None}
    return total, gradients


def shared_shape(shared: Shared) -> tuple[int, int]:
    return shared.config.num_codebooks, shared.config.codebook_vocab


def plain(name: str) -> str:
    """A parameter's native name, whatever the layout of rows wraps around it."""
    return name.replace("model.backbone.", "model.")


@torch.no_grad()
def fill_adapter(model: Any, prefix: str) -> None:
    """The same values for the same layer; with B = 0, as it starts, A would have no gradient."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, parameter in lora_parameters(model):
        seed = sum(map(ord, plain(name.removeprefix(prefix))))
        value = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        value = value.to(parameter.device, parameter.dtype)
        if isinstance(parameter.data, DTensor):
            value = distribute_tensor(value, parameter.data.device_mesh, parameter.data.placements)
        parameter.data.copy_(value)


def apart(
    loss: float, gradients: dict[str, Tensor], expected: float, wanted: dict[str, Tensor]
) -> dict[str, float | int]:
    missing = wanted.keys() ^ gradients.keys()
    if missing:
        raise RuntimeError(f"gradients of one side only: {', '.join(sorted(missing)[:4])}")
    cosines = [
        F.cosine_similarity(gradients[name].float().flatten(), wanted[name].float().flatten(), dim=0).item()
        for name in wanted
    ]
    silent = sum(1 for gradient in gradients.values() if gradient.abs().max().item() < TINY)
    return {
        "loss_difference": abs(loss - expected) / expected,
        "least_cosine": min(cosines),
        "gradients": len(wanted),
        "zero_gradients": silent,
    }
