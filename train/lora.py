"""LoRA by peft: which modules, their initial values, and the adapter folder that plain peft loads.

peft injects its layers into our model; module names equal the transformers class's, so a saved adapter needs no
renaming beyond peft's own prefix. Two things are done here because they are silent otherwise: LoRA weights are raised to
fp32 (`inject_adapter_in_model` leaves them in the base's bf16, and Adam then rounds small updates away), and A is
drawn from one seeded CPU generator so that the number of ranks or devices does not change the start.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shards.errors import CheckpointError, ConfigError
from train.config import LoraSection

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
TEXT_FFN = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
AUDIO_FFN = ["audio_mlp.gate_proj", "audio_mlp.up_proj", "audio_mlp.down_proj"]
MODES = {
    "comprehensive": [*ATTENTION, *TEXT_FFN, *AUDIO_FFN, "audio_lm_head"],
    "audio_focused": [*AUDIO_FFN, "self_attn.q_proj", "self_attn.v_proj", "audio_lm_head"],
    "attention_only": ATTENTION,
}
PEFT_PREFIX = "base_model.model."


def add_lora(model: nn.Module, section: LoraSection, base_name: str, seed: int) -> LoraConfig:
    """Freeze the model and inject trainable fp32 LoRA layers. Raises ConfigError for a target that matches nothing."""
    model.requires_grad_(False)
    targets = lora_targets(model, section)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.use_rslora,
        target_modules=targets,
        base_model_name_or_path=base_name,
        init_lora_weights=True,  # B = 0: the first step starts from the base model exactly
    )
    inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
        if ".lora_A." in name:  # Kaiming uniform with a = sqrt(5), as peft: U(-1, 1) / sqrt(fan_in)
            uniform = torch.rand(parameter.shape, generator=generator) * 2 - 1
            parameter.data.copy_(uniform / math.sqrt(parameter.shape[1]))
    return config


def lora_targets(model: nn.Module, section: LoraSection) -> list[str]:
    """The suffixes to adapt, each checked to match a linear layer."""
    targets = list(section.targets if section.mode == "custom" else MODES[section.mode])
    if not targets:
        raise ConfigError("lora.mode = 'custom' needs lora.targets, for example ['self_attn.q_proj', 'audio_lm_head']")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    suffixes = sorted({".".join(name.split(".")[-2:]) if "." in name else name for name in linears})
    problems = [
        f"lora.targets: {target!r} matches no linear layer; near: "
        + ", ".join(difflib.get_close_matches(target, suffixes, n=3, cutoff=0.3) or suffixes)
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in linears)
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return targets


def lora_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def trainable_table(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Per target suffix: (number of adapted modules, trainable parameters), for the line that says what trains."""
    table: dict[str, tuple[int, int]] = {}
    for name, parameter in lora_parameters(model):
        module = name.split(".lora_")[0]
        suffix = ".".join(module.split(".")[-2:]) if module.startswith("model.") else module
        modules, count = table.get(suffix, (0, 0))
        table[suffix] = (modules + (".lora_A." in name), count + parameter.numel())
    return table


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors. `tensors` has our names, full (not sharded) values."""
    folder.mkdir(parents=True, exist_ok=True)
    renamed = {
        PEFT_PREFIX + name.replace(".default.weight", ".weight"): tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False


def load_adapter(model: nn.Module, folder: Path) -> LoraConfig:
    """Inject the LoRA layers of an adapter folder into `model` with their weights, strictly."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file() or not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: no adapter here; expected adapter_config.json and adapter_model.safetensors")
    known = LoraConfig.from_pretrained(str(folder))
    assert isinstance(known, LoraConfig)
    inject_adapter_in_model(known, model)
    saved = {
        name.removeprefix(PEFT_PREFIX).replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(path).items()
    }
    own = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
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
        parameter.data = saved[name].to(parameter.device)
    return known


def adapter_base(folder: Path) -> str:
    """Which base model an adapter was trained on."""
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
