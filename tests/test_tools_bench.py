"""`bench` runs to its end and stores what it shows. Figures are not judged here: speed belongs to the benchmark."""

from __future__ import annotations

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest


@pytest.mark.slow
def test_bench_preprocess_stores_every_figure(run_command, tmp_path):
    out = tmp_path / "figures.json"
    options = ("--codec", "tiny", "--clips", 4, "--list-mb", 2, "--workers", 2, "--rounds", 1, "--out", out)
    result = run_command("bench", "preprocess", *options)
    assert result.returncode == 0, result.stderr
    assert "every clip used twice" in result.stdout
    figures = json.loads(out.read_text())
    assert {"mb_per_s", "peak_mb", "json_load_mb_per_s", "json_load_peak_mb"} <= set(figures["intake"])
    codec, jobs = figures["codec"], figures["jobs"]
    assert len(codec["audio_s_per_core_s"]["ours"]) == len(codec["lengths_s"]) == len(codec["gain"])
    assert codec["num_codes_that_differ"] == 0
    assert codec["num_distinct_codes"] > 100, "codes of empty codebooks are all equal, which shows nothing"
    names = [
        "HuBERT, convolutions",
        "HuBERT, transformer",
        "semantic encoder",
        *(f"acoustic block {n}" for n in range(5)),
    ]
    assert [part["part"] for part in codec["parts"]] == names
    assert all(part["gflop"] > 0 and set(part["ms"]) == {"ours", "plain"} for part in codec["parts"])
    assert "acoustic block 0" in result.stdout
    assert set(jobs["audio_s_per_s"]) == set(jobs["parallel_efficiency"]) == set(jobs["busy_cores"]) == {"1", "2"}
    assert jobs["deduplication_gain"] > 0
    assert jobs["gain_over_plain_loop"] > 0


def test_a_row_of_workers_says_what_else_the_machine_did(monkeypatch, tmp_path):
    from tools.bench import preprocess as bench

    ticks = os.sysconf("SC_CLK_TCK")
    own = SimpleNamespace(user=3.0, system=1.0, children_user=5.0, children_system=1.0)
    stat = tmp_path / "stat"  # user nice system idle iowait irq softirq steal guest guest_nice
    stat.write_text(
        "cpu " + " ".join(str(seconds * ticks) for seconds in (20, 1, 4, 99, 7, 0, 0, 2, 0, 0)) + "\ncpu0 1\n"
    )
    monkeypatch.setattr(bench, "Path", lambda _: stat)
    monkeypatch.setattr(bench.os, "times", lambda: own)
    assert bench.core_seconds()[0] == 20 + 1 + 4 + 2 - 3 - 1 - 5 - 1, "ours and our children's do not count"
    jobs = {"busy_cores": {1: 0.02, 2: 1.34}, "parallel_efficiency": {1: 1.0, 2: 0.56}}
    assert bench.efficiency_row(jobs, 1) == "efficiency 100%"
    assert bench.efficiency_row(jobs, 2) == "efficiency 56%; 1.3 cores were busy with other work"


