"""A lock on a folder: who works in OUT or RUN, named to whoever comes second.

In: a folder. Out: a file `FOLDER/.lock.HOST.PID.RANDOM` for as long as the work lasts, locked with flock and holding host,
pid, command and start time as JSON. A second holder gets a PipelineError that names them. flock ends with its process,
however that was killed, so what a dead one left behind is recognised and removed, also from another machine.

Each holder has a file of its own, announced first and compared then, so that several may share a folder (`share`: the
tasks of one array) and nobody can delete a lock that was just taken. The price: of two that start in the same moment
both may withdraw and try again a moment later. Where a file system has no flock, the file alone counts: a dead pid on this
host is recognised, a host that is gone is not, and the message says which file to delete.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import platform
import random
import re
import shlex
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from shards.errors import PipelineError
from shards.terminal import print_line

PREFIX = ".lock."  # of every file that this module writes; whoever asks whether a folder is empty leaves these out
NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
NUM_TRIES = 4
PARTIAL_IS_OLD_S = 60.0
MAX_RECORD_BYTES = 1 << 16
MAX_COMMAND_CHARS = 300
_held: set[int] = set()  # descriptors of the locks of this process


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a folder: the content of a lock file."""

    host: str
    pid: int
    pid_started: (
        int  # clock ticks after the boot: distinguishes a process from a later one with the same pid; 0 unknown
    )
    command: str
    started: str  # ISO 8601, UTC
    share: str | None = None  # holders with the same one may be there together ...
    name: str | None = None  # ... but not two of the same name
    has_flock: bool = True


@contextmanager
def hold_folder(
    folder: Path,
    share: str | None = None,
    name: str | None = None,
    wait_s: float = 0.0,
    show: Callable[[str], None] = print_line,
) -> Iterator[None]:
    """Hold `folder`, made if it is missing, until the block ends; alone, or together with holders of the same `share`.

    Somebody who holds it is waited for `wait_s` seconds. `show` gets one line when a dead process's lock was removed, or
    when the file system has no flock. Raises PipelineError when somebody holds it, OSError when no file can be written
    there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, descriptor, ours = _acquire(folder, share, name, wait_s, show)
    _held.add(descriptor)
    if not ours.has_flock:
        show(
            f"{folder}: this file system has no flock; the lock is the file {path.name} alone, checked by host and pid"
        )
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def living_holder(folder: Path) -> str | None:
    """Who holds `folder` now, in words; None where nobody does. Changes nothing there."""
    for path in sorted(folder.glob(f"{PREFIX}*")):
        holder, alive = (None, False) if path.name.startswith(f"{PREFIX}tmp.") else _read_holder(path)
        if holder and alive:
            return _named(holder)
    return None


def _close_in_child() -> None:
    """A forked child would keep the lock of a parent that was killed: loader processes live some seconds longer."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_in_child)


def _acquire(
    folder: Path, share: str | None, name: str | None, wait_s: float, show: Callable[[str], None]
) -> tuple[Path, int, Holder]:
    end = time.monotonic() + wait_s
    for attempt in itertools.count():
        path, descriptor, ours = _announce(folder, share, name)
        try:
            rival = _rival(folder, path, ours, show)
            if rival is None:
                return path, descriptor, ours
        except BaseException:
            _withdraw(path, descriptor)
            raise
        _withdraw(path, descriptor)
        if attempt + 1 >= NUM_TRIES and time.monotonic() > end:
            raise PipelineError(_refusal(folder, *rival))
        time.sleep(
            random.uniform(0.05, 0.1 * 2 ** min(attempt, 4))
        )  # who started in the same moment withdraws as we do
    raise AssertionError("the count does not end")


