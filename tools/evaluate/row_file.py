"""Rows of an evaluation as they come: JSON Lines that a killed process leaves usable.

In: rows with a key. Out: the rows that are there already, so that nothing is spoken or scored twice. A last line that was cut
off is removed when the file is opened; anything else that is no row is a fault, because it was not left by a kill.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from shards.errors import DataError
from shards.writer import naming

Row = TypeVar("Row", bound=msgspec.Struct)
SYNC_EVERY_S = 1.0
Key = tuple[str, int, str]  # system, draw, item


class RowFile(Generic[Row]):
    """Appends rows of one kind; `rows` holds all by key, the latest of equal ones."""

    def __init__(self, path: Path, kind: type[Row], key_of: Callable[[Row], Key]) -> None:
        """Raises DataError for a file that holds something else."""
        self.rows: dict[Key, Row] = {}
        self._key_of = key_of
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.is_file() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = msgspec.json.decode(line, type=kind)
            except msgspec.DecodeError as error:
                raise DataError(
                    f"{path}: line {number} is no row of this evaluation: {error}; delete the file"
                ) from None
            self.rows[key_of(row)] = row
        self._file = path.open("ab")
        self._synced = time.monotonic()
        if whole < len(data):
            self._file.truncate(whole)

    def add(self, row: Row) -> None:
        """Given to the system at once, so that a killed process loses none; on the disk within SYNC_EVERY_S of work."""
        with naming(self._path):  # a full disk names no file
            self._file.write(msgspec.json.encode(row) + b"\n")
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_EVERY_S:
                self._sync()
        self.rows[self._key_of(row)] = row

    def close(self) -> None:
        with naming(self._path):
            self._sync()
            self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()
