"""The average of several checkpoints' updates, as one checkpoint.

In: checkpoints of one base. Out: a folder that `merge`, `speak --adapter OUT/adapter` and `evaluate` take; it cannot be resumed,
since there is no optimizer's state of it. What is averaged are the products scale * B * A: the mean of the Bs times the mean
of the As is another matrix. The mean has up to n * r dimensions and is cut back to rank r by an SVD, done on the QR of
the stacked factors, so no matrix of full size is ever made. What the cut lost is reported, by group.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from shards.encoders.tensor_files import save_tensors
from shards.errors import CheckpointError
from shards.terminal import progress_bar
from shards.writer import write_bytes, write_json
from tools.checkpoints.card import AVERAGE, card, gather
from tools.checkpoints.merge import require_config
from tools.checkpoints.model_folder import check_empty, new_folder
from tools.checkpoints.sound import require_sound
from tools.checkpoints.updates import A, B, Factors, Update, read_update
from train.model.lora import PEFT_PREFIX
from train.run_folder.checkpoint_folders import digests, read_step
from train.run_folder.identity import IDENTITY, model_differences, read_identity
from train.run_folder.state import write_state


class Source(msgspec.Struct, frozen=True):
    name: str  # of the folder
    step: int


class Average(msgspec.Struct, frozen=True, kw_only=True):
    """average.json."""

    sources: list[Source]
    rank: int
    error: float  # ||cut - mean|| / ||mean||, all modules together
    error_of_groups: dict[str, float]
    shrinks_to: float  # ||mean|| / mean of the norms: small where the updates point elsewhere


def average_checkpoints(folders: Sequence[Path], out: Path) -> Average:
    """Write the average of the checkpoints in `folders`. Raises CheckpointError where they cannot be averaged."""
    if len(folders) < 2:
        raise CheckpointError("one checkpoint has no average; give two or more")
    check_empty(out)
    for folder in folders:
        require_sound(folder)
    updates = [read_update(folder) for folder in folders]
    check_alike(folders, updates)
    steps = [read_step(folder) for folder in folders]
    first, rank = updates[0], updates[0].config.r
    scale = next(iter(first.factors.values())).scale

    # 1. Module by module, and what the cut loses of each.
    tensors: dict[str, Tensor] = {}
    lost: defaultdict[str, float] = defaultdict(float)
    kept: defaultdict[str, float] = defaultdict(float)
    with progress_bar("averaging", len(first.factors)) as done:
        for module in first.factors:
            down, up, values = mean_factors([update.factors[module] for update in updates], rank)
            tensors[f"{module}{A}"], tensors[f"{module}{B}"] = down.float(), (up / scale).float()
            group = first.group(module)
            lost[group] += float(values[rank:].square().sum())
            kept[group] += float(values.square().sum())
            done()
    for name, tensor in first.whole.items():
        tensors[name] = torch.stack([update.whole[name].double() for update in updates]).mean(dim=0).to(tensor.dtype)
    norms = [sum(update.squares().values()) ** 0.5 for update in updates]
    whole = sum(float(tensors[name].double().square().sum()) for name in first.whole)
    report = Average(
        sources=[Source(folder.resolve().name, step) for folder, step in zip(folders, steps, strict=True)],
        rank=rank,
        error=share(sum(lost.values()), sum(kept.values())),
        error_of_groups={group: share(lost[group], kept[group]) for group in sorted(kept)},
        shrinks_to=(sum(kept.values()) + whole) ** 0.5 / max(sum(norms) / len(norms), 1e-30),
    )

    # 2. A checkpoint of its own.
    with new_folder(out, 2 * sum(tensor.nbytes for tensor in tensors.values())) as partial:
        (partial / "adapter").mkdir()
        named = {f"{PEFT_PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
        save_tensors(named, partial / "adapter" / "adapter_model.safetensors")
        shutil.copyfile(folders[0] / "adapter" / "adapter_config.json", partial / "adapter" / "adapter_config.json")
        state = {f"model/{state_name(name)}": tensor.contiguous() for name, tensor in tensors.items()}
        write_state(partial, state, max(steps))
        for name in (IDENTITY, "config.toml"):
            shutil.copyfile(require_config(folders[0] / name), partial / name)
        write_json(partial / "metrics.json", {})  # nothing has judged it
        write_json(partial / AVERAGE, report)
        write_json(partial / "COMPLETE", digests(partial))
        text = own_card(partial, folders[0])
        write_bytes(partial / "README.md", text.encode())  # behind COMPLETE: people edit it
    return report


def own_card(folder: Path, source: Path) -> str:
    """README.md: what the average knows of itself, and of the data of its first source."""
    return card(dataclasses.replace(gather(folder, "adapter"), data=gather(source, "adapter").data))


def mean_factors(parts: Sequence[Factors], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A [rank, in], B [out, rank], all singular values), float64: B A is nearest to the mean of scale * B * A.

    Where the mean has fewer dimensions than `rank`, the rest is zero.
    """
    up = torch.cat([part.up * (part.scale / len(parts)) for part in parts], dim=1)  # [out, n r]
    down = torch.cat([part.down for part in parts])  # [n r, in]
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    u, values, v = torch.linalg.svd(left_core @ right_core.T)
    count = min(rank, len(values))
    roots = values[:count].sqrt()
    new_up, new_down = up.new_zeros(len(up), rank), down.new_zeros(rank, down.shape[1])
    new_up[:, :count] = left @ u[:, :count] * roots
    new_down[:count] = roots[:, None] * (v[:count] @ right.T)
    return new_down, new_up, values


def check_alike(folders: Sequence[Path], updates: Sequence[Update]) -> None:
    """Raises CheckpointError where the checkpoints are not of one base, or DoRA's."""
    for folder, update in zip(folders, updates, strict=True):
        if update.uses_dora:
            raise CheckpointError(
                f"{folder}: trained with DoRA, whose update is no product of two matrices alone, so it has no average here; "
                "merge it, or train with lora.use_dora = false"
            )
    identity = read_identity(folders[0])
    for folder, update in zip(folders[1:], updates[1:], strict=True):
        other = read_identity(folder)
        differing = [f"{what} {was}, {now}" for what, _, was, now in model_differences(identity.model, other.model)]
        if differing:
            raise CheckpointError(f"{folders[0]} and {folder} were trained on other models: {'; '.join(differing)}")
        if updates[0].product(update) is None:
            raise CheckpointError(
                f"{folders[0]} and {folder} do not change the same modules; average those of one lora.mode"
            )
        for key in ("sequence.layout", "sequence.conditioning", "sequence.system_prompt"):
            if identity.settings.get(key) != other.settings.get(key):
                raise CheckpointError(
                    f"{folders[0]} and {folder} were trained with another {key}; their average fits neither"
                )


def state_name(name: str) -> str:
    """Ours of a tensor, as the state of a checkpoint has it."""
    for end in (A, B):
        if name.endswith(end):
            return f"{name.removesuffix('.weight')}.default.weight"
    return name


def share(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole else 0.0
