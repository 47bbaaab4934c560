"""Which shards a list names, and raw samples out of them: the part of a stream that is webdataset and fsspec.

In: SHARDS as the user wrote it. Out: the address of every shard, and their samples as bytes by member, in order. What cannot be
read comes as a sample with a reason, so that a damaged shard is counted and never ends a run by itself. The surprising part:
webdataset would run an address that begins with "pipe:" in a shell, so it sees addresses only that begin with a scheme of ours.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
from webdataset.gopen import gopen_schemes
from webdataset.shardlists import expand_urls

from shards.errors import ConfigError
from shards.writer import TAR_BLOCK
from train.data.foreign_tars import tar_samples
from train.data.stages import RawSample

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
LOCAL = "local://"  # fsspec's name for this machine's files


def shard_urls(spec: str) -> list[str]:
    """Every shard that SHARDS names: a folder, globs, brace lists (`a-{000..099}.tar`), joined by `::`; local or URLs.

    Raises ConfigError when something names no shard.
    """
    urls: list[str] = []
    for part in expand_urls(spec):
        refuse_pipe(part)
        if "://" not in part and Path(part).is_dir():
            found = sorted(str(path) for path in Path(part).rglob("*.tar"))
        elif part.endswith("/"):
            found = glob(f"{part}**/*.tar")
        elif any(letter in part for letter in "*?["):
            found = glob(part)
        else:
            found = [part] if "://" in part or Path(part).is_file() else []
        if not found:
            raise ConfigError(f"{part}: no shards there; give a folder, a glob, a brace list or URLs of .tar files")
        urls += found
    return urls


def refuse_pipe(address: str) -> None:
    """Raises ConfigError for an address whose scheme is "pipe", in any spelling that a URL parser takes for it."""
    letters = "".join(letter for letter in address if letter > " " and letter.isprintable())
    if re.match(r"(?:pipe|[a-z0-9+.-]*\+pipe):", letters, re.IGNORECASE):
        raise ConfigError(f"{address}: a pipe would run a shell command; give the address of the shards")


def glob(pattern: str) -> list[str]:
    try:
        files, path = fsspec.core.url_to_fs(pattern)
        found = sorted(str(name) for name in files.glob(path))
    except ImportError as error:
        raise ConfigError(f"{pattern}: {error}; install the extra: pip install -e '.[remote]'") from None
    except (OSError, NotImplementedError) as error:
        raise ConfigError(f"{pattern}: cannot be listed ({error}); give a brace list of shards") from None
    return [files.unstrip_protocol(name) for name in found] if "://" in pattern else found


# --- reading -------------------------------------------------------------------------------------------------------


def read_shards(urls: list[str]) -> Iterator[RawSample]:
    """Raw samples of these shards in order, through `foreign_tars`. What cannot be read comes as a sample with a reason."""
    faults: list[RawSample] = []

    def note(error: Exception) -> bool:
        what, _, stream = str(error.args[0] if error.args else error).partition(" @ ")  # webdataset's way to say where
        where = next((value for value in error.args[1:] if isinstance(value, str)), stream)
        reason = f"{type(error).__name__}: {what}"
        faults.append(RawSample("?", {}, where.removeprefix(LOCAL), reason=reason))
        return True  # go on with the next shard

    # webdataset runs what stands behind "pipe:" in a shell. It sees addresses only that begin with a scheme of ours.
    addresses = [url if SCHEME.match(url) else f"{LOCAL}{Path(url).absolute()}" for url in urls]
    for address in addresses:
        refuse_pipe(address)
        gopen_schemes[address.split("://")[0].lower()] = WholeTar
    for raw in tar_samples(addresses, note):
        yield from faults
        faults.clear()
        members = {name: value for name, value in raw.items() if not name.startswith("__")}
        yield RawSample(raw["__key__"], members, raw["__url__"].removeprefix(LOCAL))
    yield from faults


class WholeTar:
    """A file that webdataset opens, from any place fsspec knows; one that stops before its end mark is an error."""

    def __init__(self, url: str, mode: str = "rb", bufsize: int = 0) -> None:
        files, path = fsspec.core.url_to_fs(url)
        self._file = files.open(path, mode)
        self._url = url
        self._last = b""  # the end mark is two blocks of zeros

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if not data and self._url.endswith(".tar") and self._last.strip(b"\0"):
            raise tarfile.ReadError("the tar ends without its end mark: it is cut short")
        self._last = (self._last + data)[-2 * TAR_BLOCK :]
        return data

    def close(self) -> None:
        self._file.close()

    def __str__(self) -> str:
        return self._url
