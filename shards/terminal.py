"""The one way out to people: lines, tables, JSON and faults of every command, and the format of every log line.

All text passes `shards.printable` here, so no speaker, transcript, file name or URL can move a cursor, write to a clipboard,
forge a line, end a command as bad rich markup, or leave a token in a log. tests/test_floors.py refuses `print`, `click.echo`
and rich anywhere else.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from shards.errors import PipelineError
from shards.printable import printable, printable_json, printable_lines, redact

PLAIN_LINE_EVERY_S = 10.0  # progress where there is no terminal to draw a bar on


def print_line(text: str, *, to_stdout: bool = False) -> None:
    """A line for a person, on stderr unless said otherwise. One that the terminal cannot encode is shown escaped."""
    echo(printable_lines(text), to_stdout)


def print_json(value: Any, indent: int | None = None) -> None:
    """Data on stdout; nothing is dropped from it."""
    echo(printable_json(value, indent), to_stdout=True)


def echo(text: str, to_stdout: bool) -> None:
    stream = sys.stdout if to_stdout else sys.stderr
    encoding = getattr(stream, "encoding", None) or "utf-8"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=not to_stdout)


def print_table(
    rows: Iterable[tuple[str, ...]],
    *,
    headings: tuple[str, ...] = (),
    title: str = "",
    to_stdout: bool = False,
    width: int | None = None,
) -> None:
    """Rows of plain text: what stands in a cell is never read as markup. Without headings: a name and its value a line."""
    shown = [tuple(printable(redact(value)) for value in row) for row in rows]
    if not headings:
        longest = max((len(name) for name, *_ in shown), default=0)
        for name, *values in shown:
            echo(f"{name:{longest}}  {'  '.join(values)}", to_stdout)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(redact(title))))
    for heading in headings:
        table.add_column(Text(heading))
    for row in shown:
        table.add_row(*(Text(value, overflow="fold") for value in row))
    Console(stderr=not to_stdout, width=width).print(table)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Gives a function to call as each of `total` things is done. A bar on a terminal, elsewhere a line now and then."""
    if not sys.stderr.isatty():
        yield PlainProgress(what, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


class PlainProgress:
    """A line every PLAIN_LINE_EVERY_S, none for what is done sooner: for logs and pipes."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._next = time.monotonic() + PLAIN_LINE_EVERY_S

    def __call__(self) -> None:
        self._done += 1
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_LINE_EVERY_S
            print_line(f"{self._what}: {self._done} of {self._total}")


class FileToWrite(click.Path):
    """Type of an argument that names a file to be written: a folder, or a place that is none, is refused before the work."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path: Any = super().convert(value, param, ctx)
        for folder in path.absolute().parents:
            if os.path.lexists(folder):
                if not folder.is_dir():
                    self.fail(
                        f"{printable(str(path))}: {printable(str(folder))} is a file, so nothing can be put there"
                    )
                if not os.access(folder, os.W_OK | os.X_OK):
                    self.fail(f"{printable(str(path))}: nothing may be written in {printable(str(folder))}")
                break
        return path


class LineFormatter(logging.Formatter):
    """A log record as one printable line; a multi-line message is indented from its second line on."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class StoppedBySignal(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where Ctrl-C would be."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end the command as Ctrl-C does: what it started is ended first, and it says so.

    Only the first one counts: a second must not end the clearing up. No effect outside the main thread.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise StoppedBySignal(number)

    # One that is ignored already (nohup) stays so.
    old = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number in numbers if old[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, old[number])


@contextmanager
def explained(next_step: str = "") -> Iterator[None]:
    """Faults a person can act on become one line and exit status 1; `next_step` says what to do about a disk's.

    A fault of the program keeps its traceback, printed through here as well.
    """
    make_stray_lines_printable()
    after = f"; {next_step}" if next_step else ""
    try:
        yield
    except PipelineError as error:
        print_line(f"error: {error}")
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # `| head` is no fault; click ends the command quietly
        print_line(f"error: {system_fault(error)}{after}")
        sys.exit(1)
    except StoppedBySignal as stop:
        print_line(f"stopped by {stop}{after}")
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print_line(f"interrupted{after}")
        sys.exit(130)


def system_fault(error: OSError) -> str:
    """What the system refused and where: "PATH: No space left on device"."""
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    what = error.strerror or str(error) or type(error).__name__
    return f"{where}: {what}" if where else what


def make_stray_lines_printable() -> None:
    """Tracebacks of our own faults, and log lines from before a log was opened, may quote data too."""
    sys.excepthook = print_traceback
    if logging.lastResort:
        logging.lastResort.setFormatter(LineFormatter("%(message)s"))


def print_traceback(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    for line in "".join(traceback.format_exception(kind, error, trace)).splitlines():
        echo(printable(redact(line)), to_stdout=False)
