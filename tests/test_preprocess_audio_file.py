"""Paths: only regular files are opened, and a name that is nearly there is named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Literal

import pytest

from preprocess.audio_file import MAX_FILE_BYTES, read_bytes
from preprocess.reasons import AudioFault

CODE_OF_LOCALE_C = """
import sys
from preprocess.audio_file import read_bytes
from preprocess.reasons import AudioFault
try:
    read_bytes("/tmp/\\u0635\\u0648\\u062a.wav")
except AudioFault as fault:
    print(ascii((fault.reason, fault.detail)))
"""


def fault_of(path: str) -> AudioFault:
    with pytest.raises(AudioFault) as fault:
        read_bytes(path)
    return fault.value


def test_pipes_folders_sockets_and_devices_are_never_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.wav"))
        for name, kind in (("pipe.wav", "pipe"), ("folder.wav", "folder"), ("socket.wav", "socket")):
            fault = fault_of(str(tmp_path / name))
            assert fault.reason == "audio_missing"
            assert kind in fault.detail
    assert "device" in fault_of("/dev/zero").detail
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    assert "device" in fault_of(str(tmp_path / "zero.wav")).detail


def test_a_sparse_file_of_terabytes_is_not_read(tmp_path: Path):
    with (tmp_path / "sparse.wav").open("wb") as file:
        file.truncate(1 << 42)
    assert fault_of(str(tmp_path / "sparse.wav")).reason == "audio_too_large"
    assert str(MAX_FILE_BYTES) in fault_of(str(tmp_path / "sparse.wav")).detail


@pytest.mark.parametrize("name", ["a\0b.wav", "x" * 300, "/".join(["y" * 200] * 40), "", "\udcff.wav\ud800"])
def test_names_that_no_file_can_have_are_rejects(name: str):
    assert fault_of(name).reason in ("audio_missing", "audio_unreadable")


def test_links_in_a_circle_and_to_nothing_are_rejects(tmp_path: Path):
    (tmp_path / "a.wav").symlink_to(tmp_path / "b.wav")
    (tmp_path / "b.wav").symlink_to(tmp_path / "a.wav")
    assert fault_of(str(tmp_path / "a.wav")).reason == "audio_unreadable"
    (tmp_path / "c.wav").symlink_to(tmp_path / "nothing")
    assert "a link to nothing" in fault_of(str(tmp_path / "c.wav")).detail


@pytest.mark.parametrize(("there", "asked"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_the_other_unicode_form_is_named(tmp_path: Path, there: Literal["NFC", "NFD"], asked: Literal["NFC", "NFD"]):
    name = "أُسرة café.wav"
    (tmp_path / unicodedata.normalize(there, name)).write_bytes(b"sound")
    detail = fault_of(str(tmp_path / unicodedata.normalize(asked, name))).detail
    assert f"the same name exists in {there} form" in detail


def test_nearly_right_paths_are_named(tmp_path: Path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "A1.wav").write_bytes(b"sound")
    cases = {
        f"{tmp_path}\\clips\\A1.wav": "with / in their place it exists",
        "C:\\clips\\A1.wav": "paths take / here",
        f"{tmp_path}/clips/a1.WAV": "in other letter case",
        f"{tmp_path}/clips/A1.wav ": "without the blanks",
        f"{tmp_path}/clip/A1.wav": "clip is not there",
        f"{tmp_path}/clips/A1.wav/x": "no such file",
        "~/A1.wav": "~ is not expanded",
    }
    for path, words in cases.items():
        fault = fault_of(path)
        assert fault.reason == "audio_missing"
        assert words in fault.detail, path
    assert read_bytes(f"{tmp_path}/clips/A1.wav") == b"sound"


def test_a_locale_that_cannot_write_the_name_is_named(repository: Path):
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(repository)}
    result = subprocess.run(
        [sys.executable, "-c", CODE_OF_LOCALE_C], env=env, capture_output=True, text=True, check=True
    )
    assert "audio_missing" in result.stdout
    assert "PYTHONUTF8=1" in result.stdout


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path):
    (tmp_path / "x.wav").write_bytes(b"x")
    assert "x.wav is a file, no folder" in fault_of(f"{tmp_path}/x.wav/y.wav").detail
    assert "without the / at its end" in fault_of(f"{tmp_path}/x.wav/").detail


def test_a_large_folder_is_not_listed_for_every_name(tmp_path: Path, monkeypatch):
    """A hundred thousand missing files of a folder of millions would be hours of listing."""
    monkeypatch.setattr("preprocess.audio_file.MAX_LISTED", 0)
    (tmp_path / "X.wav").write_bytes(b"x")
    assert fault_of(str(tmp_path / "x.wav")).detail == "no such file"
