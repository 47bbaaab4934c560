"""The codec's encoder on a CPU core: the same codes, sooner where memory and not arithmetic is the limit.

In: a codec model of either implementation. Out: the same model, whose first acoustic blocks run over tiles that stay in the
cache, whose linear layers run in oneDNN and, with AVX-512, whose convolutions of tiles and of HuBERT's positions read channels
side by side in memory and whose sine is numpy's. A tile reads its exact surroundings, so by itself it sums the same numbers as
before; the other changes move embeddings in the last bits. Since nothing may be exact on a machine that nobody has seen,
`faster` encodes noise both ways and leaves out what changes a code or moves features. The price is that check at each load, a
second or so.

Why: at 24 kHz and 64 channels an activation is 6 MB for each second of audio. Every pass over it leaves the cache, and above
glibc's largest mmap threshold (32 MB) each pass maps fresh pages. torch hands linear layers and pointwise convolutions to MKL,
which on AMD multiplies float32 more slowly than oneDNN; grouped and strided convolutions need channels side by side to come near
the product rate. (Measured: NOTES.md.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE_BYTES = 1 << 20  # of one activation of a tile: with its copies it fits into a core's L2 and L3 share
MOST_OFF = 1e-3  # of the features' standard deviation; sums in another order move them by less than 1e-4
NUM_TILED = 2  # blocks at 24 kHz and 3 kHz; the later ones are small enough


@dataclass(frozen=True)
class Changes:
    """What gives other last bits than torch's way; tiles are always taken."""

    linears: bool = False  # by oneDNN
    convolutions: bool = False  # over channels side by side
    sine: bool = False  # numpy's


LEFT_OUT = {
    "linears": "oneDNN's linear layers give other codes for noise; MKL's are used",
    "convolutions": "convolutions over channels side by side give other codes for noise; torch's usual ones are used",
    "sine": "numpy's sine gives other codes for noise; torch's is used",
}


def worthwhile() -> Changes:
    """MKL's products are slow on AMD; the other layout gains with AVX-512 alone, and so does numpy's sine: 1.9 G/s on Zen 4
    against 0.8 of torch, with AVX2 (Zen 2) 0.5 against 0.6. Several threads share torch's. (NOTES.md)"""
    return Changes(is_amd(), has_avx512(), sine=has_avx512() and torch.get_num_threads() == 1)


