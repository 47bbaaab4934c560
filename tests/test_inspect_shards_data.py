"""DATA of `inspect-shards` in every form: folder, one shard, glob, stranger's tars, URLs; damage in each of them."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import http.server
import io
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import fsspec
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from damage import flip_payload

from shards.columns import columns_of, columns_row
from shards.manifest import digest_of, open_dataset
from shards.reader import SampleReader
from shards.sample import write_npy
from shards.writer import shard_path, write_json, write_shard
from tools.inspect_shards.cli import main


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_dataset, make_sample) -> Path:
    """A data set of two shards, three samples each, with columns; the folder's name has a blank and Arabic letters."""
    folder = tmp_path_factory.mktemp("data") / "بيانات one"
    make_dataset(folder, [make_sample(seed, 6, 10 + seed) for seed in range(3)])
    record, index = open_dataset(folder)
    first = list(SampleReader(folder).read_all(index))
    second = [
        dataclasses.replace(make_sample(10 + place, 7, 20 + place), key=f"000001{place:06d}") for place in range(3)
    ]
    tables = [columns_of([columns_row(sample.facts) for sample in part]) for part in (first, second)]
    done = [write_shard(folder, number, part, [], tables[number]) for number, part in enumerate((first, second))]
    index = np.concatenate([np.load(shard_path(folder, number, ".idx.npy")) for number in range(2)])
    (folder / "index.npy").write_bytes(write_npy(index))
    (folder / "columns.npy").write_bytes(write_npy(np.concatenate(tables)))
    speakers = {f"speaker-{n}": 2 for n in range(3)}
    hours = {"target_hours": round(sum(part.target_s for part in done) / 3600, 6)}
    hours["reference_hours"] = round(sum(part.reference_s for part in done) / 3600, 6)
    record = msgspec.structs.replace(
        record, shards=done, num_samples=6, num_rows=6, speakers=speakers, **hours, digest=""
    )
    write_json(folder / "dataset.json", msgspec.structs.replace(record, digest=digest_of(record)))
    return folder


