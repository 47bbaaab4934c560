"""From a path to the bytes of one regular file, or the reason why there are none.

In: a path as the list has it. Out: its bytes. Folders, pipes and devices are never opened, the size is checked before
anything is read, and a name that is nearly there is named (another Unicode form, another case, backslashes, a locale that
cannot write it). The price of the size limit: an hour-long file in segments must stay below 1 GiB.
"""

from __future__ import annotations

import itertools
import os
import stat
import sys
import unicodedata
from pathlib import Path

from preprocess.reasons import AudioFault

MAX_FILE_BYTES = 1 << 30
MAX_LISTED = 20_000  # names of a folder looked at for a missing file: a list may have a hundred thousand of them
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_bytes(path: str) -> bytes:
    """The file's bytes, as many as its size was when it was opened. Raises AudioFault."""
    try:
        _check(os.stat(path))  # noqa: PTH116 - a Path drops what some paths end with
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(file, "rb") as opened:  # noqa: PTH123 - of a descriptor
            size = _check(os.fstat(file))  # again: a name can change hands
            return opened.read(size)
    except (FileNotFoundError, NotADirectoryError):
        raise AudioFault("audio_missing", f"no such file{_nearly(path)}") from None
    except OSError as error:
        raise AudioFault("audio_unreadable", str(error.strerror)) from None
    except UnicodeEncodeError:
        coding = sys.getfilesystemencoding()
        detail = f"this process cannot write the name: file names are {coding} here (locale); set PYTHONUTF8=1"
        raise AudioFault("audio_missing", detail if coding != "utf-8" else "the name is not valid Unicode") from None
    except ValueError as error:  # a NUL inside
        raise AudioFault("audio_missing", f"no possible file name: {error}") from None
    except MemoryError:
        raise AudioFault("audio_too_large", "the memory does not hold it") from None


def _check(facts: os.stat_result) -> int:
    """The size of a regular file of at most MAX_FILE_BYTES."""
    if not stat.S_ISREG(facts.st_mode):
        kind = KINDS.get(stat.S_IFMT(facts.st_mode), "something else")
        raise AudioFault("audio_missing", f"not a regular file but {kind}")
    if facts.st_size > MAX_FILE_BYTES:
        raise AudioFault("audio_too_large", f"{facts.st_size} bytes, at most {MAX_FILE_BYTES}; cut it into clips")
    return facts.st_size


def _nearly(path: str) -> str:
    """What is there under nearly this name, as the rest of a sentence."""
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, path)
        if other != path and _is_there(other):
            return f"; the same name exists in {form} form: write the list's paths in {form}"
    slashed = path.replace("\\", "/")
    if slashed != path:
        exists = "with / in their place it exists" if _is_there(slashed) else "paths take / here"
        return f"; it has backslashes, and {exists}"
    if path != path.strip() and _is_there(path.strip()):
        return "; without the blanks around the name it exists"
    if path.endswith("/") and _is_there(path.rstrip("/")):
        return "; without the / at its end it exists"
    if path.startswith("~"):
        return "; ~ is not expanded: write the whole path"
    return _same_letters(path)


def _is_there(path: str) -> bool:
    try:
        return os.path.exists(path)  # noqa: PTH110 - a Path drops what some paths end with
    except ValueError:
        return False


def _same_letters(path: str) -> str:
    """An entry of the same folder that differs in case or Unicode form, or the part of the path that is not there."""

    def plain(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    file = Path(path)
    parent = file.parent
    while not parent.is_dir():
        if parent.is_file():
            return f"; {parent} is a file, no folder"
        if parent == parent.parent or parent.parent.is_dir():
            return f"; the folder {parent} is not there"
        parent = parent.parent
    try:
        with os.scandir(parent) as found:
            names = [entry.name for entry in itertools.islice(found, MAX_LISTED)]
        entries = [name for name in names if plain(name) == plain(file.name)]
    except OSError:
        return ""
    if not entries or entries[0] == file.name:  # the same name: a link to nothing
        return "; a link to nothing stands there" if entries else ""
    if entries[0].casefold() == file.name.casefold():
        return f"; {entries[0]!r} exists, in other letter case"
    return f"; the same name exists in another Unicode form ({entries[0]!a})"