class TiledBlock(nn.Module):
    """Residual units, snake and strided convolution of one acoustic block, tile by tile.

    Letters: n clips, C channels, S samples, T outputs.
    """

    def __init__(self, block: nn.Module, tile_bytes: int = TILE_BYTES) -> None:
        super().__init__()
        # Both implementations register them in the order in which they run.
        parts = [part for part in block.modules() if isinstance(part, nn.Conv1d) or hasattr(part, "alpha")]
        *units, self.snake, down = parts
        assert isinstance(down, nn.Conv1d)
        self.units = nn.ModuleList(units)  # snake, dilated convolution, snake, pointwise convolution, and again
        self.down = down
        dilated: list[Any] = units[1::4]
        self.halo = sum((conv.kernel_size[0] - 1) // 2 * conv.dilation[0] for conv in dilated)
        self.stride, self.kernel, self.padding = down.stride[0], down.kernel_size[0], int(down.padding[0])
        self.tile_outputs = max(1, tile_bytes // (4 * down.in_channels * self.stride))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, C, S] -> [n, 2 C, T]."""
        num_samples = x.shape[2]
        num_outputs = (num_samples + 2 * self.padding - self.kernel) // self.stride + 1
        tiles = [
            self._tile(x, first, min(first + self.tile_outputs, num_outputs))
            for first in range(0, num_outputs, self.tile_outputs)
        ]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)

    def _tile(self, x: Tensor, first: int, end: int) -> Tensor:
        """Outputs [first, end): [n, 2 C, end - first]."""
        num_samples = x.shape[2]
        # What the strided convolution reads; beyond the true ends it reads zeros.
        begin, stop = first * self.stride - self.padding, (end - 1) * self.stride - self.padding + self.kernel
        low, high = max(begin - self.halo, 0), min(stop + self.halo, num_samples)
        h = x[:, :, low:high]
        parts = iter(self.units)
        for snake, dilated, second_snake, pointwise in zip(parts, parts, parts, parts, strict=True):
            # Zeros at a cut edge are wrong, and never come farther than the halo.
            h = pointwise(second_snake(dilated(snake(h)))) + h
        h = self.snake(h)[:, :, max(begin, 0) - low : min(stop, num_samples) - low]
        h = F.pad(h, (max(-begin, 0), max(stop - num_samples, 0)))
        if isinstance(self.down, ChannelsLastConv):
            return self.down.convolved(h, padding=0)
        return F.conv1d(h, self.down.weight, self.down.bias, self.stride)


def snaked(x: Tensor, snake: Any) -> Tensor:
    """x + sin(alpha x)^2 / alpha [n, C, S], one new tensor in place of four; with torch's sine rounded as the module rounds."""
    out = x * snake.alpha
    if snake.uses_numpy and out.dtype == torch.float32 and not out.requires_grad:
        values = out.numpy()
        np.sin(values, out=values)
    else:
        out.sin_()
    return out.square_().mul_((snake.alpha + 1e-9).reciprocal()).add_(x)


class Snake(nn.Module):
    """`snaked` in the place of an implementation's own module."""

    def __init__(self, snake: Any, uses_numpy: bool) -> None:
        super().__init__()
        self.alpha = snake.alpha
        self.uses_numpy = uses_numpy

    def forward(self, x: Tensor) -> Tensor:
        return snaked(x, self)


class OneDnnLinear(nn.Module):
    """A linear layer multiplied by oneDNN, its weight packed once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self._weight = linear.weight.detach().to_mkldnn()
        self._bias = None if linear.bias is None else linear.bias.detach().to_mkldnn()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] float32 -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1]).to_mkldnn()
        out = torch._C._nn.mkldnn_linear(rows, self._weight, self._bias).to_dense()  # pyright: ignore
        return out.view(*x.shape[:-1], self.out_features)


class ChannelsLastConv(nn.Conv1d):
    """A convolution over [n, C, S] whose channels lie side by side in memory.

    It stays an nn.Conv1d of the same sizes: transformers' class counts frames by those that it finds.
    """

    def __init__(self, conv: nn.Conv1d) -> None:
        nn.Module.__init__(self)
        for name in nn.Conv1d.__constants__:
            setattr(self, name, getattr(conv, name))
        self.bias = conv.bias
        weight = conv.weight.detach()[:, :, None].contiguous(memory_format=torch.channels_last)
        self.register_buffer("image_weight", weight)  # [out, C / groups, 1, kernel]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, nn.Conv1d's name for it
        """x [n, C, S] float32 -> [n, out, T], channels side by side."""
        return self.convolved(input, self.padding[0])

    def convolved(self, x: Tensor, padding: Any) -> Tensor:
        image = x[:, :, None].contiguous(memory_format=torch.channels_last)  # [n, C, 1, S]
        weight: Any = self.image_weight
        return F.conv2d(
            image, weight, self.bias, (1, self.stride[0]), (0, padding), (1, self.dilation[0]), self.groups
        )[:, :, 0]


def channels_last(conv: nn.Module) -> ChannelsLastConv | None:
    """None for what is none, and where the weight is made anew at each call (an older weight_norm)."""
    if not isinstance(conv, nn.Conv1d) or conv._forward_pre_hooks:
        return None
    return ChannelsLastConv(conv) if conv.padding_mode == "zeros" and not isinstance(conv.padding, str) else None


def quicken(model: Any, tile_bytes: int = TILE_BYTES, changes: Changes | None = None) -> None:
    """Change the model's encoder in place. `changes` None: what this processor gains by."""
    changes = changes or worthwhile()
    encoder = model.acoustic_encoder
    blocks = encoder.block
    places = [place for place, block in enumerate(blocks) if is_strided_block(block)]
    for place in places[:NUM_TILED]:
        blocks[place] = TiledBlock(blocks[place], tile_bytes)
    replace(encoder, lambda part: Snake(part, changes.sine) if hasattr(part, "alpha") else None)
    if changes.linears:
        replace(model.semantic_model, lambda part: OneDnnLinear(part) if type(part) is nn.Linear else None)
    if changes.convolutions:  # all others are as near to the product rate as they are
        for part in [*(blocks[place] for place in places[:NUM_TILED]), model.semantic_model.encoder]:
            replace(part, channels_last)


def is_strided_block(block: nn.Module) -> bool:
    """Three residual units, a snake and a strided convolution, and nothing else that has weights."""
    parts = [part for part in block.modules() if not list(part.children())]
    known = [part for part in parts if isinstance(part, nn.Conv1d) or hasattr(part, "alpha")]
    return len(known) == 14 and isinstance(known[-1], nn.Conv1d) and known[-1].stride[0] > 1


def replace(module: nn.Module, other: Any) -> None:
    """Put `other(part)` in the place of every part for which it is not None."""
    for name, part in list(module.named_children()):
        new = other(part)
        if new is not None:
            setattr(module, name, new)
        else:
            replace(part, other)


def faster(build: Callable[[], Any], wave: Tensor, wanted: Changes | None, tell: Callable[[str], None]) -> Any:
    """A model of `build` with those changes that give the same codes for `wave` [1, 1, S]; what is left out is told.

    wanted: None for all that this processor gains by.
    """
    wanted = wanted or worthwhile()
    model = build()
    expected = encoded(model, wave)
    for changes in fewer_and_fewer(wanted):
        quicken(model, changes=changes)
        if is_same(encoded(model, wave), expected):
            for name, said in LEFT_OUT.items():
                if getattr(wanted, name) and not getattr(changes, name):
                    tell(f"codec: on this processor {said}")
            return model
        model = build()
    tell(
        "codec: on this processor the faster encoder gives other codes for noise; the plain one is used, slower on long clips"
    )
    return model


def fewer_and_fewer(wanted: Changes) -> list[Changes]:
    """All that is wanted first, none at last, each once; more before fewer."""
    given = (wanted.linears, wanted.convolutions, wanted.sine)
    ways = sorted(product(*((True, False) if one else (False,) for one in given)), key=sum, reverse=True)
    return [Changes(*way) for way in ways]


def encoded(model: Any, wave: Tensor) -> tuple[Tensor, Tensor]:
    """wave [1, 1, S] -> codes [1, 8, T], and what the joint layer reads of both branches [1, T, d]."""
    inputs: list[Tensor] = []
    joint = model.fc if hasattr(model, "fc") else model.fc_prior
    hook = joint.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.inference_mode():
        codes = model.encode(wave, return_dict=False)
    hook.remove()
    return codes, inputs[0]


def is_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Equal codes alone could be luck: 400 of them may all survive an error of a percent."""
    off = (found[1] - expected[1]).abs().max()
    return torch.equal(found[0], expected[0]) and bool(off <= MOST_OFF * expected[1].std())


def is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