def _announce(folder: Path, share: str | None, name: str | None) -> tuple[Path, int, Holder]:
    """Write our lock file. It is locked before it has its name, so nobody ever sees it unlocked."""
    host, pid = platform.node(), os.getpid()
    ours = Holder(
        host=host,
        pid=pid,
        pid_started=_pid_started(pid),
        command=_command(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        share=share,
        name=name,
    )
    unique = f"{re.sub(r'[^A-Za-z0-9-]', '_', host)[:64]}.{pid}.{os.urandom(4).hex()}"
    path, partial = folder / f"{PREFIX}{unique}", folder / f"{PREFIX}tmp.{unique}"
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if not _flock(descriptor, fcntl.LOCK_EX):
            ours = msgspec.structs.replace(ours, has_flock=False)
        os.write(descriptor, msgspec.json.encode(ours) + b"\n")
        partial.rename(path)
    except BaseException:
        _withdraw(partial, descriptor)
        raise
    return path, descriptor, ours


def _withdraw(path: Path, descriptor: int) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
    os.close(descriptor)


def _rival(folder: Path, own_path: Path, ours: Holder, show: Callable[[str], None]) -> tuple[Path, Holder] | None:
    """A live holder that does not go together with ours. Files of dead ones are removed."""
    for path in sorted(folder.glob(f"{PREFIX}*")):
        if path == own_path:
            continue
        if path.name.startswith(f"{PREFIX}tmp."):
            _remove_if_old(path)
            continue
        holder, alive = _read_holder(path)
        if holder is None:
            continue
        if not alive:
            with suppress(FileNotFoundError):
                path.unlink()
                show(f"{folder}: removed the lock of a process that has ended ({_named(holder)})")
        elif ours.share is None or ours.share != holder.share or ours.name == holder.name:
            return path, holder
    return None


def _remove_if_old(partial: Path) -> None:
    """What a process killed between two system calls left; a younger one is being written."""
    with suppress(FileNotFoundError):
        if time.time() - partial.lstat().st_mtime > PARTIAL_IS_OLD_S:
            partial.unlink()


def _read_holder(path: Path) -> tuple[Holder | None, bool]:
    """(what stands in a lock file, whether its holder lives); None for what is no lock file of ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # just removed, or a link, or another user's
        return None, False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None, False
        holder = msgspec.json.decode(os.read(descriptor, MAX_RECORD_BYTES), type=Holder)
        try:
            flock_works = _flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return holder, True
        if flock_works and holder.has_flock:
            return holder, False
        return holder, holder.host != platform.node() or _runs(holder)
    except msgspec.DecodeError:
        return None, False
    finally:
        os.close(descriptor)


def _flock(descriptor: int, operation: int) -> bool:
    """False where the file system has no flock. Raises BlockingIOError when somebody holds the lock."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        return False
    return True


def _runs(holder: Holder) -> bool:
    """Whether that process of this host lives, and is not a later one with the same pid."""
    if holder.pid <= 0:
        return False
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return holder.pid_started in (0, _pid_started(holder.pid))


def _pid_started(pid: int) -> int:
    """Field 22 of /proc/PID/stat; 0 where there is no /proc."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _command() -> str:
    """What was typed, without passwords in URLs."""
    name = Path(sys.argv[0] or "python").name
    return re.sub(r"://[^/@\s]*@", "://", shlex.join([name, *sys.argv[1:]]))[:MAX_COMMAND_CHARS]


def _named(holder: Holder) -> str:
    text = f"host {holder.host}, pid {holder.pid}, since {holder.started}: {holder.command}"
    return "".join(letter if letter.isprintable() else "?" for letter in text[: 2 * MAX_COMMAND_CHARS])


def _refusal(folder: Path, path: Path, holder: Holder) -> str:
    """One line: who it is and what to do."""
    next_step = "wait until it has ended, or give another folder"
    if holder.host == platform.node() and _runs(holder):
        next_step += f", or stop it first: kill {holder.pid}"
    elif holder.host == platform.node():
        next_step += "; it was killed, but processes that it started still run"
    if not holder.has_flock:
        next_step += f"; if it no longer runs there, delete {shlex.quote(str(path))}"
    return f"{folder}: another process works in this folder ({_named(holder)}); {next_step}"
