"""Where the console scripts begin, under a name that nobody else has.

In: the command line. Out: the command of the same name, from the folder that this file lies in. Our packages have plain names
(`tools`, `train`), so another project's on PYTHONPATH, or a file beside the list, would be imported instead of ours; so our
folder is put first, for this process and for those that it starts. The price: in them our names win over all others.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent)
PACKAGES = ("preprocess", "shards", "tools", "train")


def run(module: str) -> None:
    """Run `main` of one of our modules; a package of the same name that is already imported ends it with a line."""
    sys.path.insert(0, ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    for name in PACKAGES:
        foreign = sys.modules.get(name)
        if foreign and not is_ours(foreign):
            where = getattr(foreign, "__file__", None) or list(getattr(foreign, "__path__", []))
            sys.exit(
                f"error: {where} was imported as {name!r} before this program began; start it without that package"
            )
    importlib.import_module(module).main()


def is_ours(module: object) -> bool:
    places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", [])]
    return any(place and Path(place).resolve().is_relative_to(ROOT) for place in places)


def preprocess() -> None:
    run("preprocess.cli")


def train() -> None:
    run("train.cli")


def inspect_shards() -> None:
    run("tools.inspect_shards.cli")


def checkpoints() -> None:
    run("tools.checkpoints.cli")


def speak() -> None:
    run("tools.speak")


def evaluate() -> None:
    run("tools.evaluate.cli")


def tiny() -> None:
    run("tools.tiny.cli")


def bench() -> None:
    run("tools.bench.cli")


def serve() -> None:
    run("tools.serve.cli")
