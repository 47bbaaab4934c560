"""Names of codec tensors: from boson's layout to the native one.

In: a state dict of boson's model.pth. Out: the same tensors under the names of transformers' HiggsAudioV2TokenizerModel.
boson keeps weight_norm as pairs, the native layout keeps the product; so the pairs are folded here once, and a codec
folded and saved natively cannot be turned back into the same pairs (only the product ever mattered).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# boson name -> native name, after folding weight_norm; complete for the 601 tensors of the released codec.
BOSON_RENAMES: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"^(encoder|decoder_2)\.(block|model)\.(\d+)\.(.+)$"), lambda m: _rename_dac(*m.groups())),
    (re.compile(r"^quantizer\.vq\.layers\.(\d+)\._codebook\."), r"quantizer.quantizers.\1.codebook."),
    (re.compile(r"^quantizer\.vq\.layers\."), "quantizer.quantizers."),
    (re.compile(r"^fc_prior\."), "fc."),
    (re.compile(r"^fc_post([12])\."), r"fc\1."),
    (re.compile(r"^((?:encoder|decoder)_semantic(?:\..*?)?)\.conv\.conv\."), r"\1.conv."),
    (re.compile(r"^((?:encoder|decoder)_semantic\.(?:.*\.)?conv[12])\.conv\."), r"\1."),
]


def native_state(boson: dict[str, Tensor]) -> dict[str, Tensor]:
    """boson's tensors under native names, weight_norm folded: weight = v * g / |v|, norm over all but the first axis."""
    folded: dict[str, Tensor] = {}
    for name, tensor in boson.items():
        if name.endswith(".weight_g"):
            v = boson.get(name[: -len("g")] + "v")
            if v is None:
                folded[name] = tensor  # half a pair: reported as unexpected, and the product as missing
                continue
            norm = v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))
            folded[name[: -len("_g")]] = v * (tensor / norm)
        elif not name.endswith(".weight_v"):
            folded[name] = tensor
    return {native_name(name): tensor for name, tensor in folded.items()}


def native_name(name: str) -> str:
    """The native name of a boson codec tensor."""
    for pattern, replacement in BOSON_RENAMES:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return name


def _rename_dac(side: str, _: str, outer: str, rest: str) -> str:
    """encoder.block.K.* and decoder_2.model.K.* of the acoustic model."""
    is_encoder = side == "encoder"
    prefix = "acoustic_encoder" if is_encoder else "acoustic_decoder"
    ends = {"0": "conv1", "6": "snake1", "7": "conv2"}
    if outer in ends:
        return f"{prefix}.{ends[outer]}.{rest}"
    block = f"{prefix}.block.{int(outer) - 1}"
    parts = rest.split(".")  # block.J.<leaf> or block.J.block.I.<leaf>
    inner = int(parts[1])
    if parts[2] == "block":
        unit = inner + 1 if is_encoder else inner - 1
        leaf = ("snake1", "conv1", "snake2", "conv2")[int(parts[3])]
        return f"{block}.res_unit{unit}.{leaf}.{'.'.join(parts[4:])}"
    leaf = {3: "snake1", 4: "conv1"}[inner] if is_encoder else {0: "snake1", 1: "conv_t1"}[inner]
    return f"{block}.{leaf}.{'.'.join(parts[2:])}"
