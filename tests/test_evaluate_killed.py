"""SIGKILL of real `evaluate` processes: what a resumed one leaves is what an uninterrupted one leaves, byte for byte."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from train_process import environment
from warm_start import WarmProcess, run_warm

FILES = ("results.json", "utterances.jsonl", "report.html", "blind.html")
WITHIN_S = 120.0


@pytest.mark.slow
def test_an_evaluation_killed_at_any_part_ends_the_same(
    short_data: Path, tiny_dir: Path, wavlm: Path, repository: Path, tmp_path: Path
):
    """One folder, killed while recordings are written, while it speaks and while it scores, then left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def arguments(out: Path) -> list[object]:
        asked = [
            "--config",
            tiny_dir / "pipeline.toml",
            "--seeds",
            2,
            "--similarity",
            f"wavlm:{wavlm}",
            "--mos",
            "none",
        ]
        return [tiny_dir / "model", short_data, out, *asked]

    done = run_warm("evaluate", arguments(whole), environment(repository))
    assert done.returncode == 0, done.stderr
    for name, num_rows in (("speech.jsonl", 1), ("speech.jsonl", 20), ("scores/similarity-*.jsonl", 2)):
        process = WarmProcess("evaluate", arguments(killed), environment(repository))
        end = time.monotonic() + WITHIN_S
        while rows_in(killed, name) < num_rows and process.poll() is None:
            assert time.monotonic() < end, (name, num_rows)
            time.sleep(0.001)
        process.kill()
        assert process.wait(WITHIN_S) == -signal.SIGKILL, f"it ended before {num_rows} rows of {name} were seen"
        assert not (killed / "results.json").exists()
    said = rows_in(killed, "speech.jsonl")
    done = run_warm("evaluate", arguments(killed), environment(repository))
    assert done.returncode == 0, done.stderr
    assert "removed the lock of a process that has ended" in done.stderr
    assert rows_in(killed, "speech.jsonl") == said, "all was spoken before the last kill, nothing is said again"
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert waves_of(killed) == waves_of(whole)


def rows_in(out: Path, name: str) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob(name))


def waves_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "waves").rglob("*")) if path.is_file()
    }
