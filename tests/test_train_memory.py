"""The pack budget: the search on made-up memories, the heaviest pack, and the real measurement through the command."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch

from shards.config import SequenceSection, read_config
from shards.errors import ConfigError
from shards.reader import SampleReader
from shards.sequence import SequenceBuilder
from train import heap, loop
from train.config import TrainConfig, TrainSection
from train.data.heaviest_pack import PackCosts, PlannedPacks
from train.data.loader import LoaderShare
from train.data.packing import PlanSettings
from train.data.planned_source import PlannedSource
from train.loop import RunOptions, train
from train.memory import BUDGET_MULTIPLE, CLOSE_ENOUGH, MAX_GROWTH, HostMemory, LargestBudget, largest_budget
from train.run_folder.checkpoint_folders import complete_checkpoints
from train.run_folder.identity import read_identity

MB = 1_000_000


class Recorded:
    """A memory that follows a formula, and the budgets that were tried on it."""

    def __init__(self, formula) -> None:
        self.formula = formula
        self.tried: list[int] = []

    def __call__(self, budget: int) -> int:
        self.tried.append(budget)
        return int(self.formula(budget))


@pytest.mark.parametrize(
    "formula",
    [
        lambda n: 900 * MB + 0.05 * MB * n,
        lambda n: 900 * MB + 0.2 * MB * n**0.8,  # less and less per token
        lambda n: 1500 * MB + 0.001 * MB * n,  # nearly all of it does not grow
    ],
)
def test_the_search_finds_the_largest_from_below(formula):
    memory = Recorded(formula)
    room = 2000 * MB
    found = largest_budget(memory, idle=800 * MB, room=room, first=1000, most=1 << 20)
    assert found.peak == int(formula(found.budget)) <= room
    assert formula(int(found.budget * CLOSE_ENOUGH**2) + 2 * BUDGET_MULTIPLE) > room, "a larger one would have fitted"
    assert all(int(formula(budget)) <= room for budget in memory.tried), "nothing is tried that may run out of memory"
    assert memory.tried[-1] == found.budget, "what is in force was itself measured"
    assert all(after <= MAX_GROWTH * before for before, after in zip(memory.tried[:-1], memory.tried[1:], strict=True))


def test_a_memory_that_grows_faster_than_tokens_is_found_too():
    """A cliff behind 5000 tokens, and a square: one probe may be too large, and the search comes back."""
    square = Recorded(lambda n: 900 * MB + 0.03 * MB * n + 2.0 * n * n)
    found = largest_budget(square, idle=800 * MB, room=2000 * MB, first=1000, most=1 << 20)
    assert (
        square.formula(found.budget)
        <= 2000 * MB
        < square.formula(int(found.budget * CLOSE_ENOUGH**2) + 2 * BUDGET_MULTIPLE)
    )
    memory = Recorded(lambda n: 900 * MB + 0.01 * MB * n + (5000 * MB if n > 5000 else 0))
    found = largest_budget(memory, idle=900 * MB, room=2000 * MB, first=1000, most=1 << 20)
    assert 5000 / CLOSE_ENOUGH - BUDGET_MULTIPLE <= found.budget <= 5000


def test_no_search_beyond_what_was_asked_for():
    memory = Recorded(lambda n: 900 * MB + 0.01 * MB * n)
    assert largest_budget(memory, 900 * MB, 2000 * MB, first=2048, most=16384).budget == 16384
    assert memory.tried == [2048, 8192, 16384]
    assert largest_budget(memory, 900 * MB, 905 * MB, first=2048, most=16384) == LargestBudget(0, 900 * MB + 20480000)


def test_the_heaviest_pack_is_the_one_with_most_to_learn(make_dataset, make_sample, tokenizer, tmp_path):
    """Packs of as many tokens, but logits are made for targets only: short samples with long targets weigh most."""
    frames = [(6, 100)] * 12 + [(400, 6)] * 6
    dataset = make_dataset(tmp_path, [make_sample(seed, *pair) for seed, pair in enumerate(frames)])
    builder = SequenceBuilder(tokenizer, SequenceSection())
    index = np.load(dataset / "index.npy")
    packs = PlannedPacks(SampleReader(dataset), index, builder, PlanSettings(0, 1, 2, order="short_to_long"))
    assert packs.longest() == builder.lengths(index).max()
    light, heavy = PackCosts(token=1, place=0, target=0), PackCosts(token=1, place=0, target=1000)
    budget = 2 * packs.longest()
    heaviest = packs.heaviest_pack(budget, heavy)
    assert heaviest.num_tokens <= budget
    assert len(heaviest.audio_rows) > 1.5 * len(packs.heaviest_pack(budget, light).audio_rows)


def test_the_heaviest_pack_has_the_references_that_are_drawn(make_dataset, make_sample, tokenizer, tmp_path):
    """The list's are short, the speakers' other clips are not: the very pack that four epochs have as their largest."""
    samples = [make_sample(seed, 3, 40 + 3 * seed, speaker=f"speaker-{seed % 2}") for seed in range(24)]
    folder = make_dataset(tmp_path, samples)
    builder = SequenceBuilder(tokenizer, SequenceSection())

    def heaviest(reference: Literal["as_listed", "same_speaker"]) -> tuple[int, int]:
        """Tokens of the heaviest pack, and of the largest that comes."""
        source = PlannedSource(str(folder), TrainSection(batch_tokens=900, packs_per_step=1, reference=reference))
        probed = source.heaviest_packs(builder).heaviest_pack(900, PackCosts(token=1, place=0, target=0))
        source.prepare(builder)
        packs = itertools.islice(source.loaded_packs(0, LoaderShare()), source.planner.total_steps(4))
        return probed.num_tokens, max(pack.batch.num_tokens for pack in packs)

    listed, drawn = heaviest("as_listed"), heaviest("same_speaker")
    assert listed[0] == listed[1]
    assert drawn[0] == drawn[1] != listed[0]
    source = PlannedSource(str(folder), TrainSection(batch_tokens=900, packs_per_step=1, reference="same_speaker"))
    most = source.heaviest_packs(builder).most_tokens()
    source.prepare(builder)
    assert most == int(0.9 * source.planner.epoch_tokens(0)) > 0.9 * builder.lengths(source.index).sum()


def test_the_host_reports_what_was_really_taken():
    memory = HostMemory()
    before = memory.in_use()
    size = 300 * MB
    peak = memory.peak_of(lambda: print(torch.ones(size // 4).sum()))
    assert 0.99 * size < peak - before < 1.2 * size + 50 * MB
    assert memory.in_use() < before + 0.2 * size, "and given back"
    assert memory.room(0.5) - memory.in_use() < memory.room(1.0) - memory.in_use()


TAKEN_AGAIN = """
import resource
import sys
from train.heap import keep_freed_memory
if sys.argv[1] == "keeps":
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del [bytearray(64 << 20)][:]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="glibc alone has mallopt; without it: test_without_glibc_nothing_is_changed",
)
def test_freed_memory_is_kept_unless_the_user_says_otherwise(repository):
    """64 MB taken and freed three times, in processes of their own: how many pages the system had to clear for the last."""

    def faults(argument: str, **variables: str) -> int:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        command = [sys.executable, "-c", TAKEN_AGAIN, argument]
        done = subprocess.run(
            command, cwd=repository, env={**env, **variables}, capture_output=True, text=True, check=True
        )
        return int(done.stdout.split()[-1])

    few, most = 8, 16  # 64 MB are 16,384 pages, or 32 huge ones
    assert faults("keeps") < few
    assert faults("keeps", MALLOC_MMAP_THRESHOLD_="1048576") > most
    assert faults("keeps", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1048576") > most
    assert faults("") > most


def test_without_glibc_nothing_is_changed(monkeypatch):
    """musl and macOS: a C library without mallopt and malloc_trim."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    heap.keep_freed_memory({})
    heap.give_back_freed_memory()


@pytest.mark.parametrize(
    ("environment", "is_kept"),
    [
        ({}, True),
        ({"PATH": "/bin", "GLIBC_TUNABLES": "glibc.rtld.nns=4"}, True),
        ({"MALLOC_ARENA_MAX": "2"}, False),
        ({"GLIBC_TUNABLES": "glibc.rtld.nns=4:glibc.malloc.hugetlb=1"}, False),
    ],
    ids=str,
)
def test_malloc_settings_of_the_users_own_stay_in_force(monkeypatch, environment, is_kept):
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda parameter, value: calls.append((parameter, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    heap.keep_freed_memory(environment)
    assert calls == ([(heap.MMAP_MAX, 0), (heap.TRIM_THRESHOLD, heap.NEVER)] if is_kept else [])


@pytest.mark.parametrize(("device", "is_kept"), [("cpu", True), ("cuda", False)])
def test_a_rank_keeps_freed_memory_on_a_cpu_alone(monkeypatch, device, is_kept):
    calls: list[str] = []
    world = SimpleNamespace(device=torch.device(device), rank=0, size=1)
    monkeypatch.setattr(loop, "join", lambda _: world)
    monkeypatch.setattr(loop, "keep_freed_memory", lambda: calls.append("kept"))
    config: Any = SimpleNamespace(train=SimpleNamespace(device=device))
    with loop.on_every_rank(config):
        assert calls == ["kept"] * is_kept


HELD_BY_A_CHILD = """
import os
from pathlib import Path
from webdataset.pipeline import DataPipeline
from train.data import loader
from train.heap import keep_freed_memory

def held_mb():
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024

def packs():
    yield held_mb()

loader.share_memory = lambda pack: pack
before = held_mb()
keep_freed_memory()
del [bytearray(400 << 20)][:]
print(held_mb() - before, next(loader.run_pipeline(DataPipeline(packs), 1)) - before)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="glibc alone has mallopt; without it: test_without_glibc_nothing_is_changed",
)
def test_loader_processes_do_not_hold_what_their_parent_freed(repository):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", HELD_BY_A_CHILD]
    done = subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parent, child = map(int, done.stdout.split())
    assert parent > 390, "400 MB freed and kept"
    assert child < 100, done.stdout


