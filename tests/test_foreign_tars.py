"""Tars of strangers: every sample is read or logged, and no header makes the reader hang, fill the memory or stop early."""

from __future__ import annotations

import gzip
import io
import lzma
import random
import tarfile
from pathlib import Path

import pytest

from shards.config import SequenceSection
from shards.sample import pack_sample
from shards.sequence import SequenceBuilder
from train.data import foreign_tars
from train.data.shard_urls import read_shards
from train.data.stages import build_sequences

NUM_SAMPLES = 3


@pytest.fixture(scope="module")
def builder(tokenizer):
    return SequenceBuilder(tokenizer, SequenceSection())


@pytest.fixture(scope="module")
def packed(make_sample):
    return dict(pack_sample(make_sample(1, 6, 9)))


def tar_of(items, **options) -> bytes:
    """items: (name, data) or (TarInfo, data)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in items:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def members(packed, key: str):
    return [(f"{key}.{suffix}", data) for suffix, data in packed.items()]


def read(path: Path, data: bytes, builder):
    """(keys of the sound samples, reasons of the faults)."""
    path.write_bytes(data)
    built = list(build_sequences(builder)(read_shards([str(path)])))
    return [item.key for item in built if item.sequence], [item.reason for item in built if not item.sequence]


def special(name: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "a.json"
    return info, b""


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_reported_not_dropped(kind: bytes, packed, builder, tmp_path):
    strange = [special(f"b.{suffix}", kind) for suffix in packed]
    data = tar_of([special("folder", tarfile.DIRTYPE), *members(packed, "a"), *strange, *members(packed, "c")])
    sound, reasons = read(tmp_path / "x.tar", data, builder)
    assert sound == ["a", "c"]
    assert len(reasons) == 1
    assert "sample b: member ids.npy is a link or a device" in reasons[0]


def test_a_key_that_stands_twice_is_reported_once(packed, builder, tmp_path):
    data = tar_of([*members(packed, "a"), *members(packed, "a"), *members(packed, "b")])
    sound, reasons = read(tmp_path / "x.tar", data, builder)
    assert sound == ["b"]
    assert [reason.partition(": ")[2] for reason in reasons] == ["sample a: two members ids.npy"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_name_of_ten_thousand_letters_stays_out_of_logs(form: int, packed, builder, tmp_path):
    data = tar_of([*members(packed, "x" * 10_000), *members(packed, "ليلى" * 40)], format=form)
    sound, reasons = read(tmp_path / "x.tar", data, builder)
    assert sound == ["ليلى" * 40]
    assert len(reasons) == 1
    assert len(reasons[0]) < 200


@pytest.mark.parametrize(("name", "pack"), [("x.tar", bytes), ("x.tar.gz", gzip.compress), ("x.tar.xz", lzma.compress)])
def test_a_damaged_header_does_not_pass_for_the_end(name, pack, packed, builder, tmp_path):
    """Python's tarfile, and so webdataset, takes it for the end of the tar and loses the rest without a word."""
    data = bytearray(tar_of([item for key in "abc" for item in members(packed, key)]))
    place = data.index(b"b.ids.npy")
    data[place + 130] ^= 1
    sound, reasons = read(tmp_path / name, pack(bytes(data)), builder)
    assert sound == ["a"]
    assert "no tar header at byte" in reasons[0]


def test_joined_tars_are_reported(packed, builder, tmp_path):
    sound, reasons = read(tmp_path / "x.tar", tar_of(members(packed, "a")) + tar_of(members(packed, "b")), builder)
    assert sound == ["a"]
    assert "joined tars" in reasons[0]


@pytest.mark.parametrize("size", ["abc", "-512", str(1 << 60), "9" * 40, ""])
def test_a_claimed_size_is_not_believed(size: str, packed, builder, tmp_path):
    """A size of 2^60 made the reader seek for ever behind the end of the file."""
    info = tarfile.TarInfo("a.json")
    info.pax_headers = {"size": size}
    _, reasons = read(tmp_path / "x.tar", tar_of([(info, packed["json"]), *members(packed, "b")]), builder)
    assert any("damaged" in reason or "cut short" in reason for reason in reasons)


def test_members_and_headers_beyond_a_limit_are_not_held(packed, builder, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_tars, "MAX_MEMBER_BYTES", 5000)
    monkeypatch.setattr(foreign_tars, "MAX_HEADER_BYTES", 5000)
    big = [("a.json", bytes(6000)), ("b.flac", bytes(100_000)), *members(packed, "b")]
    sound, reasons = read(tmp_path / "x.tar.gz", gzip.compress(tar_of(big)), builder)
    assert sound == ["b"]
    assert "sample a: member json has 6000 bytes" in reasons[0]
    info = tarfile.TarInfo("a.json")
    info.pax_headers = {"comment": "x" * 6000}
    sound, reasons = read(tmp_path / "y.tar", tar_of([(info, packed["json"])]), builder)
    assert "a header of 6" in reasons[0]


def test_sparse_members_are_reported(packed, builder, tmp_path):
    info = tarfile.TarInfo("a.json")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(1 << 40)}
    sound, reasons = read(tmp_path / "x.tar", tar_of([(info, packed["json"]), *members(packed, "b")]), builder)
    assert (sound, len(reasons)) == (["b"], 1)
    assert "sample a: member json is sparse" in reasons[0]


@pytest.mark.parametrize("kind", ["folder", "loop", "nothing", "text"])
def test_what_is_no_tar_is_said_in_words(kind: str, builder, tmp_path):
    path = tmp_path / "x.tar"
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "text":
        path.write_text("<html>404</html>" * 99)
    (built,) = build_sequences(builder)(read_shards([str(path)]))
    words = {"folder": "Is a directory", "loop": "symbolic links", "nothing": "No such file", "text": "no tar"}
    assert words[kind] in built.reason


def test_two_hundred_damaged_tars_lose_nothing_in_silence(packed, builder, tmp_path):
    """Bits flipped, cut, holes, blocks doubled, zeroed or swapped: all samples come, or something is logged."""
    rng = random.Random(5)
    whole = tar_of([item for key in "abc" for item in members(packed, key)])
    num_told = 0
    for number in range(200):
        data = bytearray(whole)
        place, block = rng.randrange(len(data) - 10240), 512 * rng.randrange((len(data) - 10240) // 512)
        action = number % 6
        if action == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            del data[place:]
        elif action == 2:
            del data[place : place + rng.randrange(1, 600)]
        elif action == 3:
            data[block:block] = data[block : block + 512]
        elif action == 4:
            data[block : block + 512] = bytes(512)
        else:
            data[block : block + 1024] = data[block + 512 : block + 1024] + data[block : block + 512]
        sound, reasons = read(tmp_path / "x.tar", bytes(data), builder)
        assert len(sound) == NUM_SAMPLES or reasons, (number, sound)
        num_told += bool(reasons)
    assert num_told > 100
