"""Native codec tensors under boson's names, with weight_norm pairs: the inverse of `shards.encoders.codec`, written apart."""

from __future__ import annotations

import re

import torch


def boson_state(native: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of the key map, written apart from it: native names -> boson names with weight_norm pairs."""
    state = {}
    for name, tensor in native.items():
        renamed = boson_name(name)
        if renamed.endswith(".weight") and re.match(r"(encoder|decoder_2)\.", renamed) and tensor.dim() > 1:
            scale = torch.linspace(0.5, 2, tensor.shape[0]).view(-1, *[1] * (tensor.dim() - 1))
            state[f"{renamed}_v"] = tensor * scale
            state[f"{renamed}_g"] = tensor.flatten(1).norm(dim=1).view(-1, *[1] * (tensor.dim() - 1))
        else:
            state[renamed] = tensor
    return state


def boson_name(name: str) -> str:
    rules = [
        (r"^quantizer\.quantizers\.(\d+)\.codebook\.", r"quantizer.vq.layers.\1._codebook."),
        (r"^quantizer\.quantizers\.", "quantizer.vq.layers."),
        (r"^fc\.", "fc_prior."),
        (r"^fc1\.", "fc_post1."),
        (r"^fc2\.", "fc_post2."),
        (r"^((?:en|de)coder_semantic\.conv_blocks\.\d+)\.conv\.", r"\1.conv.conv."),
        (r"^((?:en|de)coder_semantic\..*res_units\.\d+\.conv1)\.", r"\1.conv."),
        (r"^((?:en|de)coder_semantic\.conv[12]?)\.", r"\1.conv."),
    ]
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    ends = {"conv1": "0", "snake1": "6", "conv2": "7"}
    found = re.match(r"^acoustic_(encoder|decoder)\.(conv1|snake1|conv2)\.(.+)$", name)
    if found:
        side = "encoder.block" if found[1] == "encoder" else "decoder_2.model"
        return f"{side}.{ends[found[2]]}.{found[3]}"
    found = re.match(r"^acoustic_(encoder|decoder)\.block\.(\d+)\.(.+)$", name)
    if not found:
        return name
    block = f"{'encoder.block' if found[1] == 'encoder' else 'decoder_2.model'}.{int(found[2]) + 1}.block"
    unit = re.match(r"^res_unit(\d)\.(snake1|conv1|snake2|conv2)\.(.+)$", found[3])
    if unit:
        inner = int(unit[1]) + (-1 if found[1] == "encoder" else 1)
        return f"{block}.{inner}.block.{['snake1', 'conv1', 'snake2', 'conv2'].index(unit[2])}.{unit[3]}"
    leaf, rest = found[3].split(".", 1)
    return f"{block}.{ {'snake1': 3, 'conv1': 4}[leaf] if found[1] == 'encoder' else {'snake1': 0, 'conv_t1': 1}[leaf] }.{rest}"
