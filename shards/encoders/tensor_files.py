"""Tensors of safetensors files that may be cut off, renamed or made by strangers.

In: a path, or a folder with one file or several and their index. Out: tensors by name. Raises CheckpointError
naming a file that is no safetensors file; a download that broke off is the usual one. An index names files of its own folder
only: identity is taken over these, and nothing outside the folder is anybody's model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.errors import CheckpointError
from shards.json_file import read_json_object
from shards.printable import excerpt, first_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises CheckpointError."""
    with explained_damage(path):
        return load_file(path)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError that names the file: safetensors has an error of its own for a full disk."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from None
        raise


def tensors_in(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a file, one at a time. Raises CheckpointError."""
    with explained_damage(path), safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is not a dict
            yield name, file.get_tensor(name)


@contextmanager
def explained_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: a NUL in a name
        raise CheckpointError(
            f"{path}: not a safetensors file, or cut off: {first_line(error)}; get it again from where it was made"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder. Raises CheckpointError."""
    index = folder / INDEX
    names = _indexed(index) if index.is_file() else [WEIGHTS]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: missing weight file {', '.join(absent[:4])}; download the whole repository again"
        )
    return [folder / name for name in names]


def _indexed(index: Path) -> list[str]:
    weight_map = read_json_object(index, "an index of weights").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map of tensor names and files; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or not _is_plain(name):
            raise CheckpointError(
                f"{index}: weight_map names {excerpt(json.dumps(name))}; expected a safetensors file of this folder"
            )
    return sorted(set(weight_map.values()))


def _is_plain(name: str) -> bool:
    """No path, and a name that a file system takes."""
    return "/" not in name and "\\" not in name and "\0" not in name and len(name.encode("utf-8", "replace")) < 256
