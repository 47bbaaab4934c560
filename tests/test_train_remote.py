"""Planned training from a data set behind a URL: the same packs, verified copies, a bounded cache, one download a file."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import fsspec
import msgspec
import numpy as np
import pytest

import train.data.remote as remote_module
from shards.config import SequenceSection
from shards.errors import ConfigError, PipelineError, ShardError
from shards.index import read_index
from shards.manifest import Dataset, digest_of, read_record
from shards.sequence import SequenceBuilder
from shards.writer import ShardDone, sample_key, shard_path, write_json, write_shard
from train.config import TrainSection
from train.data.loader import LoaderShare
from train.data.planned_source import PlannedSource
from train.data.remote import RemoteShards

NUM_SHARDS = 6
PER_SHARD = 5


@pytest.fixture(scope="module")
def builder(tokenizer) -> SequenceBuilder:
    return SequenceBuilder(tokenizer, SequenceSection())


@pytest.fixture(scope="module")
def original(tmp_path_factory, make_dataset, make_sample) -> Path:
    """A data set of several shards, put together from one that `make_dataset` writes."""
    folder = tmp_path_factory.mktemp("original")
    samples = [make_sample(seed, 5 + seed % 7, 8 + seed % 5) for seed in range(NUM_SHARDS * PER_SHARD)]
    dataset = read_record(make_dataset(folder / "one", samples) / "dataset.json", Dataset)
    done: list[ShardDone] = []
    for shard in range(NUM_SHARDS):
        part = samples[shard * PER_SHARD : (shard + 1) * PER_SHARD]
        for number, sample in enumerate(part):
            object.__setattr__(sample, "key", sample_key(shard, number))
        done.append(write_shard(folder / "many", shard, part, []))
    indexes = [read_index(shard_path(folder / "many", shard, ".idx.npy")) for shard in range(NUM_SHARDS)]
    np.save(folder / "many" / "index.npy", np.concatenate(indexes))
    dataset = msgspec.structs.replace(dataset, shards=done)
    write_json(folder / "many" / "dataset.json", msgspec.structs.replace(dataset, digest=digest_of(dataset)))
    return folder / "many"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote_module, "FIRST_PAUSE_S", 0.0)


@pytest.fixture
def published(original, tmp_path):
    return shutil.copytree(original, tmp_path / "published")


def section(tmp_path: Path, **values) -> TrainSection:
    defaults = {"batch_tokens": 700, "packs_per_step": 2, "shuffle_window": 10, "cache_dir": str(tmp_path / "cache")}
    return TrainSection(**{**defaults, **values})


def keys(location, builder, settings: TrainSection, count: int = 30, num_workers: int = 0) -> list[str]:
    source = PlannedSource(str(location), settings)
    source.prepare(builder)
    loaded_packs = itertools.islice(source.loaded_packs(0, LoaderShare(num_workers=num_workers)), count)
    return [key for loaded in loaded_packs for key in loaded.batch.keys]


@pytest.mark.parametrize("scheme", ["http", "file", "memory"])
def test_the_same_packs_as_from_the_folder(published, builder, tmp_path, http_server, scheme):
    settings = section(tmp_path)
    if scheme == "http":
        url = http_server(published)
    elif scheme == "file":
        url = f"file://{published}"
    else:
        url = f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").put(str(published), f"/{tmp_path.name}", recursive=True)
    assert keys(url, builder, settings) == keys(published, builder, settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_file_is_fetched_once_whoever_needs_it(published, builder, tmp_path, http_server, num_workers):
    url = http_server(published)
    keys(url, builder, section(tmp_path), count=60, num_workers=num_workers)
    keys(url, builder, section(tmp_path), count=60, num_workers=num_workers)
    gets = Counter(path for path in http_server.gets if path.endswith(".tar"))
    assert len(gets) == NUM_SHARDS
    assert set(gets.values()) == {1}, "copies of the first run serve the second"


def test_processes_of_a_node_wait_for_one_download(published, tmp_path, http_server):
    url = http_server(published)
    several = [RemoteShards(url, tmp_path / "cache", 10**9) for _ in range(4)]
    threads = [threading.Thread(target=one.fetch, args=(range(NUM_SHARDS),)) for one in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(path for path in http_server.gets if path.endswith(".tar")).most_common(1)[0][1] == 1


def test_the_cache_stays_within_its_size(published, builder, tmp_path):
    sizes = [path.stat().st_size for path in published.rglob("*.tar")]
    room = 4.5 * max(sizes)  # two windows of two shards
    settings = section(tmp_path, cache_gb=room / 1e9)
    url = f"file://{published}"
    found = keys(url, builder, settings, count=90)
    assert found == keys(published, builder, settings, count=90)
    (cache,) = (tmp_path / "cache").iterdir()
    assert sum(path.stat().st_size for path in cache.rglob("*.tar")) <= room


def test_a_cache_too_small_for_two_windows_is_refused(published, builder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"windows 0 and 1 of file://.*train.cache_gb allows 1e-05; raise it or lower"
    ):
        keys(f"file://{published}", builder, section(tmp_path, cache_gb=1e-5))


def test_a_copy_that_is_not_the_original_is_not_taken(published, builder, tmp_path):
    path = shard_path(published, 3, ".tar")
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(PipelineError, match=r"shard-000003.tar: sha256 \w+, dataset.json says \w+ \(3 attempts\)"):
        keys(f"file://{published}", builder, section(tmp_path), count=60)
    path.write_bytes(data[:1000])
    with pytest.raises(PipelineError, match=r"shard-000003.tar: 1000 bytes, dataset.json says \d+"):
        keys(f"file://{published}", builder, section(tmp_path), count=60)
    (cache,) = (tmp_path / "cache").iterdir()
    assert not list(cache.rglob("*000003*"))


def test_a_connection_that_breaks_off_is_retried_and_logged(published, builder, tmp_path, http_server, monkeypatch):
    url = http_server(published)
    sent = Counter()
    whole = SimpleHTTPRequestHandler.copyfile

    def break_off(self, source, outputfile):
        sent[self.path] += 1
        if self.path.endswith(".tar") and sent[self.path] <= broken:
            outputfile.write(source.read(1000))
            self.close_connection = True
        else:
            whole(self, source, outputfile)

    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", break_off)
    broken = 1
    assert keys(url, builder, section(tmp_path)) == keys(published, builder, section(tmp_path))
    broken = 99
    with pytest.raises(PipelineError, match=r"\.tar: ClientPayloadError: .*\(3 attempts\); check the network"):
        keys(url, builder, section(tmp_path, cache_dir=str(tmp_path / "other")))


def test_a_missing_shard_and_a_missing_data_set_are_named(published, builder, tmp_path, http_server):
    url = http_server(published)
    shard_path(published, 2, ".tar").unlink()
    with pytest.raises(PipelineError, match=r"shard-000002.tar: FileNotFoundError.*check the network"):
        keys(url, builder, section(tmp_path), count=60)
    with pytest.raises(ShardError, match=r"nowhere/dataset.json: not readable.*give the address of an OUT folder"):
        PlannedSource(f"{url}/nowhere", section(tmp_path))


def test_an_index_of_another_data_set_is_refused(published, tmp_path):
    index = np.load(published / "index.npy")
    index["crc32"][7] ^= 1
    np.save(published / "index.npy", index)
    with pytest.raises(ShardError, match=r"index.npy: rows of shard 1 are not those of dataset.json"):
        PlannedSource(f"file://{published}", section(tmp_path))


@pytest.mark.parametrize(
    "digest", ["../mine", "/tmp/mine", "", "a" * 64, "A" * 64, "0" * 63, "..", "\u0000" * 64, "../" * 21 + "a"]
)
def test_a_digest_that_is_not_the_contents_chooses_no_folder(published, tmp_path, digest):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "index.npy").write_text("my own")
    record = json.loads((published / "dataset.json").read_text())
    (published / "dataset.json").write_text(json.dumps({**record, "digest": digest}))
    for location in (f"file://{published}", str(published)):  # wherever the file is read
        with pytest.raises(ShardError, match=r"its digest is .*, its content has [0-9a-f]{64}: it was changed"):
            PlannedSource(location, section(tmp_path))
    assert (mine / "index.npy").read_text() == "my own"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "published"}


@pytest.mark.parametrize("shard", [-1, 10**6, 1])
def test_a_shard_number_that_is_none_is_refused(published, tmp_path, shard):
    dataset = read_record(published / "dataset.json", Dataset)
    first = msgspec.structs.replace(dataset.shards[0], shard=shard)
    forged = msgspec.structs.replace(dataset, shards=[first, *dataset.shards[1:]])
    write_json(published / "dataset.json", msgspec.structs.replace(forged, digest=digest_of(forged)))
    with pytest.raises(ShardError, match="shard numbers must be distinct and from 0 to 999999"):
        PlannedSource(f"file://{published}", section(tmp_path))


def test_copies_are_checked_again_at_every_start(published, builder, tmp_path, caplog):
    """Same size, other bytes: of the index, and of a tar; both are fetched again."""
    settings = section(tmp_path)
    url = f"file://{published}"
    wanted = keys(url, builder, settings)
    (cache,) = (tmp_path / "cache").iterdir()
    copies = [cache / "index.npy", *cache.rglob("*.tar")]
    sound = {path: path.read_bytes() for path in copies}
    for path, data in sound.items():
        path.write_bytes(data[:-600] + bytes([data[-600] ^ 1]) + data[-599:])
    assert keys(url, builder, settings) == wanted
    assert {path: path.read_bytes() for path in copies} == sound
    (cache / "index.npy").write_bytes(b"")
    assert keys(url, builder, settings) == wanted


def test_an_index_with_more_rows_than_the_shards_is_refused(published, tmp_path):
    index = np.load(published / "index.npy")
    dataset = read_record(published / "dataset.json", Dataset)
    for rows in (np.concatenate([index, index[:2]]), index[:-1]):
        np.save(published / "index.npy", rows)
        forged = msgspec.structs.replace(dataset, num_samples=len(rows))
        write_json(published / "dataset.json", msgspec.structs.replace(forged, digest=digest_of(forged)))
        with pytest.raises(ShardError, match=r"index.npy: "):
            PlannedSource(f"file://{published}", section(tmp_path))


def test_a_copy_removed_meanwhile_is_fetched_again(published, builder, tmp_path):
    source = PlannedSource(f"file://{published}", section(tmp_path))
    source.prepare(builder)
    loaded_packs = source.loaded_packs(0, LoaderShare())
    next(loaded_packs)
    (cache,) = (tmp_path / "cache").iterdir()
    for path in cache.rglob("*.tar"):
        path.unlink(missing_ok=True)  # the thread that fetches ahead makes room meanwhile
    assert not [fault for loaded in itertools.islice(loaded_packs, 20) for fault in loaded.faults]


def test_a_package_that_is_missing_is_named(builder, tmp_path, monkeypatch):
    def no_package(*_: object):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", no_package)
    with pytest.raises(
        ConfigError, match=r"Install s3fs to access S3; install the extra: pip install -e '.\[remote\]'"
    ):
        PlannedSource("s3://bucket/data", section(tmp_path))


@pytest.mark.slow
def test_the_command_trains_from_an_address(published, run_command, tiny_dir, tmp_path, http_server):
    url = http_server(published)
    overrides = ["batch_tokens=1500", "packs_per_step=2", "max_steps=3", "log_every=1", "num_workers=1"]
    overrides += ["shuffle_window=10", f"cache_dir={tmp_path / 'cache'}"]
    options = [word for override in overrides for word in ("--set", f"train.{override}")]
    losses = []
    for name, location in (("remote", url), ("local", published)):
        result = run_command("train", location, tmp_path / name, "--config", tiny_dir / "pipeline.toml", *options)
        assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss/total_loss"] for line in lines])
    assert losses[0] == losses[1]
