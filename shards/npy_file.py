""".npy files, whose headers are parsed by one thread at a time.

In: a path, or an open file. Out: its array. CPython before 3.11.8 and 3.12.2 counts the depth of what `ast` builds for all
threads together (gh-106905): where the garbage collector lets another thread in while a header is parsed, and that one parses
too, a sound file gives "AST constructor recursion depth mismatch". Each header in this project is therefore parsed under
`parsing`; the price is microseconds of waiting.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np

parsing = threading.RLock()  # a finalizer of the garbage collector may read an array, too
# A child that is forked while another thread parses must not wait for that thread.
os.register_at_fork(before=parsing.acquire, after_in_parent=parsing.release, after_in_child=parsing.release)


def load_npy(source: Path | BinaryIO, is_mapped: bool = False) -> np.ndarray:
    """Numbers only. Raises what numpy raises: many kinds for a header that is not its own, TokenError and MemoryError too."""
    with parsing:
        return np.load(source, mmap_mode="r" if is_mapped else None, allow_pickle=False)
