"""`inspect-shards report` and `summary`: figures that are true, a page that asks nobody, sound that plays."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile
from browser import CHROMIUM as BROWSER
from browser import opened
from click.testing import CliRunner
from damage import flip_payload

from shards.columns import columns_of, columns_row
from shards.manifest import digest_of, open_dataset
from shards.sample import write_npy
from shards.writer import write_json
from tools.checkpoints.curves import line_chart
from tools.inspect_shards.cli import main
from tools.inspect_shards.figures import code_figures, dataset_columns, histogram, histograms, text_shares
from tools.inspect_shards.opened import open_data
from tools.inspect_shards.readiness import ELSEWHERE, nearest, suggestion
from tools.inspect_shards.summary import histogram_lines
from tools.web_page.charts import round_ticks, svg_bars
from tools.web_page.page import POLICY
from tools.web_page.page import page as page_of
from train.config import TrainSection

HOSTILE = 'نص "><script>alert(1)</script> http://evil.example/x.png'


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_dataset, make_sample) -> Path:
    """Eight samples: one whose recording is there, one whose recording was changed, the others without; columns; rejects."""
    folder = tmp_path_factory.mktemp("report-data")
    wave = np.random.default_rng(0).normal(0, 0.1, 24000).astype(np.float32)
    soundfile.write(folder / "there.wav", wave, 24000)
    soundfile.write(folder / "changed.wav", wave[::-1], 24000)
    sha256 = hashlib.sha256((folder / "there.wav").read_bytes()).hexdigest()
    samples = []
    for seed in range(8):
        sample = make_sample(seed, 25, 26 + 5 * seed)
        facts = sample.facts
        path = str(folder / ("there.wav" if seed == 0 else "changed.wav" if seed == 1 else f"gone-{seed}.wav"))
        target = msgspec.structs.replace(facts.target, path=path, sha256=sha256)
        warnings = ["target_noisy"] if seed == 3 else []
        facts = msgspec.structs.replace(
            facts, target=target, warnings=warnings, id=HOSTILE if seed == 2 else f"id-{seed}"
        )
        samples.append(dataclasses.replace(sample, facts=facts))
    make_dataset(folder / "set", samples)
    write_columns(folder / "set", samples)
    record, _ = open_dataset(folder / "set")
    config = {"text": {"min_chars": 2, "max_chars": 1000, "min_chars_per_s": 2.0, "max_chars_per_s": 35.0}}
    record = msgspec.structs.replace(
        record, config=config, rejects={"audio_missing": 5}, num_rows=13, target_hours=0.01
    )
    record = msgspec.structs.replace(record, warnings={"target_noisy": 1})
    write_json(folder / "set" / "dataset.json", msgspec.structs.replace(record, digest=digest_of(record)))
    reject = {
        "row": 9,
        "id": HOSTILE,
        "stage": "audio",
        "reason": "audio_missing",
        "detail": "no such file",
        "path": "x.wav",
    }
    (folder / "set" / "rejects.jsonl").write_text("".join(json.dumps({**reject, "row": n}) + "\n" for n in range(5)))
    return folder / "set"


def write_columns(folder: Path, samples: list) -> None:
    (folder / "columns.npy").write_bytes(write_npy(columns_of([columns_row(sample.facts) for sample in samples])))


@pytest.fixture(scope="module")
def page(data: Path, tiny_dir: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    done = run("report", data, out, "--config", tiny_dir / "pipeline.toml", "--players", 5)
    assert done.exit_code == 0, done.output
    return out


def test_the_page_asks_nobody_for_anything(page: Path):
    text = page.read_text()
    assert f'content="{POLICY}"' in text
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']{0,40})", text)
    assert sources
    assert all(source.startswith(("data:audio/mpeg;base64,", "data:image/png;base64,")) for source in sources)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp", text)


def test_the_page_tells_all_that_it_should(page: Path):
    text = page.read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert text.count("no such file") >= 3  # the first three of five rejects
    assert "min_chars_per_s 2" in text  # a limit, drawn into its histogram
    assert '<bdi dir="rtl">' in text
    for word in ("entropy, bits", "audio_missing", "target_noisy", "digest: ", "codec: ", "inspect-shards report"):
        assert word in text


def test_recordings_that_are_gone_or_changed_are_said_to_be(page: Path):
    listened = page.read_text().split("<h2>Listen")[1].split("<h2>Codes")[0]
    assert "gone-" in listened
    assert "reference.wav" in listened
    rows = listened.split("<tr>")[2:]
    assert len(rows) == 5
    for row in rows:
        assert row.count("<audio") == (3 if "id-0<" in row else 2)  # codes always, a file where it is what was encoded
        assert ("was changed since" in row) == ("id-1<" in row)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_opens_in_chromium(page: Path, tmp_path: Path):
    """Players know their length, a heading sorts, a word filters, a phone shows all, and nothing leaves the page."""

    async def look() -> None:
        async with opened(page.as_uri(), tmp_path / "profile") as shown:
            players = "[...document.querySelectorAll('audio')]"
            await shown.until(f"{players}.every(player => player.duration > 0)")
            lengths = await shown.value(f"{players}.map(player => player.duration)")
            assert len(lengths) >= 10
            assert all(0.9 <= length < 3 for length in lengths)
            sorting = "document.querySelectorAll('#samples th')[3]"
            await shown.value(f"{sorting}.click()")
            assert await shown.value(f"{sorting}.getAttribute('aria-sort')") == "descending"
            field = "document.querySelector('[data-filter=samples]')"
            await shown.value(f"{field}.value = 'speaker-1'; {field}.dispatchEvent(new Event('input'))")
            await shown.until("document.querySelector('#samples-count').textContent === '3 of 8'")
            await shown.send(
                "Emulation.setDeviceMetricsOverride", width=420, height=900, deviceScaleFactor=1, mobile=True
            )
            await shown.until("document.documentElement.clientWidth === 420")
            assert await shown.value("document.documentElement.scrollWidth") == 420
            right = f"Math.max(...{players}.map(player => player.getBoundingClientRect().right))"
            assert await shown.value(right) <= 420, "a player that has to be scrolled to"
            assert [address for address in shown.asked if not address.startswith("data:")] == [page.as_uri()]
            assert shown.faults == []

    asyncio.run(look())


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_colours_of_a_chart_are_not_those_of_bars(tmp_path: Path):
    """A style sheet wins over `fill`: the background of curves was blue, and their legend could not be seen."""
    bars, curves = svg_bars("bars", {"a": 1.0}, "x"), line_chart("curves", {"one": [(0, 1), (6, 2)]})
    script = "document.title=[...document.querySelectorAll('rect')].map(r=>getComputedStyle(r).fill).join(';')"
    (tmp_path / "page.html").write_text(page_of("t", bars + curves, script))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>(rgb.*?)</title>", dom)
    assert found
    fills = found[1].split(";")
    assert fills[:2] == ["rgb(76, 120, 184)", "rgb(255, 255, 255)"]
    assert fills[2] not in fills[:2]


def test_without_the_codec_the_page_says_why(data: Path, tiny_dir: Path, tmp_path: Path):
    other = shutil.copytree(tiny_dir / "codec", tmp_path / "codec")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    done = run("report", data, tmp_path / "r.html", "--set", f"model.codec={other}", "--players", 2)
    assert done.exit_code == 0, done.output
    assert "nothing is decoded from the codes: the codes were made with codec" in done.stderr
    assert "Nothing is decoded from the codes" in (tmp_path / "r.html").read_text()


def test_a_damaged_set_still_has_a_page_of_the_rest(data: Path, tiny_dir: Path, tmp_path: Path):
    copy = shutil.copytree(data, tmp_path / "copy")
    flip_payload(copy, 4)
    done = run("report", copy, tmp_path / "r.html", "--players", 0, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["codes"]["samples"], facts["codes"]["not_readable"]) == (7, 1)
    assert "1 of 8 samples that were drawn are not readable" in " ".join(facts["readiness"]["warnings"])


@pytest.mark.parametrize("command", ["summary", "report"])
def test_damaged_records_are_one_line(data: Path, tmp_path: Path, command: str):
    arguments = [tmp_path / "r.html"] if command == "report" else []
    assert run(command, tmp_path / "nothing", *arguments).exit_code == 1
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "columns.npy").write_bytes(b"no columns")
    done = run(command, copy, *arguments)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "columns.npy" in done.stderr
    assert not (tmp_path / "r.html").exists()
    assert run(command, data, *arguments, "--no-such-option").exit_code == 2
    assert run(command, data, *arguments, "--run", tmp_path).exit_code == 1
    (copy / "columns.npy").unlink()
    (copy / "rejects.jsonl").write_bytes(b'{"row": "x"}\n')
    assert run(command, copy, *arguments).exit_code == (1 if command == "report" else 0)


def test_the_summary_counts_what_the_samples_hold(data: Path):
    done = run("summary", data, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert sum(facts["histograms"]["chars_per_s"]["counts"]) == 8
    assert facts["text"] == {
        "arabic_letters": 1.0, "latin_letters": 0.0, "texts_diacritised": 0.0, "texts_with_digits": 0.0, "texts_with_latin": 0.0
    }  # fmt: skip
    shown = run("summary", data)
    assert "----- min_chars_per_s" in shown.stdout
    assert "READINESS" in shown.stdout
    assert "expected hours" in shown.stdout
    assert "unknown" in shown.stdout


def test_a_set_without_columns_is_read_instead(data: Path, tmp_path: Path):
    copy = shutil.copytree(data, tmp_path / "copy")
    with_columns = json.loads(run("summary", data, "--json").stdout)
    (copy / "columns.npy").unlink()
    without = json.loads(run("summary", copy, "--json").stdout)
    assert without["histograms"] == with_columns["histograms"]
    assert without["text"] == with_columns["text"]


def test_codes_are_counted_per_codebook(make_dataset, make_sample, tmp_path: Path):
    sample = make_sample(0, 9, 100)
    codes = sample.target_codes.copy()
    codes[0], codes[1] = 7, np.tile([1, 2], 50)
    folder = make_dataset(tmp_path / "set", [dataclasses.replace(sample, target_codes=codes)])
    facts = code_figures(open_data(str(folder)))
    assert facts["entropy_bits"][:2] == [0.0, 1.0]
    assert facts["never_used"][:2] == [1023, 1022]
    assert facts["repeats"][:2] == [1.0, 0.0]


def test_an_empty_set_has_a_summary_and_a_page(make_dataset, tmp_path: Path):
    folder = make_dataset(tmp_path / "empty", [])
    for arguments in (
        ["summary", folder],
        ["summary", folder, "--json"],
        ["report", folder, tmp_path / "r.html", "--players", 0],
    ):
        done = run(*arguments)
        assert done.exit_code == 0, done.output
    data = open_data(str(folder))
    assert text_shares(dataset_columns(data).table) == {}
    assert histograms(data.record, data.index, dataset_columns(data))["target_seconds"].counts == [0]


@pytest.mark.parametrize("values", [[3.0], [1.0, 1.0], [0.0, 5.0], list(range(100))])
def test_a_histogram_loses_no_value_and_draws_its_limits(values: list[float]):
    part = histogram("t", "s", np.array(values), {"min": 0.5, "far": 1e9})
    assert sum(part.counts) == len(values)
    lines = list(histogram_lines(msgspec.to_builtins(part)))
    assert sum(int(line.split()[-1]) for line in lines[1:] if "-----" not in line) == len(values)
    assert sum("-----" in line for line in lines) == 2


def test_a_rate_is_told_only_where_one_was_measured(data: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    line = json.dumps({"step": 1, "metrics/tokens_per_second": 1000.0})
    (run_dir / "metrics.jsonl").write_text(f"{line}\n{line}\n")
    facts = json.loads(run("summary", data, "--json", "--run", run_dir).stdout)["readiness"]
    assert facts["expected_hours"] == pytest.approx(facts["steps"] * facts["tokens_per_step"] / 1000 / 3600, abs=0.01)
    assert facts["measured_on"] == "an unknown device"
    write_json(run_dir / "environment.json", {"device": "NVIDIA H100", "ranks": 2})
    facts = json.loads(run("summary", data, "--json", "--run", run_dir).stdout)["readiness"]
    assert (facts["tokens_per_second"], facts["measured_on"]) == (1000.0, "2 x NVIDIA H100")
    facts = json.loads(run("summary", data, "--json").stdout)["readiness"]
    assert facts["expected_hours"].startswith("unknown: no rate was measured")
    assert (facts["tokens_per_second"], facts["measured_on"]) == ("unknown", "nothing")
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")  # stopped before the first rate
    facts = json.loads(run("summary", data, "--json", "--run", run_dir).stdout)["readiness"]
    assert facts["expected_hours"].startswith("unknown")


def test_reports_name_their_issue_and_say_what_is_estimated():
    for report in ELSEWHERE:
        assert ("estimated" in str(report)) == bool(report.clips)
        assert re.search(r"issue \d+$|v1\.2$", report.where), report
    assert "anhnh2002/XTTSv2-Finetuning-for-New-Languages issue 28" in " ".join(nearest(900))
    assert "about 15 h (estimated of 10,000 clips)" in " ".join(nearest(15))


def test_suggestions_grow_with_the_data():
    section = TrainSection()
    small, large = suggestion(2, 3, 10**6, section), suggestion(500, 300, 10**9, section)
    assert small["packs_per_step"] < large["packs_per_step"] == section.packs_per_step
    assert small["learning_rate"] < large["learning_rate"]
    assert small["steps"] == 300 < large["steps"]
    assert "viterbox" in " ".join(nearest(60))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.5, 6.56), (-22.98, -12.31), (10.25, 10.5), (0, 10.5), (3, 3.0), (1e-6, 2e-6), (0, 9e8)]
)
def test_ticks_are_round_and_lie_inside(low: float, high: float):
    ticks = round_ticks(low, high)
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert len(ticks) <= 10
    if high > low:
        assert len(ticks) >= 3
        assert len({f"{tick:g}" for tick in ticks}) == len(ticks)
