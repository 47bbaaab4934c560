"""`bench train --protocol` as a GPU would run it, at tiny size on the CPU: every row, rows that fail, no time, and a cut run."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch
from warm_start import WarmProcess

from tools.bench import protocol, protocol_rows, steps
from tools.bench import train as bench_train
from tools.bench.predictions import predicted_padded_seconds, predicted_seconds
from tools.bench.protocol_rows import Row, Settings
from train.model.config import ModelConfig

pytest.importorskip("transformers", minversion="5.3", reason="the baseline needs the native class")
TINY = Settings("small", num_samples=6, batch_tokens=256, rank=4, device="cpu", seconds=3600.0, num_steps=2)


@pytest.fixture
def short_samples(monkeypatch):
    for name in ("TEXT", "REFERENCE", "TARGET"):
        monkeypatch.setattr(bench_train, name, (12, 30))


@pytest.mark.slow
def test_the_protocol_measures_every_row_at_tiny_size(monkeypatch, short_samples, tmp_path, capsys):
    """One row runs out of memory on the way, and the file is complete after each. Nothing is compiled: that takes a minute,
    and tests/test_train_compile.py does it."""
    out, on_disk = tmp_path / "figures.json", []
    write, measure_padded = protocol.write_json, protocol_rows.measure_padded

    def write_and_read(path, figures):
        write(path, figures)
        on_disk.append(json.loads(path.read_text()))

    def too_large(shared, size, rank, batch, *others):
        if batch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return measure_padded(shared, size, rank, batch, *others)

    monkeypatch.setitem(steps.BACKEND, "cpu", None)
    monkeypatch.setattr(protocol, "write_json", write_and_read)
    monkeypatch.setattr(protocol_rows, "measure_padded", too_large)
    figures = protocol.bench(TINY, out)
    assert on_disk[-1] == json.loads(out.read_text())
    assert figures["state"] == "finished"
    rows = {(row["stage"], row["name"]): row for row in figures["rows"]}
    assert len(rows) == len(figures["rows"]) == len(on_disk) - 2
    assert [len(found["rows"]) for found in on_disk[1:]] == [*range(len(rows)), len(rows)]
    assert [row["name"] for row in rows.values() if "failed" in row] == []
    assert [row["name"] for row in rows.values() if "not_measured" in row] == ["no step waits for the GPU"]
    assert rows["checks", "no step waits for the GPU"]["not_measured"] == "not measured: needs CUDA"
    (unmeasured,) = (row for row in rows.values() if "out_of_memory" in row)
    assert unmeasured["name"] == "transformers + peft, batches of 1"
    checked = rows["checks", "losses and gradients against transformers + peft"]
    for name in ("peft's forward", "fused", "fused, compiled", "sentence order"):
        assert checked[name]["loss_difference"] < 1e-5, name
        assert checked[name]["least_cosine"] > 1 - 1e-5, name
        assert (checked[name]["gradients"], checked[name]["zero_gradients"]) == (2 * (2 * 10 + 1), 0)
    timed = [row for row in rows.values() if "samples_per_s" in row]
    assert {row["stage"] for row in timed} == {
        *("changes", "baseline", "tokens", "attention", "rows", "rank", "sharding"),
    }
    assert all(row["num_steps"] >= 1 and row["step_ms"] > 0 and row["useful_tflops"] > 0 for row in timed)
    assert len(rows["kernels", "compiled, fused LoRA"]["kernels_ms"]) == 15
    assert figures["gain_over_best_padded"] > 0
    printed = capsys.readouterr().out
    assert "not measured: needs CUDA" in printed
    assert "out of memory" in printed


def test_a_killed_protocol_has_told_what_it_measured(repository, tmp_path):
    out = tmp_path / "figures.json"
    arguments = ("train", "--protocol", "--size", "small", "--samples", 6, "--batch-tokens", 256, "--rank", 4)
    env = {**os.environ, "PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = WarmProcess("bench", (*arguments, "--out", out), env)
    found: dict = {"rows": []}
    limit = time.monotonic() + 120
    while not found["rows"]:
        assert time.monotonic() < limit, found
        assert process.poll() is None, process.communicate()
        found = json.loads(out.read_text()) if out.is_file() else found
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    told = json.loads(out.read_text())
    assert told["rows"][0]["matmul_tflops"] > 0
    assert told["state"].startswith("running: "), "and what it was at"
    assert list(tmp_path.iterdir()) == [out]


def test_rows_without_time_are_listed_with_the_reason(short_samples, tmp_path):
    settings = Settings(**{**TINY.__dict__, "seconds": 0.0})
    figures = protocol.bench(settings, tmp_path / "figures.json")
    assert figures["state"] == "finished"
    reasons = [row["not_measured"] for row in figures["rows"]]
    assert len(reasons) > 20
    assert reasons.count("not measured: needs CUDA") == 1
    assert all(reason.startswith("no time: ") for reason in reasons if "CUDA" not in reason)
    assert figures["gain_over_best_padded"] is None


def test_what_fails_or_takes_long_is_remembered():
    def fails() -> dict:
        raise ValueError("this build has no such kernel\nand more")

    settings = Settings(**{**TINY.__dict__, "seconds": 100.0})
    clock = protocol.Clock(settings)
    found = protocol.result_of(Row("rows", "one", fails), settings, clock)
    assert found["failed"] == "ValueError: this build has no such kernel"
    clock.learn("compiled", 1000.0)
    found = protocol.result_of(Row("rows", "two", dict, "compiled"), settings, clock)
    assert found["not_measured"].endswith("about 1000 needed")
    assert "not_measured" not in protocol.result_of(Row("rows", "three", dict), settings, clock)


def test_predictions_are_those_of_the_arithmetic():
    """A sample of 450 tokens, rank 32, at 790 TFLOP/s and 4.3 TB/s: products 7.7 ms, the rest by bytes."""
    config, ceilings = ModelConfig(is_random=True), {"matmul_tflops": 790.0, "copy_gb_per_s": 4300.0}
    ways = [(True, True, False), (True, False, False), (False, False, False), (True, True, True)]
    found = [1e3 * predicted_seconds(config, ceilings, 5.374e12, 450, *way) for way in ways]
    assert found == pytest.approx([10.4, 11.5, 14.1, 15.4], abs=0.1)
    padded = 1e3 * predicted_padded_seconds(config, ceilings, 5.374e12, 450, 1 / 1.3, False)
    assert padded == pytest.approx(1.3 * (7.7 + 13.1), abs=0.1)


def test_bench_train_says_which_way_it_goes(monkeypatch, run_command):
    result = run_command("bench", "train", "--help")
    assert result.returncode == 0
    assert "--protocol / --sides" in result.stdout
    assert "--minutes" in result.stdout
