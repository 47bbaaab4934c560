"""The lock on OUT and RUN: one process at a time, named to the second, and no lock outlives its process."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards import folder_lock
from shards.errors import PipelineError
from shards.folder_lock import hold_folder

HOLD = """
import sys, time
from pathlib import Path
from shards.folder_lock import hold_folder
sys.argv[0] = "/some/where/preprocess"
with hold_folder(Path(sys.argv[1]), *sys.argv[2:4]):
    print("held", flush=True)
    sys.stdin.read()
"""


def start(*arguments: object, code: str = HOLD) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


@pytest.fixture
def holder(tmp_path):
    """A function (options) -> a process that holds tmp_path/out; ended with the test."""
    processes = []

    def hold(*options: str) -> subprocess.Popen:
        process = start(tmp_path / "out", *options)
        processes.append(process)
        assert process.stdout.readline() == "held\n", process.stderr.read()  # pyright: ignore[reportOptionalMemberAccess]
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_process_gets_the_name_of_the_holder(holder, tmp_path):
    out = tmp_path / "out"
    process = holder()
    with pytest.raises(PipelineError) as refused, hold_folder(out):
        pass
    message = str(refused.value)
    assert message.startswith(f"{out}: another process works in this folder (host {platform.node()}, pid {process.pid}")
    assert f"preprocess {out}" in message
    assert f"kill {process.pid}" in message
    assert "\n" not in message
    process.communicate("")  # ends by itself
    with hold_folder(out):
        assert len(files(out)) == 1
    assert files(out) == []


def test_the_lock_of_a_killed_process_is_taken(holder, tmp_path):
    lines: list[str] = []
    process = holder()
    process.kill()
    process.wait()
    assert len(files(tmp_path / "out")) == 1
    with hold_folder(tmp_path / "out", show=lines.append):
        assert len(files(tmp_path / "out")) == 1
    assert files(tmp_path / "out") == []
    assert len(lines) == 1
    assert re.search(rf"removed the lock of a process that has ended .*pid {process.pid}", lines[0])


def test_tasks_of_one_job_share_and_others_do_not(holder, tmp_path):
    holder("job-a", "task 0")
    with hold_folder(tmp_path / "out", "job-a", "task 1"):
        pass
    for share, name in (("job-a", "task 0"), ("job-b", "task 1"), (None, None)):
        with pytest.raises(PipelineError, match="another process works"), hold_folder(tmp_path / "out", share, name):
            pass


def test_of_many_that_start_together_never_two_hold(tmp_path):
    """Each appends a line when it begins and ends: between the two lines of one no other may stand."""
    code = """
import os, sys, time
from pathlib import Path
from shards.errors import PipelineError
from shards.folder_lock import hold_folder
print("ready", flush=True); sys.stdin.readline()
for _ in range(15):
    try:
        with hold_folder(Path(sys.argv[1])):
            log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(log, f"{os.getpid()}\\n".encode()); time.sleep(0.003); os.write(log, f"{os.getpid()}\\n".encode())
            os.close(log)
    except PipelineError:
        pass
"""
    processes = [start(tmp_path / "out", tmp_path / "log", code=code) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"  # pyright: ignore[reportOptionalMemberAccess]
    errors = [process.communicate("\n")[1] for process in processes]
    assert errors == ["", "", ""]
    lines = (tmp_path / "log").read_text().split()
    assert len(lines) >= 2
    assert lines[::2] == lines[1::2]
    assert files(tmp_path / "out") == []


def without_flock(*_: object) -> None:
    raise OSError(95, "Operation not supported")


def test_without_flock_pid_and_host_decide(holder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(folder_lock.fcntl, "flock", without_flock)
    lines: list[str] = []
    process = holder()
    with pytest.raises(PipelineError, match=f"pid {process.pid}"), hold_folder(out, show=lines.append):
        pass
    process.kill()
    process.wait()
    with hold_folder(out, show=lines.append):
        (own,) = out.iterdir()
        record = json.loads(own.read_bytes())
        assert record["has_flock"] is False
        with pytest.raises(PipelineError, match=f"pid {os.getpid()}.*delete .*{own.name}"), hold_folder(out):
            pass
    assert [("has ended" in line, "has no flock" in line) for line in lines] == [(True, False), (False, True)]
    assert files(out) == []
    # Left there by: a process of this host whose pid another one has now; a process of a host we cannot ask.
    record["pid_started"] -= 1
    (out / ".lock.earlier").write_text(json.dumps(record))
    with hold_folder(out, show=lines.append):
        assert not (out / ".lock.earlier").exists()
    (out / ".lock.elsewhere").write_text(json.dumps({**record, "host": "node-7"}))
    with pytest.raises(PipelineError, match=r"host node-7.*delete .*\.lock\.elsewhere"), hold_folder(out):
        pass


def test_what_is_no_lock_of_ours_neither_blocks_nor_is_lost(tmp_path):
    (tmp_path / ".lock.text").write_text("mine")
    (tmp_path / ".lock.folder").mkdir()
    (tmp_path / ".lock.link").symlink_to(tmp_path / ".lock.text")
    os.mkfifo(tmp_path / ".lock.pipe")
    (tmp_path / ".lock.tmp.fresh").touch()
    (tmp_path / ".lock.tmp.old").touch()
    os.utime(tmp_path / ".lock.tmp.old", (0, time.time() - 3600))
    before = files(tmp_path)
    with hold_folder(tmp_path):
        pass
    assert files(tmp_path) == [name for name in before if name != ".lock.tmp.old"]


def test_what_a_record_says_is_printable_and_holds_no_password(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "https://user:secret@host/x", "a b\x1b]52;c;AAAA\x07"])
    with hold_folder(tmp_path), pytest.raises(PipelineError) as refused, hold_folder(tmp_path):
        pass
    message = str(refused.value)
    assert "train https://host/x 'a b?" in message
    assert message.isprintable()


def test_a_folder_that_cannot_be_written_is_an_oserror(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), hold_folder(tmp_path / "file"):
        pass


def test_a_forked_child_does_not_keep_a_killed_parents_lock(tmp_path):
    """As the loader processes of a killed run, which live some seconds longer."""
    code = HOLD.replace(
        '    print("held"', '    import os\n    if os.fork() == 0:\n        time.sleep(600)\n    print("held"'
    )
    process = start(tmp_path / "out", code=code)
    assert process.stdout.readline() == "held\n"  # pyright: ignore[reportOptionalMemberAccess]
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    try:
        assert Path(f"/proc/{child}").exists()
        with hold_folder(tmp_path / "out"):
            assert len(files(tmp_path / "out")) == 1
    finally:
        os.kill(int(child), 9)
