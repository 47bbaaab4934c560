"""`loader = "stream"`: anybody's shards with the documented members, no index, and no silent loss."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import cast

import fsspec
import msgspec
import pytest
import torch
from webdataset.writer import TarWriter

from shards.config import SequenceSection
from shards.delay_pattern import NUM_MARKER_COLUMNS
from shards.errors import ConfigError, PipelineError
from shards.sample import pack_sample
from shards.sequence import SequenceBuilder
from train.config import TrainSection
from train.data.feed import DamageLimits, Feed
from train.data.loader import LoaderShare
from train.data.shard_urls import shard_urls
from train.data.stages import LoadedPack
from train.data.streamed_source import StreamedSamples, StreamedSource
from train.world import ALONE, World

SETTINGS = {"loader": "stream", "max_steps": 10, "batch_tokens": 700, "packs_per_step": 2, "shuffle_buffer": 8}
SETTINGS["num_workers"] = 0  # as the shares that these tests take


@pytest.fixture(scope="module")
def builder(tokenizer) -> SequenceBuilder:
    return SequenceBuilder(tokenizer, SequenceSection())


@pytest.fixture(scope="module")
def samples(make_sample):
    return [make_sample(seed, 5 + seed % 7, 8 + seed % 5) for seed in range(24)]


def write_foreign(folder: Path, samples, num_shards: int = 3) -> Path:
    """Shards as another tool writes them: Python's tarfile, keys of its own, members in its own order and one more."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for sample in samples[shard::num_shards]:
                members = [*reversed(pack_sample(sample)), ("note.txt", b"written elsewhere")]
                for suffix, data in members:
                    member = tarfile.TarInfo(f"clips/{sample.facts.id}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture
def foreign(tmp_path, samples) -> Path:
    return write_foreign(tmp_path / "foreign", samples)


def open_stream(location, builder, **values) -> StreamedSource:
    source = StreamedSource(str(location), TrainSection(**{**SETTINGS, **values}))
    source.prepare(builder)
    return source


def take(source: StreamedSource, count: int, share: LoaderShare | None = None, first_step: int = 0) -> list[LoadedPack]:
    return list(itertools.islice(source.loaded_packs(first_step, share or LoaderShare()), count))


def keys(loaded_packs) -> list[str]:
    return [key for loaded in loaded_packs for key in loaded.batch.keys]


def test_every_sample_comes_equally_often_within_the_budgets(foreign, builder, samples):
    limits = {"max_supervised_tokens": 50, "max_references": 2}
    loaded_packs = take(open_stream(foreign, builder, **limits), 60)
    for loaded in loaded_packs:
        assert loaded.batch.num_tokens <= 700
        assert len(loaded.batch.audio_rows) <= 50
        assert 1 <= len(loaded.batch.keys) <= 2
    counts = Counter(keys(loaded_packs))
    assert set(counts) == {f"clips/{sample.facts.id}" for sample in samples}
    assert max(counts.values()) - min(counts.values()) <= 3, "what lies in the buffer and in open packs is yet to come"


def test_packs_are_the_builders_sequences(foreign, builder, samples):
    by_key = {f"clips/{sample.facts.id}": builder.training(sample) for sample in samples}
    for loaded in take(open_stream(foreign, builder), 10):
        assert loaded.batch.num_tokens == sum(len(by_key[key]) for key in loaded.batch.keys)


def test_ranks_share_the_shards_of_every_pass(foreign):
    """Three ranks, three shards of eight samples: every pass is a partition, and not always the same one."""
    ranks = [iter(StreamedSamples(shard_urls(str(foreign)), 0, 0, LoaderShare(rank, 3))) for rank in range(3)]
    passes = [[frozenset(raw.key for raw in itertools.islice(rank, 8)) for rank in ranks] for _ in range(6)]
    for parts in passes:
        assert [len(part) for part in parts] == [8, 8, 8]
        assert len(frozenset.union(*parts)) == 24
    assert len({parts[0] for parts in passes}) > 1


def test_passes_are_the_epochs_of_a_stream(foreign, builder):
    """24 samples in packs of several: no second pass begins within the first samples, and several are over in the end."""
    feed = Feed(open_stream(foreign, builder).loaded_packs(0, LoaderShare()), 2, 0, ALONE, DamageLimits(0.0))
    steps = [next(feed) for _ in range(40)]
    assert steps[0].epoch == 0
    assert sum(step.num_samples for step in steps if step.epoch == 0) <= 24
    assert steps[-1].epoch >= 2


def test_ranks_pass_at_their_own_pace(foreign, builder):
    class Two:
        """Another rank that is three passes ahead."""

        device, rank, size, is_first = torch.device("cpu"), 0, 2, True

        def gather(self, mine):
            return [mine, msgspec.structs.replace(mine, epoch=mine.epoch + 3)]

        def sum(self, values):
            return values

    loaded_packs = open_stream(foreign, builder).loaded_packs(0, LoaderShare(0, 2))
    assert next(Feed(loaded_packs, 2, 0, cast(World, Two()), DamageLimits(0.0))).epoch == 3
    with pytest.raises(PipelineError, match="rank 0 is at step 0 of epoch 0, rank 1 at step 0 of epoch 3"):
        next(Feed(loaded_packs, 2, 0, cast(World, Two()), DamageLimits(0.0, epoch_samples=24)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_run_draws_the_same_order_a_resumed_one_another(foreign, builder, num_workers):
    share = LoaderShare(num_workers=num_workers)
    first = keys(take(open_stream(foreign, builder), 12, share))
    assert keys(take(open_stream(foreign, builder), 12, share)) == first
    assert keys(take(open_stream(foreign, builder), 12, share, first_step=5)) != first
    assert keys(take(open_stream(foreign, builder, seed=1), 12, share)) != first


def test_the_target_budget_counts_what_the_plan_counts(builder, samples):
    """The plan takes frames + NUM_MARKER_COLUMNS from the index: never less than there are."""
    for sample in samples:
        learned = (builder.training(sample).next_codes != -100).any(axis=0).sum()
        assert learned <= sample.target_codes.shape[1] + NUM_MARKER_COLUMNS


def test_faults_are_logged_with_shard_and_key(tmp_path, builder, samples):
    with TarWriter(str(tmp_path / "bad.tar")) as tar:
        for sample in samples[:10]:
            members = dict(pack_sample(sample))
            if sample.facts.row == 3:
                del members["tgt.codes.npy"]
            if sample.facts.row == 5:
                members["json"] = b"{}"
            tar.write({"__key__": sample.facts.id, **members})
    loaded_packs = take(open_stream(tmp_path / "bad.tar", builder, shuffle_buffer=1), 8)
    faults = {fault.key: fault for loaded in loaded_packs for fault in loaded.faults}
    assert set(faults) == {"sample-3", "sample-5"}
    assert "missing member tgt.codes.npy" in faults["sample-3"].reason
    assert faults["sample-5"].shard == str(tmp_path / "bad.tar")
    assert not {"sample-3", "sample-5"} & set(keys(loaded_packs))


def test_a_sequence_longer_than_a_pack_is_logged_as_no_damage(foreign, builder):
    loaded_packs = take(open_stream(foreign, builder, batch_tokens=235, shuffle_buffer=1), 40)
    faults = [fault for loaded in loaded_packs for fault in loaded.faults]
    assert faults
    assert not any(fault.is_damage for fault in faults)
    assert all("longer than a pack" in fault.reason for fault in faults)


@pytest.mark.parametrize("num_bytes", [30_000, 30_720, 512, 31_233])
def test_a_cut_shard_is_logged_and_the_others_go_on(foreign, builder, num_bytes):
    path = foreign / "part-1.tar"
    path.write_bytes(path.read_bytes()[:num_bytes])
    loaded_packs = take(open_stream(foreign, builder, shuffle_buffer=1), 20)
    reasons = [str(fault) for loaded in loaded_packs for fault in loaded.faults]
    assert any("part-1.tar" in reason for reason in reasons), reasons


def test_shards_without_a_sample_are_an_error_not_a_loop(tmp_path, builder):
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    (tmp_path / "rubbish.tar").write_bytes(b"no tar at all" * 100)
    for name in ("empty", "rubbish"):
        with pytest.raises(PipelineError, match=f"no sample in 1 shards, the first .*{name}.tar"):
            take(open_stream(tmp_path / f"{name}.tar", builder), 1)


def test_lists_of_shards(foreign, tmp_path):
    names = [str(foreign / f"part-{number}.tar") for number in range(3)]
    assert shard_urls(str(foreign)) == names
    assert shard_urls(f"{foreign}/part-*.tar") == names
    assert shard_urls(f"{foreign}/part-{{0..2}}.tar") == names
    assert shard_urls(f"{names[2]}::{names[0]}") == [names[2], names[0]]
    assert shard_urls("s3://bucket/a-{000..002}.tar") == [f"s3://bucket/a-{n:03d}.tar" for n in range(3)]
    for wrong in (tmp_path / "nowhere", f"{foreign}/other-*.tar", foreign / "part-9.tar"):
        with pytest.raises(ConfigError, match="no shards there"):
            shard_urls(str(wrong))
    with pytest.raises(ConfigError, match="a pipe would run a shell command"):
        shard_urls("pipe:cat x.tar")


def test_shards_behind_an_fsspec_address(foreign, builder):
    files = fsspec.filesystem("memory")
    for path in foreign.glob("*.tar"):
        files.pipe_file(f"/stream/{path.name}", path.read_bytes())
    assert shard_urls("memory://stream/*.tar") == [f"memory:///stream/part-{n}.tar" for n in range(3)]
    local, remote = (keys(take(open_stream(place, builder), 12)) for place in (foreign, "memory://stream/"))
    assert local == remote


def test_shards_behind_http(foreign, builder, http_server):
    address = http_server(foreign)
    local = keys(take(open_stream(foreign, builder), 12))
    assert keys(take(open_stream(f"{address}/part-{{0..2}}.tar", builder), 12)) == local


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 0}, "say how long with train.max_steps"),
        ({"validation_fraction": 0.1}, "train.validation_fraction must be 0"),
        ({"order": "short_to_long"}, 'train.order "random"'),
    ],
)
def test_settings_that_need_an_index_are_refused(foreign, builder, values, message):
    with pytest.raises(ConfigError, match=message):
        open_stream(foreign, builder, **values)


