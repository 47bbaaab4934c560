"""A job with too many rejects, or short of a file, loses nothing that was encoded. Its shards are made in this process."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import preprocess.run as job
from preprocess.cache import recipe_digest
from preprocess.cli import main
from preprocess.config import PreprocessConfig
from preprocess.join import finalize, pending_shards
from preprocess.plan import Request
from preprocess.shard_task import ShardTask
from shards.config import read_config
from shards.errors import DataError, ShardError
from shards.manifest import Fingerprints, Job, read_record


@pytest.fixture(scope="module", autouse=True)
def _from_the_repository(repository) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)  # the list's audio paths are relative to it
        patch.setattr(job, "run_tasks", run_here)
        yield


def run_here(tasks: list[int], num_workers: int, prepare, setup: Any, on_row=None) -> Iterator[Any]:
    task = prepare(setup)
    for shard in tasks:
        yield task.run(shard, {}, lambda position: None)


@pytest.fixture(scope="module")
def make(tiny_dir):
    """A function (list, OUT, options of Request, settings) that runs stage one."""

    def run(data: Path, out: Path, *settings: str, **options: Any):
        small = ["preprocess.samples_per_shard=2", *settings]
        return job.preprocess(
            Request(data, out, **options), read_config(PreprocessConfig, tiny_dir / "pipeline.toml", small)
        )

    return run


@pytest.fixture(scope="module")
def rows(arabic_mini) -> list:
    return json.loads(arabic_mini.read_text())[:4]


@pytest.fixture(scope="module")
def bad_rows(rows) -> list:
    """The first row's target, which no other row uses, does not exist."""
    bad = json.loads(json.dumps(rows))
    bad[0]["messages"][2]["content"][1]["audio_url"] = "nowhere/clip.wav"
    return bad


@pytest.fixture(scope="module")
def lists(rows, bad_rows, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lists")
    for name, content in (("good", rows), ("bad", bad_rows)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: folder / f"{name}.json" for name in ("good", "bad")}


@pytest.fixture(scope="module")
def fresh(make, lists, tmp_path_factory) -> Path:
    """The corrected list's job, made in an empty folder."""
    out = tmp_path_factory.mktemp("fresh") / "out"
    assert make(lists["good"], out)
    return out


@pytest.fixture(scope="module")
def refused(make, lists, tmp_path_factory) -> Path:
    """A job that ended with one reject of four rows, more than 5 %."""
    out = tmp_path_factory.mktemp("refused") / "out folder"
    with pytest.raises(DataError, match="1 of 4 rows rejected"):
        make(lists["bad"], out)
    return out


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_the_message_says_what_to_type(make, lists, refused, tmp_path):
    out = shutil.copytree(refused, tmp_path / "out folder")
    with pytest.raises(DataError) as error:
        make(lists["bad"], out)
    offered = f"preprocess finalize {shlex.quote(str(out))} --max-reject-fraction 0.25"
    assert str(error.value).endswith(f"or accept these: {offered}")
    assert "fix " in str(error.value)
    assert "mend" not in str(error.value)
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(offered)[1:])
    assert ended.value.code == 0
    assert (out / "dataset.json").is_file()
    assert not (out / "encoded").exists()


@pytest.mark.parametrize("way", ["same command", "finalize"])
def test_another_limit_gives_the_bytes_of_a_job_that_had_it(make, lists, refused, tmp_path, capsys, way):
    out = shutil.copytree(refused, tmp_path / "out")
    if way == "finalize":
        finalize(out, 0.3)
    else:
        make(lists["bad"], out, "preprocess.max_reject_fraction=0.3")
        assert "nothing: all shards were there already" in capsys.readouterr().err
    make(lists["bad"], tmp_path / "anew", "preprocess.max_reject_fraction=0.3")
    assert tree(out) == tree(tmp_path / "anew")


def test_a_limit_that_is_too_low_leaves_the_finished_data_set(make, lists, refused, tmp_path):
    out = shutil.copytree(refused, tmp_path / "out")
    finalize(out, 0.3)
    before = tree(out)
    with pytest.raises(DataError, match=r"more than preprocess\.max_reject_fraction = 0\.2"):
        make(lists["bad"], out, "preprocess.max_reject_fraction=0.2")
    assert tree(out) == before


@pytest.mark.parametrize("options", [{}, {"new_job": True}])
def test_a_corrected_list_reuses_every_encoding(make, lists, refused, fresh, tmp_path, capsys, options):
    out = shutil.copytree(refused, tmp_path / "out", copy_function=shutil.copy2)  # with the files' times
    num_encoded = len(list(out.glob("encoded/*/*/*.EncodedCodes")))
    assert num_encoded >= 4
    assert make(lists["good"], out, **options)
    assert f"encodings reused {num_encoded} of {num_encoded + 1}" in capsys.readouterr().err
    assert tree(out) == tree(fresh)


def test_what_decides_an_encoding_decides_its_folder(tiny_dir):
    def recipe(*settings: str, codec: str = "c", tokenizer: str = "t") -> str:
        config = read_config(PreprocessConfig, tiny_dir / "pipeline.toml", settings)
        return recipe_digest(config, Fingerprints(codec, tokenizer, "m"))

    same = [recipe(), recipe(tokenizer="other"), recipe("preprocess.seed=5", "text.min_chars=1")]
    assert len(set(same)) == 1
    others = [recipe(codec="other"), recipe("preprocess.max_duration_s=20.0"), recipe("features.whisper='none'")]
    assert len({*same, *others}) == 4


def test_a_finished_job_is_not_taken_for_another_list(make, lists, fresh):
    before = tree(fresh)
    with pytest.raises(DataError, match="holds another job: input was"):
        make(lists["bad"], fresh)
    assert tree(fresh) == before


def test_a_new_job_killed_before_its_plan_is_gone_on_with(make, lists, refused, fresh, tmp_path):
    out = shutil.copytree(refused, tmp_path / "out")
    (out / "job.json").rename(out / "job.removed.json")
    shutil.rmtree(out / "shards")
    assert make(lists["good"], out)
    assert tree(out) == tree(fresh)


@pytest.mark.parametrize("lost", [".tar", ".idx.npy", ".done.json"])
@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_shard_that_lacks_a_part_is_made_again(make, lists, fresh, tmp_path, lost, damage):
    out = shutil.copytree(fresh, tmp_path / "out")
    part = out / "shards/000" / f"shard-000001{lost}"
    data = part.read_bytes()
    part.unlink()
    if damage == "short":
        part.write_bytes(data[: len(data) // 2])
    assert pending_shards(out, read_record(out / "job.json", Job)) == [1]
    (out / "dataset.json").unlink()
    with pytest.raises(ShardError, match=r"shard-000001.*the same `preprocess` command"):
        finalize(out)
    assert make(lists["good"], out)
    assert tree(out) == tree(fresh)


def test_new_job_in_an_array_keeps_what_a_sister_made(make, lists, fresh, tmp_path, capsys):
    out = tmp_path / "out"
    for task in (0, 1):
        assert make(lists["good"], out, new_job=True, task_index=task, num_tasks=2) is None
    assert "holds this very job already; --new-job continues it" in capsys.readouterr().err
    finalize(out)
    assert tree(out) == tree(fresh)


def test_the_shards_are_made_by_the_real_task():
    assert job.ShardTask is ShardTask
