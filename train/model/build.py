"""From a base folder to a model that trains: weights, LoRA, recomputation, compiled blocks, shards. The order matters.

Without `shard_base` every rank holds the whole frozen base and only trainable weights are sharded. With it the model is
built on the meta device and every rank reads its own rows of the files, so that no process ever holds the base whole.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from shards.errors import ConfigError
from train.config import TrainConfig, TrainSection
from train.model.attention import choose_attention
from train.model.conditioning import Conditioning
from train.model.decoder import DecoderLayer, HiggsAudio
from train.model.fsdp import apply_fsdp
from train.model.lora import add_lora, lora_parameters, lora_start
from train.model.quantized import refuse_quantized
from train.model.weights import empty_model, load_model, load_sharded
from train.world import World

# Of a layer, all layers together; torch stops a run that needs more (8 by itself). Learning and looking, adapter on and off,
# kept and recomputed are graphs of their own, and so are packs of several documents, of one, and of none: about a dozen.
MOST_GRAPHS = 32

log = logging.getLogger("train")


def build_model(
    base_dir: Path, config: TrainConfig, conditioning: Conditioning, world: World
) -> tuple[HiggsAudio, LoraConfig]:
    """The model on this rank's device, ready for the optimizer. Raises PipelineError."""
    refuse_quantized(base_dir, "they cannot be trained")
    section = config.train
    bf16 = section.precision == "bf16" or (section.precision == "auto" and world.device.type == "cuda")
    dtype = torch.bfloat16 if bf16 else torch.float32
    shards_base = section.shard_base and world.is_distributed
    if shards_base and config.lora.use_dora:
        raise ConfigError("lora.use_dora needs the base's whole weights at the start; set train.shard_base = false")
    if shards_base:
        model = empty_model(base_dir, conditioning).to(dtype)
    else:
        model = load_model(base_dir, dtype, world.device, conditioning=conditioning)
    backend = compile_backend(section, world)
    if section.attention == "auto":
        model.attention = choose_attention(model.config, world.device, dtype, is_compiled=backend is not None)
    lora_config = add_lora(model, config.lora, config.model.base, section.seed, conditioning)
    model.fuse_lora(fuses_lora(config, bf16, world))
    prepare_blocks(model.model.layers, section.activation_checkpointing == "full", backend)
    apply_fsdp(model, model.model.layers, world, bf16, shards_base)
    if shards_base:
        model.to_empty(device=world.device)
        load_sharded(model, base_dir, conditioning, world.rank, world.size)
        start_lora(model, section.seed)
    return model, lora_config


def compile_backend(section: TrainSection, world: World) -> str | None:
    """Of torch.compile; None: not compiled."""
    if section.compile == "aot_eager":
        return "aot_eager"
    return (
        "inductor" if section.compile == "on" or (section.compile == "auto" and world.device.type == "cuda") else None
    )


def fuses_lora(config: TrainConfig, bf16: bool, world: World) -> bool:
    """Whether layers that read the same rows are computed as one. Raises ConfigError where that was asked for and cannot be."""
    asked, reasons = config.train.fused_lora, []
    if config.lora.dropout:
        reasons.append("lora.dropout draws for each layer by itself")
    if config.lora.use_dora:
        reasons.append("lora.use_dora scales each layer's outputs")
    if bf16 and not world.is_distributed:
        reasons.append("fp32 LoRA on a bf16 base is computed in fp32 where nothing is sharded")
    if asked == "on" and reasons:
        raise ConfigError(
            f'train.fused_lora = "on": {"; ".join(reasons)}, which only peft\'s own layers do; set train.fused_lora = "auto" '
            "or give that up"
        )
    if asked == "auto" and reasons:
        log.info("LoRA is computed layer by layer: %s", "; ".join(reasons))
    return asked != "off" and not reasons


def prepare_blocks(layers: nn.ModuleList, recompute: bool, backend: str | None) -> None:
    """Recomputation and compilation, before sharding: gathers stay outside both."""
    if backend:
        import torch._dynamo

        torch._dynamo.config.recompile_limit = MOST_GRAPHS
    for layer in layers:
        assert isinstance(layer, DecoderLayer)
        layer.recomputes = recompute
        if backend:
            layer.compile(fullgraph=True, backend=backend, dynamic=True)


def start_lora(model: HiggsAudio, seed: int) -> None:
    """The same start for any number of ranks: whole values are drawn everywhere, and each rank keeps its rows."""
    parameters = dict(lora_parameters(model))
    with torch.no_grad():
        for name, start in lora_start(model, seed):
            parameter = parameters[name]
            data = parameter.data
            if isinstance(data, DTensor):
                start = distribute_tensor(start.to(data.device), data.device_mesh, data.placements, src_data_rank=None)
            parameter.data.copy_(start)