# --- through the real loop ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_dataset, make_sample) -> Path:
    samples = [make_sample(seed, 100, 150) for seed in range(64)]
    return make_dataset(tmp_path_factory.mktemp("dataset"), samples)


WITHOUT_PREFLIGHT = RunOptions(skip_preflight=True)


@pytest.fixture(scope="module")
def settings(tiny_dir: Path):
    def make(*overrides: str) -> TrainConfig:
        quick = ["train.packs_per_step=2", "train.max_steps=2", "train.save_every=1", "train.log_every=1"]
        quick += ["train.num_workers=0", "train.listening_samples=0", "train.device=cpu", "lora.rank=4"]
        return read_config(TrainConfig, tiny_dir / "pipeline.toml", [*quick, *overrides])

    return make


@pytest.fixture
def small_room(monkeypatch):
    """A function MB: room for so much more than is in use now, as a small device has."""

    def limit(megabytes: int) -> None:
        monkeypatch.setattr(HostMemory, "room", lambda self, share: self.in_use() + megabytes * MB)

    return limit


def said(run: Path) -> str:
    return (run / "logs" / "training.log").read_text()


def test_auto_takes_what_fits_and_a_resumed_run_keeps_it(dataset, settings, small_room, tmp_path):
    small_room(700)
    run = tmp_path / "run"
    auto = ("train.batch_tokens=auto", "train.activation_checkpointing=off")
    train(settings(*auto, "train.max_steps=1"), dataset, run, WITHOUT_PREFLIGHT)
    found = re.search(
        r"train\.batch_tokens = (\d+) was found: a step of the heaviest pack takes (\S+) GB of", said(run)
    )
    assert found
    budget = int(found[1])
    resolved = read_config(TrainConfig, run / "config.toml").train
    assert (resolved.batch_tokens, resolved.activation_checkpointing) == (budget, "off")
    assert read_identity(complete_checkpoints(run)[0]).batch_tokens == budget
    assert f"packs of up to {budget} tokens" in said(run)

    small_room(2000)  # a larger device does not change what a step of this run is
    train(settings(*auto), dataset, run, WITHOUT_PREFLIGHT)
    assert "resumed from" in said(run)
    assert read_identity(complete_checkpoints(run)[-1]).batch_tokens == budget

    small_room(700)
    with pytest.raises(ConfigError) as refused:
        train(settings(f"train.batch_tokens={2 * budget}", auto[1]), dataset, tmp_path / "other", WITHOUT_PREFLIGHT)
    largest = re.search(
        r"the largest that fits is (\d+): set it, and train\.packs_per_step to about", str(refused.value)
    )
    assert largest, refused.value
    # Two measurements of the same memory, in a process whose heap has been through other tests: the peak of one and the
    # same step was seen to vary by 0.13 GB.
    assert 0.5 * budget < int(largest[1]) < 2 * budget
    assert 'or train.activation_checkpointing = "full"' in str(refused.value)


