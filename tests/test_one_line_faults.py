"""Full disks, folders where files must be, other projects' packages, blanks in paths: one line each, no traceback."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from shards.encoders.tensor_files import save_tensors
from shards.errors import CheckpointError, PipelineError
from shards.folder_lock import hold_folder
from shards.manifest import open_dataset
from shards.terminal import FileToWrite, system_fault
from shards.writer import write_bytes
from tools.checkpoints.model_folder import convert_model, new_folder
from tools.evaluate.row_file import RowFile
from tools.evaluate.speaking import Spoken
from tools.tiny.cli import tiny_config, write_model, write_tokenizer
from train.run_folder.checkpoint_folders import newest_sound_here
from train.run_folder.start import hold_run
from train.world import ALONE

# --- disks ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_in_a_merge_is_one_line_and_leaves_nothing(model_dir, tmp_path):
    """The operating system refuses files over 1 MB, as a quota does: merge and convert write by the same function."""
    out = tmp_path / "merged"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, old[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            convert_model(model_dir, out, "native")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    said = str(caught.value)
    assert said.startswith(f"{out}: not written: ")
    assert "File too large" in said
    assert "GB are needed there: make room, or give an OUT on another disk" in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == [], "room for the next try"


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """The operating system refuses larger ones, as a quota does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def add_row(path: Path) -> None:
    rows = RowFile(path, Spoken, lambda row: row.key)
    try:
        rows.add(Spoken(system="a", draw=0, item="b", wave="c", error="x" * 5000))
    finally:
        rows.close()


WRITERS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: write_bytes(path, bytes(5000)),
    "tensors": lambda path: save_tensors({"a": torch.zeros(5000)}, path),
    "rows of an evaluation": add_row,
    "tokenizer": lambda path: write_tokenizer(path.parent),
    "model": lambda path: write_model(path.parent, tiny_config(), seed=0),
}
OTHER_NAMES = {"tokenizer": "tokenizer.json", "model": "model.safetensors"}


@pytest.mark.parametrize("what", WRITERS)
def test_a_write_to_a_full_disk_names_its_file(what: str, tmp_path):
    """The system does not: the command would end in "No space left on device", without a place, or in a traceback."""
    path = tmp_path / OTHER_NAMES.get(what, "file")
    with pytest.raises(OSError, match=re.escape(path.name)) as caught, files_up_to(1000):
        WRITERS[what](path)
    assert system_fault(caught.value).startswith(f"{path}: ")


def test_too_little_room_is_an_error_before_anything_is_written(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"merged: not written: .* GB are free there; 1e\+06 GB are needed there"),
        new_folder(tmp_path / "merged", 10**15),
    ):
        raise AssertionError("nothing is written")
    assert list(tmp_path.iterdir()) == []


def test_two_never_write_one_out_together(tmp_path):
    out = tmp_path / "merged"
    with new_folder(out, 1) as partial:
        (partial / "a").write_text("first")
        with pytest.raises(CheckpointError, match="merged: another process is writing it"), new_folder(out, 1):
            raise AssertionError("the first one still writes")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"a": "first"}


def test_what_a_killed_merge_left_is_no_part_of_the_next(tmp_path):
    left = tmp_path / ".merged.tmp"
    (left / "deep").mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    with new_folder(tmp_path / "merged", 1) as partial:
        (partial / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_an_interrupted_merge_leaves_no_half_folder(tmp_path):
    def interrupted() -> None:
        with new_folder(tmp_path / "merged", 1) as partial:
            (partial / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_current_folder_can_be_the_out_of_a_merge(tmp_path, monkeypatch):
    out = tmp_path / "empty"
    out.mkdir()
    monkeypatch.chdir(out)
    with new_folder(Path(), 1) as partial:
        (partial / "config.json").write_text("{}")
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("place", ["/proc/run", "FILE/run"])
def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path, place):
    (tmp_path / "FILE").write_text("")
    place = place.replace("FILE", str(tmp_path / "FILE"))
    with (
        pytest.raises(PipelineError, match=r"^RUN /.*; give a folder that you may write to$"),
        hold_run(Path(place), ALONE),
    ):
        raise AssertionError("nobody holds it")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PipelineError, match="Permission denied; give a folder"), hold_run(tmp_path, ALONE):
        raise AssertionError("nobody holds it")
    with pytest.raises(OSError, match="Permission denied"), hold_folder(tmp_path):
        raise AssertionError("nobody holds it")


