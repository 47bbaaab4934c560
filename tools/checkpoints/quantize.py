"""Quantize: the linear layers of a model's decoder in 8 or 4 bits, and in numbers what that did to it.

In: a model folder of any layout, and perhaps samples to measure with. Out: a folder in the native layout, with quantize.json,
which `speak` and `evaluate` load. torchao chooses numbers and scales (weights only: 8 bits with a scale per row, 4 bits with
one per 32 weights). Heads, embeddings, norms, codec and Whisper tower stay as they are: quantized heads and codecs are what
others hear as noise. The surprising decision: what was written is loaded again and must say what was measured, to the last
bit, which costs a second loading.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from shards.errors import CheckpointError, ConfigError
from shards.json_file import read_json_object
from tools.checkpoints.model_folder import check_empty, own_conditioning, write_model_folder
from tools.checkpoints.quantize_effect import Effect, Samples, compared, measured
from tools.checkpoints.quantized_card import is_hub_id, quantized_card
from train.model.config import read_model_config
from train.model.decoder import HiggsAudio
from train.model.lora import group_of
from train.model.probe import probe_logits
from train.model.quantized import Quantization, packed, put_quantized, refuse_quantized
from train.model.weights import load_model, stored_dtype

GROUP_OF_4_BITS = 32
FOUR_BITS: Any = torch.__dict__["int4"]  # which torch's stubs do not declare
REPORT = "quantize.json"
EXTRA = "pip install -c constraints.txt -e '.[quantize]'"


class Layer(msgspec.Struct, frozen=True):
    """A quantized one: its bits and how far it is from the whole."""

    qdata: Tensor
    scale: Tensor
    snr_db: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """quantize.json, which is published with the folder: no path of this machine stands in it."""

    source: str  # id of the hub, or the name of the folder
    bits: int
    group_size: int  # 0: a scale per row
    torchao: str
    bytes_before: int  # of all weights
    bytes_after: int
    linears_bytes_before: int  # of those that were quantized
    linears_bytes_after: int
    snr_db: dict[str, float]  # by layer
    snr_db_of_groups: dict[str, float]  # the lowest of each group of layers
    probe_logits_change: float  # ||quantized - whole|| / ||whole||, on one seeded input
    effect: Effect | None  # on samples
    not_measured: list[str]

    @property
    def factor(self) -> float:
        return self.bytes_before / self.bytes_after


def quantize_model(
    folder: Path,
    out: Path,
    bits: Literal[4, 8],
    samples: Samples | None,
    device: str = "cpu",
    report_step: Callable[[str], None] = lambda line: None,
    name: str = "",
) -> Report:
    """Write the quantized model into `out`. `name`: of the model for its card, where it is the hub's.

    Raises CheckpointError, also where nothing would change."""
    check_empty(out)
    torchao = import_torchao()
    config = read_model_config(folder)
    refuse_quantized(folder, "they cannot be quantized again")
    stored = stored_dtype(folder)
    model = load_model(
        folder,
        torch.bfloat16 if device == "cuda" else torch.float32,
        device,
        conditioning=own_conditioning(folder),
    ).eval()
    codec = audio_tokenizer_id(folder)

    # 1. The whole model's answers, then its layers in few bits, then the same questions again.
    before = measured(model, samples, report_step) if samples else None
    whole_logits = probe_logits(model)
    weights_before = sizes(model, stored)
    quantization, layers = quantize_layers(model, bits, stored, report_step)
    for name, layer in layers.items():
        set_layer(model, name, layer)
    logits = probe_logits(model)
    if torch.equal(logits, whole_logits):
        raise CheckpointError(f"{folder}: nothing changed: its logits are the same as before; nothing was written")
    if not torch.isfinite(logits).all():
        raise CheckpointError(f"{folder}: the quantized model's logits are not finite; nothing was written")
    effect = compared(before, measured(model, samples, report_step)) if samples and before else None
    weights_after = sizes(model, stored)
    named = {f"{name}.weight" for name in layers}

    # 2. The folder, and whether what stands in it is what was measured.
    report = Report(
        source=name if is_hub_id(name) else folder.resolve().name,
        bits=bits,
        group_size=quantization.group_size,
        torchao=torchao,
        bytes_before=sum(weights_before.values()),
        bytes_after=sum(weights_after.values()),
        linears_bytes_before=sum(weights_before[name] for name in named),
        linears_bytes_after=sum(size for name, size in weights_after.items() if name not in weights_before),
        snr_db={name: round(layer.snr_db, 2) for name, layer in layers.items()},
        snr_db_of_groups=lowest_of_groups(layers),
        probe_logits_change=float((logits - whole_logits).norm() / whole_logits.norm()),
        effect=effect,
        not_measured=[] if samples else ["loss, agreement and ends of speech: name samples with --data DATA"],
    )
    state = {
        name: tensor.detach().to("cpu", stored if isinstance(tensor, nn.Parameter) else None)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    del model
    write_model_folder(
        out,
        state,
        config,
        "native",
        tokenizer_dir=folder,
        codec=codec,
        quantization=quantization,
        reports={REPORT: report},
        texts=quantized_card(folder, name, report),
        check=lambda written: check_written(written, logits, device),
    )
    return report


def import_torchao() -> str:
    """Its version. Raises ConfigError where it is not installed."""
    try:
        import torchao
    except ImportError as error:
        raise ConfigError(f"torchao is not installed ({error}): {EXTRA}") from None
    return torchao.__version__


def quantize_layers(
    model: HiggsAudio, bits: Literal[4, 8], stored: torch.dtype, report_step: Callable[[str], None]
) -> tuple[Quantization, dict[str, Layer]]:
    """Every linear layer of the decoder. Raises CheckpointError where there is none, or its size does not divide."""
    group_size = GROUP_OF_4_BITS if bits == 4 else 0
    linears = {
        f"model.layers.{name}": layer
        for name, layer in model.model.layers.named_modules()
        if isinstance(layer, nn.Linear)
    }
    odd = [name for name, layer in linears.items() if group_size and layer.in_features % group_size]
    if odd or not linears:
        raise CheckpointError(
            f"nothing was written: {odd[0]} reads {linears[odd[0]].in_features} numbers, which is no multiple of "
            f"{group_size}; --int8 takes any size"
            if odd
            else "nothing was written: the model has no linear layer in its decoder"
        )
    layers = {}
    for number, (name, layer) in enumerate(linears.items(), 1):
        layers[name] = quantized_layer(layer.weight.detach().to("cpu", stored), bits, group_size)
        if number % 40 == 0:
            report_step(f"quantized {number}/{len(linears)} layers")
    return Quantization(bits=bits, group_size=group_size, modules=list(layers)), layers


def quantized_layer(weight: Tensor, bits: Literal[4, 8], group_size: int) -> Layer:
    """weight [out, in] in the dtype it is stored in."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
    holder[0].weight = nn.Parameter(weight, requires_grad=False)
    if bits == 8:
        quantize_(holder, Int8WeightOnlyConfig())
    else:
        quantize_(holder, IntxWeightOnlyConfig(weight_dtype=FOUR_BITS, granularity=PerGroup(group_size)))
    chosen: Any = holder[0].weight  # torchao's own kind of tensor
    if not hasattr(chosen, "qdata"):
        raise CheckpointError("torchao left a layer as it was: nothing was written; report the version of torchao")
    zero = getattr(chosen, "zero_point", None)
    if zero is not None and bool(zero.any()):
        raise CheckpointError("torchao chose a zero point, which is not stored here; nothing was written")
    qdata = chosen.qdata if bits == 8 else packed(chosen.qdata)
    error = chosen.dequantize().float() - weight.float()
    size = weight.float().norm()
    snr_db = float(20 * torch.log10(size / error.norm())) if error.any() else float("inf")
    return Layer(qdata.contiguous(), chosen.scale.contiguous(), snr_db)


