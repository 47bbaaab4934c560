"""Who makes the shards changes no byte: codec processes, an array of machines, Ray, with nodes and workers lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from preprocess import codec_server
from preprocess.codec_server import CodecServers, RemoteCodec
from preprocess.config import PreprocessConfig
from preprocess.plan import Request, identify_job, plan_job
from preprocess.run import make_with_codec_servers, preprocess
from preprocess.shard_task import TaskSetup
from shards.artifacts import codec_fingerprint, mel_fingerprint, tokenizer_fingerprint
from shards.config import read_config
from shards.encoders.codec import load_codec
from shards.errors import PipelineError
from shards.manifest import Fingerprints, open_dataset

NUM_ROWS = 24


@pytest.fixture(scope="module")
def config(tiny_dir) -> PreprocessConfig:
    return read_config(
        PreprocessConfig, tiny_dir / "pipeline.toml", ["preprocess.samples_per_shard=6", "preprocess.workers=2"]
    )


@pytest.fixture(scope="module")
def job(arabic_mini, config, repository, tmp_path_factory) -> Path:
    """Four shards of six, made by the local pool."""
    out = tmp_path_factory.mktemp("local") / "out"
    os.chdir(repository)  # the list's audio paths are relative to it
    assert preprocess(Request(arabic_mini, out, limit=NUM_ROWS), config)
    return out


def tree(out: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: data for name, data in files.items() if not name.startswith("encoded")}


def shards_only(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(out).items() if name.startswith("shards")}


@pytest.mark.slow
def test_codec_processes_give_the_same_bytes(arabic_mini, config, job, tiny_dir, tmp_path):
    out = tmp_path / "out"
    model_dir, codec_dir = tiny_dir / "model", tiny_dir / "codec"
    fingerprints = Fingerprints(codec_fingerprint(codec_dir), tokenizer_fingerprint(model_dir), mel_fingerprint())
    request = Request(arabic_mini, out, limit=NUM_ROWS)
    plan_job(request, config, identify_job(request, config, fingerprints))
    setup = TaskSetup(config, str(out), str(model_dir), str(codec_dir))
    results = list(make_with_codec_servers(["cpu", "cpu"], 2, setup, [0, 1, 2, 3]))
    assert sum(result.done.num_samples for result in results) == NUM_ROWS
    assert shards_only(out) == shards_only(job)


def test_codec_process_batches_equal_lengths_only(tiny_dir):
    codec = load_codec(tiny_dir / "codec")
    rng = np.random.default_rng(0)
    waves = [
        (0.1 * rng.standard_normal(length)).astype(np.float32) for length in (24000, 24000, 24960, 23100, 24000, 50000)
    ]
    servers = CodecServers(str(tiny_dir / "codec"), ["cpu"])
    try:
        answers: dict[int, np.ndarray] = {}

        def ask(number: int) -> None:
            answers[number] = RemoteCodec(servers.addresses, servers.key).encode(waves[number])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(waves))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for number, wave in enumerate(waves):
            np.testing.assert_array_equal(answers[number], codec.encode(wave))
        remote = RemoteCodec(servers.addresses, servers.key)
    finally:
        servers.close()
    with pytest.raises(PipelineError, match="codec process is gone"):
        remote.encode(waves[0])


def test_waiting_waves_of_one_length_are_one_batch(tiny_dir, monkeypatch):
    """The way of `--device cuda`, on the CPU: whatever is encoded together gives the codes of single clips."""
    codec = load_codec(tiny_dir / "codec")
    rng = np.random.default_rng(0)
    lengths = (24000, 24000, 24960, 23100, 24000, 50000, 24500)  # 23,100 is padded to 24,000, 24,500 to 24,960
    waves = [(0.1 * rng.standard_normal(length)).astype(np.float32) for length in lengths]
    answers: dict[int, np.ndarray] = {}
    connections: list[Any] = [SimpleNamespace(send=partial(answers.__setitem__, n)) for n in range(len(waves))]
    sizes: list[tuple[int, int]] = []

    def encode_batch(batch: np.ndarray) -> np.ndarray:
        sizes.append((len(batch), batch.shape[1]))
        return codec.encode_batch(batch)

    server: Any = SimpleNamespace(encode_batch=encode_batch)
    for most_s, expected in ((240, [(4, 24000), (2, 24960), (1, 50880)]), (3, [(3, 24000), (1, 24000)])):
        monkeypatch.setattr(codec_server, "MAX_BATCH_S", most_s)
        sizes.clear()
        codec_server._answer_waves(server, list(zip(connections, waves, strict=True)))
        assert sizes[: len(expected)] == expected
        for number, wave in enumerate(waves):
            np.testing.assert_array_equal(answers.pop(number), codec.encode(wave))


def test_device_cuda_without_a_gpu_is_refused(run_command, arabic_mini, tiny_dir, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = run_command(
        "preprocess", arabic_mini, tmp_path / "out", "--device", "cuda", "--config", tiny_dir / "pipeline.toml"
    )
    assert result.returncode == 1
    assert "error: --device cuda: no CUDA device is visible" in result.stderr


def array_task(run_command, data: Path, out: Path, config_file: Path, index: int, count: int):
    options = ("--config", config_file, "--limit", NUM_ROWS, "--set", "preprocess.samples_per_shard=6", "--workers", 1)
    env = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": str(count)}
    return run_command("preprocess", data, out, *options, env=env)


@pytest.mark.slow
def test_two_array_tasks_and_finalize_give_the_same_bytes(run_command, arabic_mini, tiny_dir, job, tmp_path):
    out = tmp_path / "out"
    first = array_task(run_command, arabic_mini, out, tiny_dir / "pipeline.toml", 0, 2)
    assert first.returncode == 0, first.stderr
    assert "task 0 of 2: its 2 shards are done; 2 are left in all" in first.stderr
    early = run_command("preprocess", "finalize", out)
    assert early.returncode == 1
    assert "shard-000001.done.json: missing, as 2 of 4 shards" in early.stderr
    assert not (out / "dataset.json").exists()
    assert array_task(run_command, arabic_mini, out, tiny_dir / "pipeline.toml", 1, 2).returncode == 0
    done = run_command("preprocess", "finalize", out)
    assert done.returncode == 0, done.stderr
    assert tree(out) == tree(job)


def flip(tar: Path, offset: int) -> None:
    data = bytearray(tar.read_bytes())
    data[offset] ^= 4
    tar.write_bytes(data)


def truncate(tar: Path, offset: int) -> None:
    tar.write_bytes(tar.read_bytes()[:offset])


def zero_tail(tar: Path, offset: int) -> None:
    tar.write_bytes(tar.read_bytes()[:offset] + bytes(tar.stat().st_size - offset))


@pytest.mark.parametrize("damage", [flip, truncate, zero_tail])
def test_finalize_names_the_damaged_shard_and_sample(run_command, job, tmp_path, damage):
    out = shutil.copytree(job, tmp_path / "out")
    tar = out / "shards/000/shard-000003.tar"
    tar.chmod(0o644)
    _, index = open_dataset(out)
    second = index[index["shard"] == 3][1]
    damage(tar, int(second["offset"]) + 2000)
    (out / "dataset.json").unlink()
    result = run_command("preprocess", "finalize", out)
    assert result.returncode == 1
    assert "shard-000003.tar: " in result.stderr
    assert "sample 1 of 6" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (out / "dataset.json").exists()


def test_finalize_names_a_missing_marker_and_a_foreign_folder(run_command, job, tmp_path):
    out = shutil.copytree(job, tmp_path / "out")
    (out / "shards/000/shard-000002.done.json").unlink()
    result = run_command("preprocess", "finalize", out)
    assert result.returncode == 1
    assert "shard-000002.done.json: missing, as 1 of 4 shards" in result.stderr
    result = run_command("preprocess", "finalize", tmp_path)
    assert result.returncode == 1
    assert "no job.json" in result.stderr


@pytest.mark.slow
def test_ray_gives_the_same_bytes(run_command, arabic_mini, tiny_dir, job, tmp_path):
    pytest.importorskip("ray", reason="extra ray")
    options = ("--config", tiny_dir / "pipeline.toml", "--limit", NUM_ROWS, "--set", "preprocess.samples_per_shard=6")
    result = run_command("preprocess", arabic_mini, tmp_path / "out", *options, "--engine", "ray")
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "out") == tree(job)


def ray_workers() -> list[int]:
    """Processes of Ray that are running a shard task."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and b"ray::_run" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_worker_lost_on_ray_only_repeats_its_shard(arabic_mini, tiny_dir, job, repository, tmp_path):
    pytest.importorskip("ray", reason="extra ray")
    out = tmp_path / "out"
    arguments = [
        "preprocess",
        str(arabic_mini),
        str(out),
        "--config",
        str(tiny_dir / "pipeline.toml"),
        "--engine",
        "ray",
    ]
    arguments += ["--limit", str(NUM_ROWS), "--set", "preprocess.samples_per_shard=6"]
    code = f"import sys; sys.argv = {arguments!r}; from preprocess.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=repository, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 90
    while not ray_workers() or not (out / "encoded").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(ray_workers()[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert tree(out) == tree(job)


@pytest.mark.slow
def test_a_node_lost_on_ray_only_repeats_its_shards(arabic_mini, config, job, repository, tmp_path, monkeypatch):
    """Two nodes of one core; the one that works first is taken away in the middle of the job."""
    ray = pytest.importorskip("ray", reason="extra ray")
    from ray.cluster_utils import Cluster

    monkeypatch.chdir(repository)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(repository))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    extra = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    out = tmp_path / "out"

    def take_the_node_away() -> None:
        end = time.monotonic() + 60
        while not list(out.glob("shards/*/*.done.json")) and time.monotonic() < end:
            time.sleep(0.02)
        done_at_removal.append(len(list(out.glob("shards/*/*.done.json"))))
        cluster.remove_node(extra, allow_graceful=False)

    done_at_removal: list[int] = []
    thief = threading.Thread(target=take_the_node_away)
    try:
        thief.start()
        assert preprocess(Request(arabic_mini, out, limit=NUM_ROWS, engine="ray"), config)
        thief.join()
        assert done_at_removal[0] < 4, "the node must be lost in the middle of the job"
        end = time.monotonic() + 60
        while sum(node["Alive"] for node in ray.nodes()) > 1:  # the head notices by missed heartbeats
            assert time.monotonic() < end
            time.sleep(0.2)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert tree(out) == tree(job)


@pytest.mark.slow
def test_read_only_and_full_out_end_with_one_line(run_command, arabic_mini, tiny_dir, tmp_path):
    """A full disk is played by a limit on file size: the kernel refuses the write in the middle of a shard."""
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        f"sys.argv = ['preprocess', {str(arabic_mini)!r}, {str(tmp_path / 'out')!r}, '--config',"
        f" {str(tiny_dir / 'pipeline.toml')!r}]; from preprocess.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "File too large; the same command continues this job" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert not list((tmp_path / "out").rglob("*.done.json"))
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where OUT's parent must be a folder")
    result = run_command("preprocess", arabic_mini, blocked / "out", "--config", tiny_dir / "pipeline.toml")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "Not a directory" in result.stderr


def test_array_options_must_fit(run_command, arabic_mini, tmp_path):
    for options in (["--task-index", 0], ["--task-index", 2, "--num-tasks", 2], ["--num-tasks", 2]):
        result = run_command("preprocess", arabic_mini, tmp_path / "out", *options)
        assert result.returncode == 2
        assert "belong together" in result.stderr