# --- files that are to be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["speak", "nowhere", "--reference", "a.wav", "--reference-text", "a", "--text", "b", "--out", "FOLDER"],
        ["speak", "nowhere", "--reference", "a.wav", "--reference-text", "a", "--text", "b", "--codes", "FOLDER"],
        ["inspect-shards", "decode", "nowhere", "000000000000", "FOLDER"],
        ["bench", "preprocess", "--out", "FOLDER"],
        ["bench", "train", "--out", "FOLDER"],
        ["bench", "data", "--out", "FOLDER/a-file/below.json"],
        ["preprocess", "convert", "folder", "nowhere", "FOLDER"],
    ],
)
def test_a_folder_where_a_file_is_written_is_refused_first(arguments, tmp_path):
    from click.testing import CliRunner

    from preprocess.cli import main as preprocess
    from tools.bench.cli import main as bench
    from tools.inspect_shards.cli import main as inspect_shards
    from tools.speak import main as speak

    (tmp_path / "a-file").write_text("")
    commands = {"speak": speak, "inspect-shards": inspect_shards, "bench": bench, "preprocess": preprocess}
    given = [word.replace("FOLDER", str(tmp_path)) for word in arguments[1:]]
    result = CliRunner().invoke(commands[arguments[0]], given)
    assert result.exit_code == 2, result.output
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("Error: Invalid value for ")
    assert "is a directory" in last or "is a file, so nothing can be put there" in last
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


def test_every_option_named_out_knows_folders():
    """A new command that writes a file takes the type that refuses folders."""
    import click

    from tools.bench.cli import main as bench
    from tools.speak import main as speak

    for command in [speak, *bench.commands.values()]:
        assert isinstance(command, click.Command)
        [out] = [parameter for parameter in command.params if parameter.name == "out"]
        assert isinstance(out.type, FileToWrite), command.name


# --- other people's packages ----------------------------------------------------------------------------------------


def entry(repository: Path, command: str) -> str:
    """What the console script of a command runs."""
    module, function = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["scripts"][command].split(
        ":"
    )
    return f"import sys; sys.argv[0] = {command!r}; from {module} import {function}; {function}()"


@pytest.mark.parametrize("command", ["preprocess", "train", "checkpoints", "inspect-shards", "speak"])
@pytest.mark.parametrize("is_here", [True, False])
def test_another_projects_packages_are_not_run(repository, tmp_path, command, is_here):
    """On PYTHONPATH before ours, or as files in the current folder."""
    for name in ("tools", "train", "shards", "preprocess"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    paths = [str(repository)] if is_here else [str(tmp_path), str(repository)]
    result = subprocess.run(
        [sys.executable, "-c", entry(repository, command), "--help"],
        cwd=tmp_path if is_here else repository.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Usage: {command} ")


def test_a_foreign_package_that_came_first_is_named(repository, tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("")
    result = subprocess.run(
        [sys.executable, "-c", f"import tools; {entry(repository, 'speak')}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(repository)])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr == (
        f"error: {tmp_path}/tools/__init__.py was imported as 'tools' before this program began; start it without that package\n"
    )


# --- commands that are printed --------------------------------------------------------------------------------------


def test_blanks_in_printed_commands_are_quoted(tmp_path):
    chatml = tmp_path / "my list.json"
    chatml.write_text("[]")
    with pytest.raises(PipelineError, match=rf"run first: preprocess '{chatml}' OUT"):
        open_dataset(chatml)
    kept = tmp_path / "my run" / "checkpoints" / "the good one"
    kept.mkdir(parents=True)
    (kept / "COMPLETE").write_text("{}")
    with pytest.raises(PipelineError, match=rf"go on with --resume '{kept}', or"):
        newest_sound_here(tmp_path / "my run")


def test_no_printed_command_holds_a_bare_path(repository):
    """f-strings that begin a command of ours put only quoted paths behind it."""
    import re

    commands = r"(?:preprocess|train|speak|checkpoints \w+|inspect-shards \w+|finalize|--resume|delete|kill) "
    bare = re.compile(
        rf"(?:next|then|first|with|run|reject\w*|now|delete)[:,]? {commands}\{{(?!shlex|folder\}}|model\}}|holder)"
    )
    found = [
        f"{path.relative_to(repository)}: {line.strip()}"
        for floor in ("preprocess", "train", "tools", "shards")
        for path in sorted((repository / floor).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if bare.search(line)
    ]
    assert found == []
