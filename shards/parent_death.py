"""Lets a process that works for another one end with it, also when that one is killed outright.

Linux only; elsewhere a child notices at its next word to the parent. Without it, orphans go on writing where a new job of
the same command has already begun.
"""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """From now on the system kills this process when the thread that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
