"""Loader processes: how they are started and ended, and what to say when one is gone or cannot hand over its packs.

In: a DataLoader's iterator, or the error it raised. Out: no process left behind, or one line. They are killed, never joined: one
that hangs would be waited for at exit for ever; the price is that they cannot end by themselves, so they keep nothing to save.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

from torch.utils.data._utils import signal_handling

from shards.errors import PipelineError

FULL_SHARED_MEMORY = (
    "/dev/shm is full (`df -h /dev/shm`), through which loader processes pass packs: give the container more "
    "(docker run --shm-size=8g, or --ipc=host), or set train.num_workers=0"
)


def require_semaphores(num_workers: int) -> None:
    """Raises PipelineError where /dev/shm has no room even for the queues' semaphores, before a loader is half made."""
    try:
        made = [
            multiprocessing.get_context("fork").Semaphore() for _ in range(8 + 6 * num_workers if num_workers else 0)
        ]
    except OSError as error:
        raise PipelineError(f"loader processes cannot be started: {error.strerror}; {FULL_SHARED_MEMORY}") from None
    del made


def kill_workers(iterator: Any) -> None:
    """End loader processes outright: one that hangs, or is stopped, would be waited for at exit for ever.

    They are taken off torch's list first: its handler would raise wherever this process then happens to be.
    """
    if getattr(iterator, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    for worker in getattr(iterator, "_workers", None) or []:
        worker.kill()


def only_the_parent_ends(_: int) -> None:
    """In a loader process: SIGTERM of anybody but its rank is not for it.

    torch's launcher signals a rank's whole process group and Slurm every process of a step. The rank wants to save then, and
    cannot once a loader process is gone. To ignore the signal would not do: a DataLoader ends its own processes with it.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait_for_parent, daemon=True).start()


def dead_loader(error: Exception) -> PipelineError | None:
    """What to say when torch says that a loader process is gone: it does so wherever the process happens to be.

    A process that dies while a pack of its is being handed over shows as a broken connection instead.
    """
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not said.startswith("DataLoader worker") and not isinstance(error, ConnectionError | EOFError):
        return None
    if "Bus error" in said or "shared memory" in str(error):
        return PipelineError(f"a loader process has ended ({said}); {FULL_SHARED_MEMORY}")
    return PipelineError(
        f"a loader process has ended ({said}); mostly memory ran out (`dmesg` knows): lower train.num_workers, or "
        "train.shuffle_buffer of a stream; start the same command again to go on from the last checkpoint"
    )
