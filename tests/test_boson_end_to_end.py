"""End to end in the boson environment, by the real commands: what the native environment made, made again.

`make test-boson` runs the native environment end to end first (tests/boson_oracle.py). The shards must be the same
bytes; losses, merged weights and spoken codes the same numbers, since both have the same torch and peft.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from boson_oracle import run_end_to_end
from safetensors.torch import load_file

from shards.manifest import open_dataset

ORACLE = Path(__file__).parent.parent / "out" / "boson-oracle"

pytest.importorskip("boson_multimodal", reason="the boson environment: make test-boson")


@pytest.fixture(scope="module")
def expected() -> Path:
    if not (ORACLE / "codec.long.decoded.npy").is_file():
        pytest.skip("out/boson-oracle is written by the native environment: make test-boson")
    return ORACLE / "end-to-end"


@pytest.fixture(scope="module")
def made(expected: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end-to-end")
    run_end_to_end(folder, expected.parent / "tiny" / "pipeline.toml")
    return folder


def losses(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.startswith(("step", "loss/"))} for line in lines]


def test_shards_are_the_same_bytes(expected: Path, made: Path):
    paths = sorted(path.relative_to(expected) for path in (expected / "shards" / "shards").rglob("*") if path.is_file())
    assert len([path for path in paths if path.suffix == ".tar"]) == 2
    for path in paths:
        assert (made / path).read_bytes() == (expected / path).read_bytes(), path
    assert open_dataset(made / "shards")[0].digest == open_dataset(expected / "shards")[0].digest


def test_training_has_the_same_losses(expected: Path, made: Path):
    native, boson = losses(expected / "run"), losses(made / "run")
    assert [line["step"] for line in native] == [1, 2, 3, 4]
    assert boson == native


def test_merged_weights_are_the_same(expected: Path, made: Path):
    (native,), (boson,) = (sorted((folder / "merged").glob("*.safetensors")) for folder in (expected, made))
    theirs, ours = load_file(native), load_file(boson)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    for name in ("config.json", "tokenizer.json"):
        assert (made / "merged" / name).read_bytes() == (expected / "merged" / name).read_bytes(), name


def test_the_same_codes_are_spoken(expected: Path, made: Path):
    native = np.load(expected / "codes.npy")
    assert native.shape == (8, 50)
    assert all(len(np.unique(book)) > 5 for book in native), "codes that do not vary would prove nothing"
    np.testing.assert_array_equal(np.load(made / "codes.npy"), native)