class KeptForBackward:
    """A meter that counts what autograd keeps: exact, where the process's memory depends on what its heap went through."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.last = 0

    def in_use(self) -> int:
        return 0

    def room(self, share: float) -> int:
        return self.limit

    def peak_of(self, work) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            work()
        self.last = sum(kept.values())
        return self.last


def test_layers_are_recomputed_only_if_packs_do_not_fit(dataset, settings, tmp_path, monkeypatch):
    def taken(name: str, limit: int, *options: str) -> int:
        """Bytes of the last probe, that of the budget in force."""
        meter = KeptForBackward(limit)
        monkeypatch.setattr("train.memory.meter_of", lambda device: meter)
        config = settings("train.batch_tokens=6000", "train.max_steps=1", *options)
        train(config, dataset, tmp_path / name, WITHOUT_PREFLIGHT)
        return meter.last

    def recomputes(name: str) -> str:
        return read_config(TrainConfig, tmp_path / name / "config.toml").train.activation_checkpointing

    whole = taken("roomy", 10**12)
    assert recomputes("roomy") == "off"
    assert "layers are recomputed" not in said(tmp_path / "roomy")

    least = taken("asked for", 10**12, "train.activation_checkpointing=full")
    assert least < 0.8 * whole
    assert recomputes("asked for") == "full"

    assert taken("tight", (whole + least) // 2) == least
    assert recomputes("tight") == "full"
    assert re.search(r"layers are recomputed in backward.*only \d+ tokens fit", said(tmp_path / "tight"))

    with pytest.raises(
        ConfigError, match=r"6000: a step of the heaviest pack does not fit .* the largest that fits is"
    ):
        taken("too tight", 9 * least // 10)


def test_not_even_one_sample_fits(dataset, settings, small_room, tmp_path):
    small_room(1)
    with pytest.raises(ConfigError, match=r"not even \d+ fits, which takes .* GB: the data's longest samples must fit"):
        train(settings("train.batch_tokens=auto"), dataset, tmp_path / "run", WITHOUT_PREFLIGHT)


def test_a_stream_is_measured_too(dataset, settings, small_room, tmp_path):
    small_room(700)
    streamed = ("train.loader=stream", "train.shuffle_buffer=4", "train.batch_tokens=auto")
    train(settings(*streamed, "train.activation_checkpointing=off"), dataset, tmp_path / "run", WITHOUT_PREFLIGHT)
    assert "was found" in said(tmp_path / "run")


def test_probing_leaves_training_as_it_was(dataset, settings, tmp_path, monkeypatch):
    """The same losses to the last bit, with dropout, whether memory was measured or not."""
    import json

    losses = []
    for name in ("measured", "not measured"):
        if name == "not measured":
            monkeypatch.setattr("train.memory.meter_of", lambda device: None)
        run = tmp_path / name
        train(settings("lora.dropout=0.1", "train.batch_tokens=3000"), dataset, run, WITHOUT_PREFLIGHT)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([(line["loss/total_loss"], line["metrics/grad_norm"]) for line in lines])
    assert losses[0] == losses[1]
    auto = settings("train.batch_tokens=auto")
    with pytest.raises(ConfigError, match="needs a CUDA device or Linux to measure memory; give a number"):
        train(msgspec.structs.replace(auto), dataset, tmp_path / "unknown", WITHOUT_PREFLIGHT)
