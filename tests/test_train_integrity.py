"""Two real processes over gloo: a damaged sample, another data set on one rank, a killed rank. Each ends, and says why."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from damage import flip_payload

from shards.index import read_index

ENDS_WITHIN_S = 120  # imports included; a hang would be endless


@pytest.fixture(scope="module")
def samples(make_sample):
    return [make_sample(seed, 5 + seed % 7, 8 + seed % 5) for seed in range(24)]


@pytest.fixture
def dataset(tmp_path, make_dataset, samples) -> Path:
    return make_dataset(tmp_path / "dataset", samples)


@pytest.fixture
def run_ranks(repository, model_dir, tmp_path):
    """Start one process per data set; (status, stderr, what it wrote) of each."""

    def run(datasets: list[Path], *common: str, of_rank: dict[int, str] | None = None, num_steps: int = 0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = []
        for rank, dataset in enumerate(datasets):
            env = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
            env |= {"RANK": str(rank), "WORLD_SIZE": str(len(datasets)), "LOCAL_RANK": str(rank)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            options = ["batch_tokens=700", "packs_per_step=2", "num_workers=0", *common]
            options += [of_rank[rank]] if of_rank and rank in of_rank else []
            command = [sys.executable, repository / "tests/rank_script.py", dataset, model_dir, num_steps]
            command += [tmp_path / f"rank-{rank}.json", *options]
            processes.append(
                subprocess.Popen([str(word) for word in command], env=env, stderr=subprocess.PIPE, text=True)
            )
        ended = []
        try:
            for rank, process in enumerate(processes):
                _, stderr = process.communicate(timeout=ENDS_WITHIN_S)
                path = tmp_path / f"rank-{rank}.json"
                ended.append((process.returncode, stderr, json.loads(path.read_text()) if path.exists() else None))
        finally:
            for process in processes:
                process.kill()
        return ended

    return run


def keys_of(ended) -> list[str]:
    return [key for _, _, written in ended for packs in written["steps"] for keys in packs for key in keys]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_sample_is_skipped_and_both_ranks_finish(run_ranks, dataset, num_workers):
    whole = run_ranks([dataset, dataset])
    flip_payload(dataset, 5)
    ended = run_ranks([dataset, dataset], "max_bad_fraction=0.1", f"num_workers={num_workers}")
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert keys_of(ended) == [key for key in keys_of(whole) if key != "000000000005"]
    said = "".join(stderr for _, stderr, _ in ended)
    assert said.count("skipped: shards/000/shard-000000.tar: sample 000000000005") == 1
    assert "checksum differs from the index" in said
    assert [written["metrics/bad_samples"] for _, _, written in ended] == [1, 1], "both ranks know"


@pytest.mark.slow
def test_too_much_damage_on_one_rank_stops_both(run_ranks, dataset):
    for row in range(6):
        flip_payload(dataset, row)
    ended = run_ranks([dataset, dataset], "max_bad_fraction=0.05", num_steps=20)
    assert [status for status, _, _ in ended] == [1, 1]
    lines = [stderr.splitlines()[-1] for _, stderr, _ in ended]
    assert lines[0] == lines[1]
    assert "of 24 samples are damaged, more than train.max_bad_fraction = 0.05" in lines[0]


@pytest.mark.slow
def test_another_data_set_on_one_rank_stops_both(run_ranks, dataset, make_dataset, samples, tmp_path):
    other = make_dataset(tmp_path / "other", [*samples[1:], samples[0]])
    ended = run_ranks([dataset, other])
    assert [status for status, _, _ in ended] == [1, 1]
    digests = [json.loads((folder / "dataset.json").read_text())["digest"][:16] for folder in (dataset, other)]
    for _, stderr, _ in ended:
        assert f"the data set is {digests[0]} on rank 0 and {digests[1]} on rank 1" in stderr


@pytest.mark.slow
def test_another_seed_on_one_rank_stops_both(run_ranks, dataset):
    ended = run_ranks([dataset, dataset], of_rank={1: "seed=3"})
    assert [status for status, _, _ in ended] == [1, 1]
    for _, stderr, _ in ended:
        assert "the plan of epoch 0 is " in stderr
        assert "on rank 0 and " in stderr


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_with_a_line(run_ranks, dataset):
    ended = run_ranks([dataset, dataset], of_rank={1: "die_at=2"}, num_steps=50)
    assert [status for status, _, _ in ended] == [1, -9]
    assert "rank 0 of 2: another rank has ended or has been silent for too long" in ended[0][1]
    assert "go on from the last checkpoint" in ended[0][1]
    assert "Traceback" not in ended[0][1]


@pytest.mark.slow
def test_a_missing_shard_is_damage_of_every_sample_in_it(run_ranks, dataset):
    (dataset / "shards/000/shard-000000.tar").unlink()
    ended = run_ranks([dataset, dataset])
    assert [status for status, _, _ in ended] == [1, 1]
    assert all("samples are damaged" in stderr for _, stderr, _ in ended)
    assert any("the data set is incomplete" in stderr for _, stderr, _ in ended)


def test_damage_fixture_changes_one_sample_only(dataset):
    from shards.errors import ShardError
    from shards.reader import SampleReader

    flip_payload(dataset, 5)
    index = read_index(dataset / "index.npy")
    for number, row in enumerate(index):
        if number == 5:
            with pytest.raises(ShardError, match="checksum"):
                SampleReader(dataset).read(row)
        else:
            SampleReader(dataset).read(row)
