"""LoRA by peft: which modules, their initial values, and the adapter folder that plain peft loads.

peft injects its layers into our model; module names equal the transformers class's, so a saved adapter needs no
renaming beyond peft's own prefix. Two things are done here because they are silent otherwise: LoRA weights are raised to
fp32 (`inject_adapter_in_model` leaves them in the base's bf16, and Adam then rounds small updates away), and A is
drawn from one seeded CPU generator so that the number of ranks or devices does not change the start.

A Whisper projection that the base does not have starts at zero and is trained whole: LoRA on a zero matrix would be a
projection of low rank. It is saved as peft saves `modules_to_save`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from shards.encoders.tensor_files import load_tensors, save_tensors
from shards.errors import CheckpointError, ConfigError
from shards.printable import first_line
from train.config import LoraSection
from train.model.conditioning import CODES, Conditioning
from train.model.decoder import HiggsAudio

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
TEXT_FFN = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
AUDIO_FFN = ["audio_mlp.gate_proj", "audio_mlp.up_proj", "audio_mlp.down_proj"]
MODES = {
    "comprehensive": [*ATTENTION, *TEXT_FFN, *AUDIO_FFN, "audio_lm_head"],
    "audio_focused": [*AUDIO_FFN, "self_attn.q_proj", "self_attn.v_proj", "audio_lm_head"],
    "attention_only": ATTENTION,
}
PROJECTION = "audio_encoder_proj.linear"
PEFT_PREFIX = "base_model.model."


class AddingLinear(Linear):
    """peft's layer whose update is added by the product that makes it.

    peft scales and adds outputs, `base(x) + B(A(x)) * scaling`: two more passes over them forward, one backward. All else,
    and every case but the plain one, is peft's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [R, in] -> [R, out]."""
        (name,) = self.active_adapters
        down: Any = self.lora_A[name].weight  # [r, in]
        up: Any = self.lora_B[name].weight  # [out, r]
        is_plain = not (self.disable_adapters or self.merged or self.lora_variant)
        if not is_plain or down.dtype != x.dtype:
            return super().forward(x, *args, **kwargs)
        rows = F.linear(self.lora_dropout[name](x), down)
        return torch.addmm(self.base_layer(x), rows, up.T, alpha=self.scaling[name])


def add_lora(
    model: HiggsAudio, section: LoraSection, base_name: str, seed: int, conditioning: Conditioning = CODES
) -> LoraConfig:
    """Freeze the model and inject trainable fp32 LoRA layers. Raises ConfigError for a target that matches nothing."""
    model.requires_grad_(False)
    starts_at_zero = conditioning.tower_dir is not None and not conditioning.has_projector
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        target_modules=lora_targets(model, section, starts_at_zero),
        # The tower's layers are named as the decoder's. It stays frozen, here and wherever the adapter is loaded.
        exclude_modules=r"audio_tower\..*" if conditioning.tower_dir else None,
        base_model_name_or_path=base_name,
        init_lora_weights=True,  # B = 0: the first step starts from the base model exactly
    )
    inject_adapter_in_model(config, model)
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = AddingLinear
    if starts_at_zero:
        assert model.audio_encoder_proj is not None
        model.audio_encoder_proj.requires_grad_(True)
        config.modules_to_save = [PROJECTION]
    for name, parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
        if ".lora_magnitude_vector." in name and not parameter.is_meta:
            # DoRA's lengths: peft has rounded them as the base's weights are, so rows would start at up to 0.4 % off.
            weight = model.get_parameter(f"{name.split('.lora_')[0]}.base_layer.weight")
            exact = torch.linalg.vector_norm(weight.float(), dim=1)
            # Where they are rounded again (sharded in bf16) they must be what peft's forward then divides them by.
            parameter.data = torch.where(exact.to(weight.dtype) == parameter.data, exact, parameter.data)
    for name, start in lora_start(model, seed):
        parameter = model.get_parameter(name)
        if not parameter.is_meta:
            parameter.data.copy_(start)
    return config


def lora_start(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, whole initial value) of every trainable weight but DoRA's lengths, which follow from the base's weights.

    A is Kaiming uniform with a = sqrt(5), as peft's: U(-1, 1) / sqrt(fan in). All else starts at zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(model):
        if ".lora_A." in name:
            uniform = torch.rand(parameter.shape, generator=generator) * 2 - 1
            yield name, uniform / math.sqrt(parameter.shape[1])
        elif ".lora_magnitude_vector." not in name:
            yield name, torch.zeros(parameter.shape)


def lora_targets(model: nn.Module, section: LoraSection, projection_is_whole: bool = False) -> list[str]:
    """The suffixes to adapt, each checked to match a linear layer. The frozen Whisper tower is never adapted."""
    targets = list(section.targets if section.mode == "custom" else MODES[section.mode])
    if section.text_head:
        targets.append("text_lm_head")
    if section.mode == "comprehensive" and getattr(model, "audio_encoder_proj", None) and not projection_is_whole:
        targets.append(PROJECTION)
    if projection_is_whole and PROJECTION in targets:
        raise ConfigError(
            f"lora.targets: {PROJECTION} is not in the base model, so it is trained whole; leave it out of the list"
        )
    if not targets:
        raise ConfigError("lora.mode = 'custom' needs lora.targets, for example ['self_attn.q_proj', 'audio_lm_head']")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears = [name for name in linears if not name.startswith("audio_tower.")]
    suffixes = sorted({".".join(name.split(".")[-2:]) if "." in name else name for name in linears})
    problems = [
        f"lora.targets: {target!r} matches no linear layer; near: {', '.join(nearest(target, suffixes))}"
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in linears)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return targets