def test_bench_codec_counts_codes_by_codebook(monkeypatch, tiny_dir, tmp_path, arabic_mini, repository, capsys):
    """Its ways in this process, those of a GPU on the CPU: what a GPU rounds is for a machine that has one."""
    from preprocess import codec_server
    from tools.bench import code_differences as bench

    monkeypatch.chdir(repository)  # the list's audio paths are relative to it
    monkeypatch.setattr(bench, "run_side", lambda _, __, settings, ___, ____: bench.measure(settings))
    monkeypatch.setattr(codec_server, "cuda_devices", lambda: ["cuda:0"])
    on_cpu = [dataclasses.replace(way, device="cpu") for way in bench.CUDA_WAYS]
    monkeypatch.setattr(bench, "CUDA_WAYS", tuple(on_cpu))
    settings = bench.Settings(str(tiny_dir / "codec"), arabic_mini, 10, "cuda", 1)
    figures = bench.bench(settings, tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert figures["num_distinct_codes"] > 100
    ways = figures["ways"]
    assert {len(found["share_by_codebook"]) for found in ways.values()} == {8}
    assert all(found["audio_s_per_s"] > 0 for found in ways.values())
    for name, found in ways.items():
        assert found["share"] == pytest.approx(sum(found["share_by_codebook"]) / 8)
        assert (found["share"] > 0) == name.startswith("bfloat16"), "batches of equal length change no code"
    assert "codes that differ" in capsys.readouterr().out


def test_bench_codec_names_what_is_no_codec(run_command, tmp_path, tiny_dir):
    for codec, message in ((tmp_path / "no", "--codec = "), (tmp_path, "config.json: not readable")):
        result = run_command("bench", "codec", "--codec", codec, "--out", tmp_path / "x.json")
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_bench_train_stores_every_figure(monkeypatch, tmp_path, capsys):
    """The first side in a process of its own, the others in this one."""
    pytest.importorskip("transformers", minversion="5.3", reason="today's way needs the native class")
    from tools.bench import train

    start, started = train.run_side, []

    def side(module: str, name: str, settings: dict, threads: int) -> dict:
        started.append(name)
        return (
            start(module, name, settings, threads)
            if len(started) == 1
            else train.measure(name, train.Settings(**settings))
        )

    monkeypatch.setattr(train, "run_side", side)
    out = tmp_path / "figures.json"
    train.bench(train.Settings("small", 4, 4096, 16, 1, 1, "cpu"), out)
    assert "gain" in capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert set(figures["sides"]) == {"ours", "ours, layer by layer", "padded batches of 2", "padded batches of 4"}
    for found in figures["sides"].values():
        assert {"samples_per_s", "tokens_per_s", "useful_share", "peak_gb", "matmul_share"} == set(found)
        assert 0 < found["matmul_share"] < 1
    assert figures["sides"]["ours"]["useful_share"] == 1.0
    assert figures["sides"]["padded batches of 4"]["useful_share"] < 1.0
    assert figures["gain_over_best_padded"] > 0


@pytest.mark.slow
def test_bench_data_stores_every_figure(monkeypatch, tmp_path, capsys):
    """The first side in a process of its own, the others in this one: what they import takes longer than what they do."""
    from tools.bench import data, loading, preprocess

    start = preprocess.run
    places = {data.CODE.format(file="data", name="plan_rows"): data.plan_rows}
    for name in ("load_plan", "load_stream", "load_padded", "load_online"):
        places[data.CODE.format(file="loading", name=name)] = getattr(loading, name)
    started: list[str] = []

    def side(code: str, *arguments: object) -> preprocess.Finished:
        started.append(code)
        if len(started) == 1:
            return start(code, *arguments)
        return preprocess.Finished(0.0, places[code](*map(str, arguments)))

    monkeypatch.setattr(preprocess, "run", side)
    out = tmp_path / "figures.json"
    data.bench(data.Settings([4_000, 10_000], 60, 4096, 1), out)
    assert set(started) == set(places)
    assert "random padded batches" in capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert set(figures["planning"]) == {"4000", "10000"}
    assert all(plan["fill"] > 0.9 for plan in figures["planning"].values())
    assert set(figures["loading"]) == {"plan", "stream", "padded", "online"}
    assert all(values["samples_per_s"] > 0 for values in figures["loading"].values())
    assert figures["loading"]["plan"]["useful_tokens"] > figures["loading"]["padded"]["useful_tokens"]
    assert set(figures["ratios"]) == {"plan_over_stream", "plan_over_padded", "plan_over_online"}


def test_bench_speak_stores_every_figure(monkeypatch, tmp_path, capsys):
    """Its sides in this process: that a side gets one of its own is what the other benchmarks show."""
    pytest.importorskip("transformers", minversion="5.3", reason="the other side is the native class")
    from tools.bench import speak

    monkeypatch.setattr(
        speak, "run_side", lambda _, side, settings, __: speak.measure(side, speak.Settings(**settings))
    )
    monkeypatch.setitem(speak.READ_BYTES, "cpu", 1 << 20)
    out = tmp_path / "figures.json"
    speak.bench(["small"], speak.Settings("", 24, 2, 1, 1, "cpu"), out)
    assert "over transformers" in capsys.readouterr().out
    figures = json.loads(out.read_text())["sizes"]["small"]
    assert figures["same_greedy_codes"] == 1.0
    assert set(figures["sides"]) == {
        "ours, greedy",
        "transformers, greedy",
        "ours, sampled",
        "ours, sampled, 2 streams",
    }
    assert all(side["columns_per_s"] > 0 and side["limit_columns_per_s"] > 0 for side in figures["sides"].values())
    assert all(side["processor_ms_per_column"] > 0 for side in figures["sides"].values())
    assert figures["gain_over_transformers"] > 0
    assert figures["gain_in_processor_time"] > 0


def test_bench_speak_refuses_where_codes_differ(monkeypatch, tmp_path):
    pytest.importorskip("transformers", minversion="5.3", reason="the other side is the native class")
    from tools.bench import speak

    def differing(_: str, side: str, settings: dict, __: int) -> dict:
        return speak.measure(side, speak.Settings(**{**settings, "seed": int(side == speak.THEIRS)}))

    monkeypatch.setattr(speak, "run_side", differing)
    monkeypatch.setitem(speak.READ_BYTES, "cpu", 1 << 20)
    with pytest.raises(RuntimeError, match="greedy codes differ"):
        speak.bench(["small"], speak.Settings("", 24, 2, 1, 1, "cpu"), tmp_path / "figures.json")
    assert not (tmp_path / "figures.json").exists()


def test_bench_summary_stores_every_figure(tmp_path):
    from tools.bench.summary import bench

    figures = bench(3000, 1, tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert (figures["rows"], len(figures["seconds"]), len(figures["cpu_seconds"])) == (3000, 1, 1)
