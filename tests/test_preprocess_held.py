"""OUT belongs to one job at a time; the tasks of one array share it. The holder is a process of its own, without models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from preprocess.config import PreprocessConfig
from preprocess.plan import Request, hold_out, identify_job
from shards.artifacts import codec_fingerprint, mel_fingerprint, tokenizer_fingerprint
from shards.config import read_config
from shards.errors import PipelineError
from shards.manifest import Fingerprints

HOLD = """
import sys
from pathlib import Path
import msgspec
from preprocess.plan import JobIdentity, Request, hold_out
data, out, identity, index, count = sys.argv[1:]
sys.argv = ["preprocess", data, out]
request = Request(Path(data), Path(out), task_index=int(index), num_tasks=int(count))
with hold_out(request, msgspec.json.decode(identity, type=JobIdentity)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def config(tiny_dir) -> PreprocessConfig:
    return read_config(PreprocessConfig, tiny_dir / "pipeline.toml", [])


@pytest.fixture(scope="module")
def fingerprints(tiny_dir) -> Fingerprints:
    return Fingerprints(
        codec_fingerprint(tiny_dir / "codec"), tokenizer_fingerprint(tiny_dir / "model"), mel_fingerprint()
    )


@pytest.fixture
def holder(repository, arabic_mini, config, fingerprints, tmp_path) -> Iterator:
    """A function (task_index, num_tasks) -> a process that holds tmp_path/out for the job of `config`."""
    import msgspec

    processes: list[subprocess.Popen] = []

    def hold(index: int = 0, count: int = 1) -> subprocess.Popen:
        out = tmp_path / "out"
        identity = identify_job(Request(arabic_mini, out), config, fingerprints)
        arguments = [arabic_mini, out, msgspec.json.encode(identity).decode(), index, count]
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *map(str, arguments)],
            cwd=repository,
            env={**os.environ, "PYTHONPATH": str(repository)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_preprocess_is_refused_with_the_holders_name(
    holder, run_command, arabic_mini, tiny_dir, repository, tmp_path
):
    process = holder()
    options = ("--config", tiny_dir / "pipeline.toml")
    for more in (("--set", "preprocess.seed=7"), ("--new-job",)):
        result = run_command("preprocess", arabic_mini, tmp_path / "out", *options, *more)
        assert result.returncode == 1
        assert f"error: {tmp_path / 'out'}: another process works in this folder" in result.stderr
        assert f"pid {process.pid}" in result.stderr
        assert f"preprocess {arabic_mini} {tmp_path / 'out'}" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert [path.name[:6] for path in (tmp_path / "out").iterdir()] == [".lock."]


def test_tasks_of_an_array_share_out_with_their_like_only(holder, arabic_mini, config, fingerprints, tmp_path):
    holder(0, 2)
    out = tmp_path / "out"
    identity = identify_job(Request(arabic_mini, out), config, fingerprints)
    other = identify_job(Request(arabic_mini, out, limit=3), config, fingerprints)
    with hold_out(Request(arabic_mini, out, task_index=1, num_tasks=2), identity):
        pass
    for index, count, wanted in ((1, 2, other), (0, 2, identity), (0, 1, identity)):
        request = Request(arabic_mini, out, task_index=index, num_tasks=count)
        with pytest.raises(PipelineError, match="another process works"), hold_out(request, wanted):
            pass


def test_finalize_waits_for_no_task_but_names_it(holder, run_command, tmp_path):
    process = holder(0, 2)
    (tmp_path / "out" / "job.json").write_text("{}")
    result = run_command("preprocess", "finalize", tmp_path / "out")
    assert result.returncode == 1
    assert "another process works in this folder" in result.stderr
    assert f"pid {process.pid}" in result.stderr


def test_finalize_of_a_folder_that_is_none_makes_nothing(run_command, tmp_path):
    result = run_command("preprocess", "finalize", tmp_path / "nowhere")
    assert result.returncode == 1
    assert "no job.json" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_validate_only_leaves_a_job_that_stands_alone(run_command, arabic_mini, tiny_dir, tmp_path):
    (tmp_path / "job.json").write_text("{}")
    options = ("--config", tiny_dir / "pipeline.toml", "--validate-only")
    result = run_command("preprocess", arabic_mini, tmp_path, *options)
    assert result.returncode == 1
    assert f"{tmp_path}: holds a job; give --validate-only an OUT of its own" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]
