"""The key that is named is the key of the sample that is meant, wherever rejected rows left gaps in the numbering."""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from damage import flip_payload

from shards.config import SequenceSection
from shards.index import read_index
from shards.manifest import Dataset, digest_of, read_record
from shards.sequence import SequenceBuilder
from shards.writer import Reject, sample_key, shard_path, write_json, write_shard
from train.config import TrainSection
from train.data.loader import LoaderShare
from train.data.planned_source import PlannedSource

# Rows of each shard's list, the kept ones as their positions: gaps in front, in the middle, at the end, none.
KEPT = [[2, 3, 5, 6], [0, 1, 2], [1, 4, 5], [0, 3]]
NUM_ROWS = [7, 3, 6, 6]
KEYS = [sample_key(shard, position) for shard, kept in enumerate(KEPT) for position in kept]
SECTION = TrainSection(batch_tokens=700, packs_per_step=1, max_bad_fraction=1.0, listening_samples=0)


@pytest.fixture(scope="module")
def builder(tokenizer) -> SequenceBuilder:
    return SequenceBuilder(tokenizer, SequenceSection())


@pytest.fixture(scope="module")
def original(tmp_path_factory, make_dataset, make_sample) -> Path:
    folder = tmp_path_factory.mktemp("rejects")
    dataset = read_record(make_dataset(folder / "one", [make_sample(0)]) / "dataset.json", Dataset)
    done = []
    seeds = itertools.count()
    for shard, (kept, num_rows) in enumerate(zip(KEPT, NUM_ROWS, strict=True)):
        samples = [
            replace(make_sample(next(seeds), 6, 9 + 30 * (position == 5)), key=sample_key(shard, position))
            for position in kept
        ]
        rejects = [
            Reject(row=row, id=f"row-{row}", stage="text", reason="too_short", detail="")
            for row in range(num_rows)
            if row not in kept
        ]
        done.append(write_shard(folder / "many", shard, samples, rejects))
    indexes = [read_index(shard_path(folder / "many", shard, ".idx.npy")) for shard in range(len(KEPT))]
    np.save(folder / "many" / "index.npy", np.concatenate(indexes))
    dataset = msgspec.structs.replace(dataset, shards=done, num_samples=len(KEYS))
    write_json(folder / "many" / "dataset.json", msgspec.structs.replace(dataset, digest=digest_of(dataset)))
    return folder / "many"


@pytest.fixture
def dataset(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "data")


def faults(folder: Path, builder: SequenceBuilder) -> list[str]:
    """Keys of the samples that one epoch skips."""
    source = PlannedSource(str(folder), SECTION)
    source.prepare(builder)
    packs = itertools.islice(source.loaded_packs(0, LoaderShare()), source.planner.num_steps(0))
    return [fault.key for loaded in packs for fault in loaded.faults]


def change(folder: Path, row: int, begin: int, data: bytes) -> None:
    """Overwrite bytes from `begin` on, counted from the beginning of a sample."""
    found = read_index(folder / "index.npy")[row]
    with shard_path(folder, int(found["shard"]), ".tar").open("r+b") as file:
        file.seek(int(found["offset"]) + begin)
        file.write(data)


@pytest.mark.parametrize("row", range(len(KEYS)))
def test_a_damaged_sample_is_named_by_its_own_key(dataset, builder, row):
    flip_payload(dataset, row)
    assert faults(dataset, builder) == [KEYS[row]]


@pytest.mark.parametrize("header", [bytes(512), b"9", b"\xff" * 512], ids=["zeros", "one digit", "ones"])
def test_a_damaged_header_names_no_sound_sample(dataset, builder, header):
    for row in (1, 5):  # of a shard with rejects, of one without
        change(dataset, row, 4, header)
    found = sorted(faults(dataset, builder))
    assert found == [KEYS[5], "number 2 of shard 000000 (its key is not readable)"]


def test_a_tar_that_is_cut_or_gone_names_no_sound_sample(dataset, builder):
    tar = shard_path(dataset, 2, ".tar")
    tar.write_bytes(tar.read_bytes()[: int(read_index(dataset / "index.npy")[8]["offset"]) + 600])
    shard_path(dataset, 3, ".tar").unlink()
    found = faults(dataset, builder)
    named = {key for key in found if key in KEYS}
    assert named == {KEYS[8]}, "its header is left"
    assert {key for key in found if key not in KEYS} == {
        f"number {number} of shard {shard} (its key is not readable)"
        for shard, number in (("000002", 3), ("000003", 1), ("000003", 2))
    }


def test_too_long_samples_are_named_by_their_own_keys(dataset, builder, caplog, tmp_path, http_server):
    """Behind a URL too, as far as it costs no shard's way through the network."""
    lengths = builder.lengths(read_index(dataset / "index.npy"))
    longest = np.sort(lengths)[-3:]
    section = msgspec.structs.replace(SECTION, batch_tokens=int(longest[0]) - 1, cache_dir=str(tmp_path / "cache"))
    too_long = {KEYS[row] for row in np.flatnonzero(lengths >= longest[0])}
    with caplog.at_level(logging.INFO, logger="train"):
        for location in (str(dataset), http_server(dataset)):
            caplog.clear()
            logging.getLogger("train").propagate = True
            source = PlannedSource(location, section)
            source.prepare(builder)
            source.describe()
            (line,) = [message for message in caplog.messages if "longer than train.batch_tokens" in message]
            named = set(re.findall(r"\b\d{12}\b", line))
            assert named <= too_long
            assert location.startswith("http") or named == too_long


def test_verify_and_show_name_the_key(dataset, run_command):
    flip_payload(dataset, 1)
    result = run_command("inspect-shards", "verify", dataset)
    assert result.returncode == 1
    assert f"(key {KEYS[1]})" in result.stderr
    for row in (0, 2, 3, 9):  # sound ones are shown though a damaged one lies before them
        shown = run_command("inspect-shards", "show", dataset, KEYS[row], "--json")
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)["key"] == KEYS[row]
    damaged = run_command("inspect-shards", "show", dataset, KEYS[1])
    assert damaged.returncode == 1
    assert "checksum differs" in damaged.stderr