@pytest.fixture(scope="module")
def server(data: Path):
    """http.server, which sends whole files whatever part is asked for."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(data))
    handler.func.log_message = lambda *_: None  # pyright: ignore[reportFunctionMemberAccess]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def tar_of(data: Path, number: int = 0) -> Path:
    return shard_path(data, number, ".tar")


def put_in_memory(data: Path, name: str) -> str:
    files = fsspec.filesystem("memory")
    for path in data.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/{name}/{path.relative_to(data)}", path.read_bytes())
    return f"memory://{name}"


def forms(data: Path, tmp_path: Path) -> dict[str, tuple[str, int]]:
    """kind -> (DATA, number of samples)."""
    lone = tmp_path / "lone"
    lone.mkdir()
    for number in range(2):
        shutil.copy(tar_of(data, number), lone)
    packed = tmp_path / "one.tar.gz"
    packed.write_bytes(gzip.compress(tar_of(data).read_bytes()))
    memory = put_in_memory(data, "set")
    return {
        "folder": (str(data), 6),
        "its record": (str(data / "dataset.json"), 6),
        "a shard": (str(tar_of(data, 1)), 3),
        "a glob": (str(data / "shards" / "*" / "*.tar"), 6),
        "a folder of shards": (str(data / "shards"), 6),
        "a lone tar": (str(lone / "shard-000001.tar"), 3),
        "lone tars": (str(lone), 6),
        "two lists": (f"{lone / 'shard-000000.tar'}::{tar_of(data, 1)}", 6),
        "braces": (str(lone / "shard-{000000..000001}.tar"), 6),
        "gzip": (str(packed), 3),
        "a URL": (memory, 6),
        "a URL of a tar": (f"{memory}/shards/000/shard-000001.tar", 3),
        "a URL with a glob": (f"{memory}/shards/000/*.tar", 6),
        "a file URL": (f"file://{data}", 6),
    }


def test_every_form_of_data_has_the_same_facts(data: Path, tmp_path: Path):
    whole = json.loads(run("summary", data, "--json").stdout)
    listed = {json.loads(line)["id"] for line in run("list", data, "--json").stdout.splitlines()}
    for kind, (spec, count) in forms(data, tmp_path).items():
        done = run("summary", spec, "--json")
        assert done.exit_code == 0, (kind, done.output)
        facts = json.loads(done.stdout)
        assert sum(facts["histograms"]["chars_per_s"]["counts"]) == count, kind
        assert facts["codes"]["samples"] == count, kind
        assert facts["samples"].startswith(f"{count} of {count} rows"), kind
        names = {json.loads(line)["id"] for line in run("list", spec, "--json").stdout.splitlines()}
        assert names <= listed, kind
        assert len(names) == count, kind
        if count == 6:
            for part in ("text", "histograms", "target_hours", "speaker_balance", "codes"):
                assert facts[part] == whole[part], (kind, part)
        verified = run("verify", spec)
        assert verified.exit_code == 0, (kind, verified.output)
        page = tmp_path / "page.html"
        assert run("report", spec, page, "--players", 0).exit_code == 0, kind
        assert page.stat().st_size > 5000


def test_a_sample_is_found_by_its_key_in_every_form(data: Path, tmp_path: Path):
    expected = json.loads(run("show", data, "000001000002", "--json").stdout)
    for kind, (spec, count) in forms(data, tmp_path).items():
        if count == 3 and kind == "gzip":
            continue
        done = run("show", spec, "000001000002", "--json")
        assert done.exit_code == 0, (kind, done.output)
        assert json.loads(done.stdout) == expected, kind


def test_a_server_without_ranges_is_read_too(data: Path, server: str):
    done = run("summary", server, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["codes"]["samples"] == 6
    assert run("verify", f"{server}/").exit_code == 0
    assert run("summary", f"{server}/nothing-here").exit_code == 1


def test_a_changed_byte_behind_a_url_is_found(data: Path, tmp_path: Path):
    copy = shutil.copytree(data, tmp_path / "copy")
    flip_payload(copy, 4)
    spec = put_in_memory(copy, "changed")
    done = run("verify", spec)
    assert done.exit_code == 1
    assert "sample 1 of 3 (key 000001000001)" in done.stderr
    facts = json.loads(run("summary", spec, "--json").stdout)
    assert facts["codes"]["not_readable"] == 1


def stranger(path: Path, data: Path, rename, skip=()) -> Path:
    """The first shard's members under other names."""
    with tarfile.open(tar_of(data)) as tar, tarfile.open(path, "w") as out:
        for member in tar.getmembers():
            key, _, suffix = member.name.partition(".")
            if suffix in skip and key.endswith("1"):
                continue
            content = tar.extractfile(member)
            assert content is not None
            info = tarfile.TarInfo(f"{rename(key)}.{suffix}")
            info.size = member.size
            out.addfile(info, io.BytesIO(content.read()))
    return path


def test_strangers_keys_are_found_as_they_are(data: Path, tmp_path: Path):
    tar = stranger(tmp_path / "theirs.tar", data, lambda key: f"clip/{int(key)} قصة")
    assert run("show", tar, "clip/2 قصة").exit_code == 0
    assert run("show", tar, "sample-2").exit_code == 0
    assert run("show", tar, "clip/7").exit_code == 1
    twins = run("summary", f"{tar}::{stranger(tmp_path / 'again.tar', data, str)}", "--json")
    assert json.loads(twins.stdout)["samples"].startswith("6 of 6 rows")


