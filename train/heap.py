"""What a step frees stays with the process on a CPU, so that the next step need not ask the system for it.

In: the environment. Out: glibc's malloc, set for this process. A step frees and takes again hundreds of activations of 2 to
130 MB, which glibc gives back; each time the system maps and clears their pages anew, 240,000 page faults a step at the sizes
of `bench train` and a tenth of its time (NOTES.md). Stage one's workers do the same by variables (`preprocess.workers`), which
only a process that is yet to start would read. The price: the heaviest pack's memory stays taken until the process ends, and
a few percent more where blocks of other sizes leave gaps. Settings of the user's own stay in force. Before a fork what is free
is given back, once: a child would hold on to all of it while its parent fills pages of its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Mapping

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt, glibc's malloc.h
NEVER = -1  # man mallopt: disables trimming


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> None:
    """For the rest of this process, under glibc; elsewhere, and beside malloc settings of the user's own, nothing is changed."""
    is_set = any(name.startswith("MALLOC_") for name in environment)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not is_set and "glibc.malloc" not in environment.get("GLIBC_TUNABLES", ""):
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, NEVER)


def give_back_freed_memory() -> None:
    """All that is free now goes back to the system, under glibc; elsewhere nothing is changed."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
