"""The plan's loader: the same packs for any workers, ranks and start; a damaged sample keeps its place with no weight."""

from __future__ import annotations

import errno
import itertools
import logging
import multiprocessing
import multiprocessing.context
import os

import numpy as np
import pytest
import torch
from damage import flip_payload

from shards.config import SequenceSection
from shards.errors import PipelineError, ShardError
from shards.reader import SampleReader
from shards.sequence import SequenceBuilder
from train.config import LossSection, TrainSection
from train.data.feed import MAX_LOGGED_FAULTS, DamageLimits, Feed
from train.data.loader import LoaderShare
from train.data.loader_processes import dead_loader
from train.data.planned_source import PlannedSource
from train.data.stages import FILLER, LoadedPack
from train.model.batch import pack
from train.model.loss import LossCounts, step_losses
from train.model.weights import load_model
from train.world import ALONE

BUDGET = 700
SECTION = TrainSection(batch_tokens=BUDGET, packs_per_step=4, max_bad_fraction=0.2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def builder(tokenizer) -> SequenceBuilder:
    return SequenceBuilder(tokenizer, SequenceSection())


@pytest.fixture
def dataset(tmp_path, make_dataset, make_sample):
    return make_dataset(tmp_path / "data", [make_sample(seed, 5 + seed % 7, 8 + seed % 5) for seed in range(30)])


def open_source(folder, builder, section: TrainSection = SECTION) -> PlannedSource:
    source = PlannedSource(str(folder), section)
    source.prepare(builder)
    return source


def keys_of(loaded_packs, count: int) -> list[list[str]]:
    return [loaded.batch.keys for loaded in itertools.islice(loaded_packs, count)]


def feed_of(source: PlannedSource, limits: DamageLimits | None = None) -> Feed:
    loaded_packs = source.loaded_packs(0, LoaderShare())
    return Feed(loaded_packs, SECTION.packs_per_step, 0, ALONE, limits or source.limits())


def test_loader_processes_start_whatever_the_default_way_is(dataset, builder, monkeypatch):
    """Python 3.14 starts processes with forkserver."""
    forkserver = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", forkserver)
    source = open_source(dataset, builder)
    assert len(keys_of(source.loaded_packs(0, LoaderShare(num_workers=1)), 2)) == 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_packs_do_not_depend_on_loader_workers(dataset, builder, num_workers):
    source = open_source(dataset, builder)
    count = 2 * source.planner.num_steps(0) * SECTION.packs_per_step
    alone = keys_of(source.loaded_packs(0, LoaderShare()), count)
    assert keys_of(source.loaded_packs(0, LoaderShare(num_workers=num_workers)), count) == alone


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_the_packs_of_one_process(dataset, builder, world_size):
    source = open_source(dataset, builder)
    count = 2 * source.planner.num_steps(0) * SECTION.packs_per_step
    alone = keys_of(source.loaded_packs(0, LoaderShare()), count)
    for rank in range(world_size):
        share = LoaderShare(rank, world_size)
        assert keys_of(source.loaded_packs(0, share), count // world_size) == alone[rank::world_size]


def test_going_on_at_every_step_reads_the_same_packs(dataset, builder):
    source = open_source(dataset, builder)
    num_steps = 2 * source.planner.num_steps(0)
    size = SECTION.packs_per_step
    whole = keys_of(source.loaded_packs(0, LoaderShare()), num_steps * size)
    for step in range(num_steps):
        rest = keys_of(open_source(dataset, builder).loaded_packs(step, LoaderShare()), (num_steps - step) * size)
        assert rest == whole[step * size :]


def test_lengths_in_the_plan_are_those_of_the_sequences(dataset, builder):
    source = open_source(dataset, builder)
    for loaded in itertools.islice(source.loaded_packs(0, LoaderShare()), 8):
        assert loaded.batch.num_tokens <= BUDGET
    total = sum(
        d.batch.num_tokens for d in itertools.islice(source.loaded_packs(0, LoaderShare()), source.planner.num_packs(0))
    )
    assert total == source.planner.num_tokens


def test_a_damaged_sample_leaves_its_pack_and_no_other(dataset, builder):
    source = open_source(dataset, builder)
    count = source.planner.num_packs(0)
    sound = keys_of(source.loaded_packs(0, LoaderShare()), count)
    flip_payload(dataset, 7)
    loaded_packs = list(itertools.islice(source.loaded_packs(0, LoaderShare()), count))
    assert [d.batch.keys for d in loaded_packs] == [[k for k in keys if k != "000000000007"] for keys in sound]
    (fault,) = (fault for loaded in loaded_packs for fault in loaded.faults)
    assert fault.key == "000000000007"
    assert fault.shard == "shards/000/shard-000000.tar"
    assert "checksum differs" in fault.reason


def test_a_pack_of_damaged_samples_only_becomes_a_filler(dataset, builder):
    source = open_source(dataset, builder)
    _, packs = next(source.planner.steps_from(0))
    for row in packs[1]:
        flip_payload(dataset, int(row))
    first, second = itertools.islice(source.loaded_packs(0, LoaderShare()), 2)
    assert first.batch.keys
    assert second.batch.keys == []
    assert len(second.faults) == len(packs[1]) > 1
    assert second.batch.num_tokens == len(FILLER)


def test_a_filler_runs_every_branch_and_teaches_nothing(model_dir, builder, make_sample):
    model = load_model(model_dir, torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batches = [pack([builder.training(make_sample(1))], [5], ["a"]), pack([FILLER], [0], [])]
    counts = LossCounts.of(batches)
    assert counts.text == LossCounts.of(batches[:1]).text
    assert torch.equal(counts.audio, LossCounts.of(batches[:1]).audio)
    losses = step_losses(model(batches[1]), counts, LossSection(), 1.0)
    assert losses.total.item() == 0.0
    losses.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(".mlp." in name for name in used)
    assert any(".audio_mlp." in name for name in used)


def test_the_feed_counts_what_it_leaves_out(dataset, builder, caplog):
    flip_payload(dataset, 7)
    source = open_source(dataset, builder)
    feed = feed_of(source)
    num_steps = source.planner.num_steps(0)
    with caplog.at_level(logging.WARNING, "train"):
        steps = [next(feed) for _ in range(2 * num_steps)]
    assert feed.num_bad == 2, "once an epoch"
    assert sum(step.num_samples for step in steps) == 2 * 29
    fillers = sum(num_steps * 4 - source.planner.num_packs(epoch) for epoch in (0, 1))
    assert feed.values() == {
        "metrics/bad_samples": 2,
        "metrics/too_long_samples": 0,
        "metrics/filler_packs": fillers,
    }
    assert [step.epoch for step in steps] == [0] * num_steps + [1] * num_steps
    assert all(len(step.batches) == 4 for step in steps)
    assert "shards/000/shard-000000.tar: sample 000000000007" in caplog.text


def test_too_much_damage_stops_with_numbers(dataset, builder):
    for row in range(8):
        flip_payload(dataset, row)
    feed = feed_of(open_source(dataset, builder))
    with pytest.raises(PipelineError, match=r"of 30 samples are damaged, more than train.max_bad_fraction = 0.2"):
        list(itertools.islice(feed, 20))


def test_only_the_first_faults_are_logged_one_by_one(dataset, builder, caplog):
    for row in range(30):
        flip_payload(dataset, row)
    source = open_source(dataset, builder)
    feed = feed_of(source, DamageLimits(1.0, 30))
    with caplog.at_level(logging.WARNING, "train"):
        for _ in range(source.planner.num_steps(0)):
            next(feed)
    assert feed.num_bad == 30
    assert caplog.text.count("skipped: ") == MAX_LOGGED_FAULTS
    assert caplog.text.count("from here on they are only counted") == 1


def test_a_loader_that_ends_early_is_an_error_and_no_hang():
    filler = LoadedPack(pack([FILLER], [0], []), 0)
    feed = Feed(iter([filler] * 5), 4, 0, ALONE, DamageLimits(0.0))
    next(feed)
    with pytest.raises(PipelineError, match="the loader gave 1 of 4 packs of step 2"):
        next(feed)


def test_the_command_refuses_too_few_packs_with_numbers(dataset, run_command, tiny_dir, tmp_path):
    result = run_command(
        "train", dataset, tmp_path / "run", "--config", tiny_dir / "pipeline.toml", "--set", "train.packs_per_step=16"
    )
    assert result.returncode == 1
    assert (
        "error: train.packs_per_step = 16, but an epoch has only 2 packs of up to 4096 tokens (30 samples"
        in result.stderr
    )
    assert "Traceback" not in result.stderr


def test_a_killed_loader_process_is_logged_with_what_to_do(dataset, builder):
    loaded_packs = open_source(dataset, builder).loaded_packs(0, LoaderShare(num_workers=1))
    next(loaded_packs)
    with pytest.raises(PipelineError, match=r"a loader process has ended \(.*lower train.num_workers"):
        kill_and_read_on(loaded_packs)


def kill_and_read_on(loaded_packs) -> None:
    """torch raises it from a signal handler, wherever the process is, or from the queue."""
    try:
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        for _ in range(100):
            next(loaded_packs)
    except RuntimeError as error:
        raise dead_loader(error) or error from None


def test_other_errors_are_not_taken_for_a_dead_loader():
    assert dead_loader(RuntimeError("Caught KeyError in DataLoader worker process 0.")) is None
    assert dead_loader(RuntimeError()) is None


def test_a_stale_file_handle_is_opened_again(dataset, monkeypatch):
    """ESTALE after a server's restart. Two errors in a row are damage of that one sample, not the end of the run."""
    index = np.load(dataset / "index.npy")
    reader = SampleReader(dataset)
    whole = reader.read_raw(index[3])
    answers = [OSError(errno.ESTALE, "Stale file handle")]
    pread = os.pread

    def forgetful(descriptor: int, length: int, offset: int) -> bytes:
        if answers:
            raise answers.pop()
        return pread(descriptor, length, offset)

    monkeypatch.setattr("os.pread", forgetful)
    assert reader.read_raw(index[3]) == whole
    answers += [OSError(errno.EIO, "Input/output error")] * 2
    with pytest.raises(ShardError, match=r"shard-000000.tar at byte \d+: cannot be read: Input/output error"):
        reader.read_raw(index[3])
    assert reader.read_raw(index[3]) == whole