def nearest(target: str, suffixes: list[str]) -> list[str]:
    """The three suffixes most like `target`, compared whole and by their last part."""

    def likeness(suffix: str) -> float:
        return max(difflib.SequenceMatcher(None, target, name).ratio() for name in (suffix, suffix.split(".")[-1]))

    return sorted(suffixes, key=likeness, reverse=True)[:3]


def lora_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def trainable_table(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Per target suffix: (number of adapted modules, trainable parameters), for the line that says what trains."""
    table: dict[str, tuple[int, int]] = {}
    for name, parameter in lora_parameters(model):
        suffix = group_of(name)
        modules, count = table.get(suffix, (0, 0))
        is_module = ".lora_A." in name or name == f"{PROJECTION}.weight"
        table[suffix] = (modules + is_module, count + parameter.numel())
    return table


def group_of(name: str) -> str:
    """The group a trainable parameter counts to: model.layers.3.mlp.up_proj.lora_A... -> mlp.up_proj."""
    module = name.split(".lora_")[0]
    if module == name:
        return f"{PROJECTION} (whole)"
    return ".".join(module.split(".")[-2:]) if module.startswith("model.") else module


def file_name(name: str) -> str:
    """A trainable parameter's name in adapter_model.safetensors, as peft writes it."""
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return PEFT_PREFIX + name.replace(".default.weight", ".weight")


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors. `tensors` has our names, full (not sharded) values."""
    folder.mkdir(parents=True, exist_ok=True)
    renamed = {file_name(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(renamed, folder / "adapter_model.safetensors")
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False


Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
# peft matches names of rank_pattern as regular expressions; a stranger's could match for ever, so they are names here.
LayerName = Annotated[str, msgspec.Meta(pattern=r"^\^?[\w.]+\$?$")]


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is taken from an adapter_config.json; peft knows more, some of which names modules to import."""

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: int | float
    target_modules: list[str]
    exclude_modules: Literal[r"audio_tower\..*"] | list[str] | None = None  # a regular expression of ours only
    lora_dropout: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    rank_pattern: dict[LayerName, Rank] | None = None
    alpha_pattern: dict[LayerName, int | float] | None = None
    base_model_name_or_path: str | None = None


# Without effect on an adapter that is loaded: how it was started, where it came from.
WITHOUT_EFFECT = ("task_type", "inference_mode", "init_lora_weights", "auto_mapping", "revision", "peft_version")


def read_adapter_config(path: Path) -> LoraConfig:
    """A closed list of settings: the file may come from a stranger.

    Raises CheckpointError naming those that peft has besides and that would change the model.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        known = msgspec.convert(found, AdapterConfig)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the settings of a LoRA adapter: {first_line(error)}") from None
    defaults = LoraConfig().to_dict()
    harmless = {*known.__struct_fields__, *WITHOUT_EFFECT}
    unknown = [
        f"{name} = {value!r}"
        for name, value in found.items()
        if name in defaults and name not in harmless and value not in (None, False, [], {}, defaults[name])
    ]
    if unknown:
        raise CheckpointError(f"{path}: settings that are not loaded here: {'; '.join(unknown[:4])}")
    settings = {name: value for name, value in msgspec.structs.asdict(known).items() if value is not None}
    del settings["peft_type"]
    try:
        return LoraConfig(**settings)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not the settings of a LoRA adapter: {first_line(error)}") from None


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Inject the LoRA layers of an adapter folder into `model` with their weights, strictly."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file() or not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: no adapter here; expected adapter_config.json and adapter_model.safetensors")
    known = read_adapter_config(folder / "adapter_config.json")
    whole = known.modules_to_save or []
    known.modules_to_save = None  # these are loaded into the model's own layer below, not wrapped
    try:
        inject_adapter_in_model(known, model)
    except Exception as error:  # peft's kinds, about layers that are not there or of another kind
        raise CheckpointError(f"{folder}: its settings do not fit the model: {first_line(error)}") from None
    known.modules_to_save = whole or None
    own = {
        file_name(name): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name or name.rpartition(".")[0] in whole
    }
    saved = load_tensors(path)
    problems = [f"missing {name}" for name in own.keys() - saved.keys()]
    problems += [f"unexpected {name}" for name in saved.keys() - own.keys()]
    problems += [
        f"{name} is {list(saved[name].shape)}, the model needs {list(own[name].shape)}"
        for name in own.keys() & saved.keys()
        if saved[name].shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(f"{path}: adapter does not fit the model: {'; '.join(sorted(problems)[:6])}")
    for name, parameter in own.items():
        # LoRA stays fp32; a whole module takes the dtype of the model it becomes part of.
        dtype = saved[name].dtype if ".lora_" in name else parameter.dtype
        parameter.data = saved[name].to(parameter.device, dtype)
    return known
