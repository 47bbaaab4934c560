"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C: finish the pack, save, stop. Slurm and torchrun send one before they kill.

Nothing is saved inside the handler: a save is a collective, and ranks are interrupted at different places. The handler
only raises a flag; between packs every rank learns whether any of them has it. The price is that Ctrl-C does not end a
run at once; a second one does, where no launcher stands between.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from shards.errors import PipelineError
from train.data.feed import WaitingEnded
from train.world import World

SAVING = "Ctrl-C: the pack is finished and a checkpoint saved"
AT_ONCE = "; Ctrl-C again stops at once"  # not under a launcher, which passes only the first one on


class Stopped(PipelineError):
    """Asked to stop, everything saved; the same command goes on."""


class StopSignal:
    """A context: handlers inside, the old ones outside. What is ignored already (SIGHUP under nohup) stays so."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self._asked = self._waits = False
        self._process = os.getpid()
        self._old: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            taken = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._old = {number: signal.signal(number, self._raise_flag) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def asked(self, world: World) -> bool:
        """Whether any rank was asked to stop; every rank must call this."""
        return bool(world.sum(torch.tensor([int(self._asked)])).item())

    @contextmanager
    def ends_waiting(self) -> Iterator[None]:
        """Inside, a signal raises WaitingEnded at once, also one that came before: what is waited for may never come."""
        if self._asked:
            raise WaitingEnded
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process, forked with this handler: a terminal sends Ctrl-C to it too
        if number == signal.SIGINT and self._asked:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            message = SAVING + ("" if "TORCHELASTIC_RUN_ID" in os.environ else AT_ONCE)
            os.write(2, f"{message}\n".encode())  # a log's own buffer may be half written just now
        self._asked = True
        if self._waits:
            self._waits = False  # once: saving must come to its end
            raise WaitingEnded