def set_layer(model: HiggsAudio, name: str, layer: Layer) -> None:
    bits: Literal[4, 8] = 8 if layer.qdata.dtype == torch.int8 else 4
    device = model.audio_lm_head.weight.device
    group_size = 0 if bits == 8 else GROUP_OF_4_BITS
    put_quantized(model, Quantization(bits=bits, group_size=group_size, modules=[name]), Path("model"))
    empty = model.get_submodule(name)
    empty.qdata, empty.scale = layer.qdata.to(device), layer.scale.to(device)


def sizes(model: HiggsAudio, stored: torch.dtype) -> dict[str, int]:
    """Bytes of each tensor as it is written."""
    return {
        name: tensor.numel() * (stored.itemsize if isinstance(tensor, nn.Parameter) else tensor.itemsize)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def lowest_of_groups(layers: dict[str, Layer]) -> dict[str, float]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for name, layer in layers.items():
        found[group_of(f"{name}.lora_A")].append(layer.snr_db)
    return {group: round(min(values), 2) for group, values in sorted(found.items())}


def check_written(out: Path, logits: Tensor, device: str) -> None:
    """Load it as everybody will, before it has its name. Raises CheckpointError where it says something else."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    again = probe_logits(load_model(out, dtype, device, conditioning=own_conditioning(out)).eval())
    if not torch.equal(again, logits):
        raise CheckpointError(
            "what was written does not say what was measured, so it was removed; this is a fault of the program, please "
            "report it"
        )


def audio_tokenizer_id(folder: Path) -> str | None:
    """Which codec its config.json names, if it does."""
    return read_json_object(folder / "config.json", "a model's config").get("audio_tokenizer_id")