BAD_TARS = {
    "empty": (lambda tar: b"", 1),
    "only an end mark": (lambda tar: bytes(10240), 1),
    "no tar": (lambda tar: b"RIFF" + bytes(2000), 1),
    "half": (lambda tar: tar[: len(tar) // 2], 0),
    "without its end mark": (lambda tar: tar[: tar.rstrip(b"\0").__len__() // 512 * 512 + 512], 0),
    "cut in a header": (lambda tar: tar[:300], 1),
}


@pytest.mark.parametrize("kind", BAD_TARS)
def test_a_damaged_lone_tar_is_counted_and_never_a_traceback(data: Path, tmp_path: Path, kind: str):
    """What is readable of it is shown, and the rest counted; verify has exit status 1 in every case."""
    change, status = BAD_TARS[kind]
    tar = tmp_path / "x.tar"
    tar.write_bytes(change(tar_of(data).read_bytes()))
    for arguments in (["summary", tar], ["report", tar, tmp_path / "r.html", "--players", 0], ["list", tar]):
        done = run(*arguments)
        assert done.exit_code == status, (arguments, done.output)
        assert not done.exception or isinstance(done.exception, SystemExit)
        if status:
            assert done.stderr.count("\n") == 1, done.stderr
    assert run("verify", tar).exit_code == 1
    if not status:
        facts = json.loads(run("summary", tar, "--json").stdout)
        assert facts["rejects"]["not_readable"] >= 1


def test_a_sample_without_a_member_is_counted(data: Path, tmp_path: Path):
    tar = stranger(tmp_path / "x.tar", data, lambda key: key, skip=("tgt.codes.npy",))
    facts = json.loads(run("summary", tar, "--json").stdout)
    assert (facts["rejects"], facts["samples"].split(",")[0]) == ({"not_readable": 1}, "2 of 3 rows")


@pytest.mark.parametrize(
    "spec",
    [
        "nothing.tar",
        "no*.tar",
        "memory://nowhere",
        "memory://nowhere/*.tar",
        "pipe:touch x",
        "pipe://x",
        "bad://x/y",
        "a::b",
        "",
    ],
)
def test_what_names_no_data_is_one_line(tmp_path: Path, monkeypatch, spec: str):
    monkeypatch.chdir(tmp_path)
    for arguments in (["summary", spec], ["compare", spec, spec], ["verify", spec]):
        done = run(*arguments)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
    assert list(tmp_path.iterdir()) == []


def test_an_index_of_another_version_is_refused(data: Path, tmp_path: Path):
    copy = shutil.copytree(data, tmp_path / "copy")
    np.save(copy / "index.npy", np.zeros(6, dtype=[("offset", "<u8"), ("speaker", "<u8")]))
    for spec in (copy, put_in_memory(copy, "older")):
        done = run("summary", spec)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
        assert "index" in done.stderr


def test_sequence_as_data_is_what_the_lines_say(data: Path, tiny_dir: Path):
    arguments = ("show", data, "000000000001", "--sequence", "--config", tiny_dir / "pipeline.toml")
    lines = run(*arguments).stdout.splitlines()
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    rows = facts["sequence"]
    assert len(rows) == facts["learned"]["positions"] == len(lines) - 4
    assert [row["position"] for row in rows] == list(range(len(rows)))
    audio = [row for row in rows if row["path"] == "audio"]
    for row, after in itertools.pairwise(audio):
        for says, holds in zip(row["next_codes"], after["codes"], strict=True):
            assert says in (-100, holds)
    assert sum(code != -100 for row in audio for code in row["next_codes"]) == sum(facts["learned"]["codes"])
    assert sum(row["next_token"] is not None for row in rows) == facts["learned"]["tokens"]


def test_no_help_loads_what_takes_seconds():
    """Of both groups and every subcommand: what each of them needs is imported when it runs."""
    code = """if True:
        import sys
        from click.testing import CliRunner
        from tools.checkpoints.cli import main as checkpoints
        from tools.inspect_shards.cli import main as inspect_shards
        heavy = ("torch", "transformers", "numpy", "peft", "safetensors", "fsspec", "webdataset", "rich", "tokenizers")
        for group in (checkpoints, inspect_shards):
            for names in [[], *([name] for name in group.commands)]:
                shown = CliRunner().invoke(group, [*names, "--help"])
                assert shown.exit_code == 0 and "Usage" in shown.output, names
                loaded = [name for name in heavy if name in sys.modules]
                assert not loaded, (names, loaded)
        print(len(checkpoints.commands), len(inspect_shards.commands))
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "7"]