def test_too_few_shards_for_the_readers_are_refused_with_numbers(foreign, builder):
    with pytest.raises(ConfigError, match=r"3 shards for 4 readers \(2 ranks of 2 loader processes\)"):
        open_stream(foreign, builder).loaded_packs(0, LoaderShare(0, 2, 2))
    with pytest.raises(ConfigError, match=r"3 shards for 4 readers \(1 ranks of 4 loader processes\)"):
        open_stream(foreign, builder, num_workers=4)  # before a model is loaded


@pytest.mark.slow
def test_the_command_trains_on_foreign_shards(foreign, run_command, tiny_dir, tmp_path, make_dataset, samples):
    held_out = make_dataset(tmp_path / "held-out", samples[:4])
    overrides = [
        "loader=stream",
        "batch_tokens=1500",
        "packs_per_step=2",
        "max_steps=8",
        "log_every=1",
        "num_workers=1",
    ]
    overrides += [f"validation_data={held_out}", "eval_every=4", "shuffle_buffer=8", "save_every=4"]
    overrides += ["listening_samples=0"]
    options = [word for override in overrides for word in ("--set", f"train.{override}")]
    run = tmp_path / "run"
    arguments = ("train", f"{foreign}/part-{{0..2}}.tar", run, "--config", tiny_dir / "pipeline.toml", *options)
    result = run_command(*arguments)
    assert result.returncode == 0, result.stderr
    assert "stream of 3 shards, 8 steps" in result.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss/total_loss"] < lines[0]["loss/total_loss"] - 0.5
    assert [line["step"] for line in lines if "eval/total_loss" in line] == [4, 8]
    assert run_command(*arguments).returncode == 0, "a finished run is finished"
