"""Headers of .npy files that many threads read at once, and in children that are forked meanwhile."""

from __future__ import annotations

import gc
import multiprocessing
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shards.columns import COLUMNS_DTYPE, read_columns_file
from shards.index import INDEX_DTYPE, read_index
from shards.npy_file import load_npy, parsing
from shards.sample import _npy_header, read_npy, write_npy

NUM_READS = 400


class Garbage:
    """A cycle whose finalizer lets other threads run, wherever the collector happens to find it."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        time.sleep(0)


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Every way to an array, by name: a function that reads one of many."""
    folder = tmp_path_factory.mktemp("arrays")
    np.save(folder / "index.npy", np.zeros(3, INDEX_DTYPE))
    np.save(folder / "columns.npy", np.zeros(3, COLUMNS_DTYPE))
    np.save(folder / "codes.npy", np.zeros((8, 5), np.uint16))
    members = [write_npy(np.zeros((8, number), np.uint16)) for number in range(64)]

    def read_member(number: int) -> np.ndarray:
        _npy_header.cache_clear()  # else a header is parsed once
        return read_npy(members[number % 64])

    return {
        "index": lambda _: read_index(folder / "index.npy"),
        "columns": lambda _: read_columns_file(folder / "columns.npy"),
        "file": lambda _: load_npy(folder / "codes.npy"),
        "member": read_member,
    }


@pytest.mark.parametrize(
    "names", [["index"], ["columns"], ["file"], ["member"], ["index", "columns", "file", "member"]]
)
def test_many_threads_read_sound_arrays(readers, names):
    """CPython 3.11.7 without the lock: "AST constructor recursion depth mismatch"."""

    def read(number: int) -> int:
        Garbage()
        return readers[names[number % len(names)]](number).size

    threshold = gc.get_threshold()
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(size >= 0 for size in pool.map(read, range(NUM_READS)))
    finally:
        gc.set_threshold(*threshold)


def test_a_child_forked_while_a_header_is_parsed_reads():
    """Loader processes are forked beside threads that fetch."""
    stop = threading.Event()

    def parse() -> None:
        while not stop.is_set():
            with parsing:
                pass

    thread = threading.Thread(target=parse)
    thread.start()
    try:
        fork = multiprocessing.get_context("fork")
        for number in range(20):
            child = fork.Process(target=read_npy, args=(write_npy(np.zeros((8, 100 + number), np.uint16)),))
            child.start()
            child.join(20)
            assert child.exitcode == 0
    finally:
        stop.set()
        thread.join()


def unlocked_reads(root: Path) -> list[str]:
    """Modules that parse headers past `shards.npy_file`."""
    found = []
    for floor in ("shards", "preprocess", "train", "tools"):
        for path in sorted((root / floor).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            is_guarded = path.name == "npy_file.py" or "with parsing" in text
            if not is_guarded and re.search(r"\bnp\.(load|memmap)\(|read_array|read_magic|literal_eval", text):
                found.append(path.relative_to(root).as_posix())
    return found


def test_no_module_parses_headers_past_the_lock(repository, tmp_path):
    assert unlocked_reads(repository) == []
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "bad.py").write_text("import numpy as np\nx = np.load('x.npy')\n")
    assert unlocked_reads(tmp_path) == ["tools/bad.py"]
