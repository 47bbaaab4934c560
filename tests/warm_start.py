"""Real processes of the commands without ten seconds of imports each: forks of one that has imported everything.

A server per pytest worker imports torch, peft and the training loop once, computes nothing, and forks on request. Each
fork leads a process group of its own, with the arguments, environment, folder and outputs asked for, and can be waited
for, signalled and killed as any other; the ranks that a forked launcher starts are forks of it. The price: forks share one
hash seed, and what is imported when is not as in a fresh start, so tests of either start Python themselves.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

IMPORTED = ("train.loop", "train.launch", "torch.distributed.launcher.api", "torch.utils.checkpoint")
COMMANDS = {
    "train": "train.cli",
    "checkpoints": "tools.checkpoints.cli",
    "speak": "tools.speak",
    "tiny": "tools.tiny.cli",
    "evaluate": "tools.evaluate.cli",
    "bench": "tools.bench.cli",
}
MAX_REQUEST = 1 << 20
REPOSITORY = Path(__file__).resolve().parent.parent


class WarmProcess:
    """A command in a fork of the server, with the part of subprocess.Popen's interface that tests use."""

    def __init__(self, name: str, arguments: Sequence[object], env: Mapping[str, str], cwd: Path = REPOSITORY) -> None:
        self.args = [name, *map(str, arguments)]
        (out, self.stdout), (err, self.stderr) = _pipe(), _pipe()
        self._status, status = os.pipe()
        socket.send_fds(_server(), [pickle.dumps((self.args, str(cwd), dict(env)))], [out, err, status])
        for fd in (out, err, status):
            os.close(fd)
        self.pid: int = struct.unpack("q", os.read(self._status, 8))[0]
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(struct.unpack("q", os.read(self._status, 8))[0])
            os.close(self._status)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(stdout, stderr) until everyone who holds them has closed them, as of subprocess."""
        read: dict[int, str] = {}
        streams = (self.stdout, self.stderr)
        threads = [
            threading.Thread(target=lambda i=i, s=s: read.update({i: s.read()}), daemon=True)
            for i, s in enumerate(streams)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        for stream in streams:
            stream.close()
        self.wait(timeout)
        return read[0], read[1]


def run_warm(name: str, arguments: Sequence[object], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with captured text."""
    process = WarmProcess(name, arguments, env)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)


def _pipe() -> tuple[int, IO[str]]:
    ours, theirs = os.pipe()
    return theirs, os.fdopen(ours)


_started: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []


def _server() -> socket.socket:
    """The server of this pytest worker, started when a test first needs it."""
    if not _started:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, env=env, cwd=REPOSITORY, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        _started.append((ours, process))
        atexit.register(lambda: (ours.close(), process.wait()))  # it ends when the socket does
    return _started[0][0]


# --- in the server ----------------------------------------------------------------------------------------------------


def serve(fd: int) -> None:
    """Fork for every request until the other side of the socket is closed."""
    for module in (*IMPORTED, *COMMANDS.values()):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # forks share these pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    requests = socket.socket(fileno=fd)
    while True:
        request, fds, _, _ = socket.recv_fds(requests, MAX_REQUEST, 3)
        if not request:
            return
        if os.fork() == 0:
            requests.close()
            _watch(pickle.loads(request), *fds)
        for fd in fds:
            os.close(fd)


def _watch(request: tuple[list[str], str, dict[str, str]], stdout: int, stderr: int, status: int) -> NoReturn:
    """Fork the command, and write its process id and, at its end, its wait status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        os.setsid()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.close(stdout)
        os.close(stderr)
        run_here(*request)
    os.write(status, struct.pack("q", pid))
    for fd in (0, 1, 2, stdout, stderr):
        os.close(fd)
    os.write(status, struct.pack("q", os.waitpid(pid, 0)[1]))
    os._exit(0)


def run_here(args: list[str], cwd: str, env: dict[str, str]) -> NoReturn:
    """Be the command: as `python -c` with its `main()`, and end as an interpreter does."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = args
    sys.modules["__main__"] = types.ModuleType("__main__")
    if args[0] == "train":
        start_ranks_by_fork()
    status: Any = 0
    try:
        importlib.import_module(COMMANDS[args[0]]).main()
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        end(status)
    raise AssertionError


class ForkedRank:
    """A rank as a fork of its launcher, with what torch's launcher needs of Popen."""

    def __init__(self, args: Sequence[str], env: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for number in signal.valid_signals():  # as exec does with handlers; the launcher's own are not for ranks
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            atexit._clear()
            atexit.register(logging.shutdown)
            os.setsid()
            run_here(list(args), str(Path.cwd()), env)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        end = None if timeout is None else time.monotonic() + timeout
        while end is not None and self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout or 0)
            time.sleep(0.02)
        return self._wait(0)

    def _wait(self, flags: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def start_ranks_by_fork() -> None:
    """Where torch's launcher would run `python -m train`, it forks."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def popen(self: SubprocessHandler, args: Sequence[str], env: dict[str, str]) -> ForkedRank:
        return ForkedRank(args[args.index("train") :], env)

    SubprocessHandler._popen = popen  # pyright: ignore[reportAttributeAccessIssue]


def end(status: Any) -> NoReturn:
    """What the interpreter does at its end, which a fork in the middle of a stack has to do itself."""
    if isinstance(status, str):
        print(status, file=sys.stderr)
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - joins threads that are not daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
