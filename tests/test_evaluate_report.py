"""The report and the blind page: one file each, no request, hostile text harmless, sound that plays."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tools.evaluate.report import write_report
from tools.evaluate.request import Request
from tools.evaluate.run import evaluate
from tools.evaluate.systems import read_evaluate_config
from tools.web_page.page import POLICY, arabic
from train.model.generate import Sampling

HOSTILE = 'نص "><script>alert(1)</script> \u202e http://evil.example/x.png'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of another system's waves, one of them missing, with a speaker and a text that mean harm."""
    folder = tmp_path_factory.mktemp("report")
    tones = np.random.default_rng(0).normal(0, 0.1, (6, 12000)).astype(np.float32)
    lines = []
    for number in range(3):
        for name, wave in (("p", tones[number]), ("real", tones[number + 3]), ("mine", tones[number])):
            path = folder / name / f"{number}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, wave, 24000)
        lines.append(f"{number}|نص|{folder}/p/{number}.wav|{HOSTILE if number else 'مرحبا'}|{folder}/real/{number}.wav")
    (folder / "mine" / "2.wav").unlink()
    (folder / "list.lst").write_text("\n".join(lines))
    request = Request(
        data=folder / "list.lst", out=folder / "out", wave_folders=[("mine", folder / "mine")], with_base=False
    )
    results, rows, plan = evaluate(request, read_evaluate_config(None, (), ()), Sampling())
    write_report(folder / "out", results, rows, plan, 3)
    return folder / "out"


@pytest.mark.parametrize("name", ["report.html", "blind.html"])
def test_a_page_asks_nobody_for_anything(pages: Path, name: str):
    text = (pages / name).read_text()
    assert f'content="{POLICY}"' in text
    assert "default-src 'none'" in POLICY
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']([^\"']{0,40})", text)
    assert sources
    assert all(source.startswith("data:audio/mpeg;base64,") for source in sources)
    assert "@import" not in text
    assert "url(" not in text


@pytest.mark.parametrize("name", ["report.html", "blind.html"])
def test_hostile_texts_are_shown_and_do_nothing(pages: Path, name: str):
    text = (pages / name).read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "\u202e" not in text


def test_arabic_runs_from_right_to_left(pages: Path):
    assert '<bdi dir="rtl">مرحبا</bdi>' in (pages / "report.html").read_text()
    assert arabic("hello").startswith('<bdi dir="auto">')


def test_the_worst_stands_first_and_says_why(pages: Path):
    text = (pages / "report.html").read_text()
    table = text.split("Worst first")[1].split("By speaker")[0]
    assert "missing" in table.split("<tr>")[2]
    assert "2.wav: no such file" in table
    assert table.count("<audio") == 3 + 3 + 2


def test_the_blind_page_names_nobody_to_the_listener(pages: Path):
    text = (pages / "blind.html").read_text()
    shown, hidden = text.split('<script type="application/json" id="key">')
    key: dict[str, Any] = json.loads(hidden.split("</script>")[0])
    assert [sorted((pair["a"], pair["b"])) for pair in key["pairs"]] == [["mine", "real"]] * 2
    assert "mine</" not in shown.split("<body>")[1]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_the_report_opens_in_chromium(pages: Path, tmp_path: Path):
    """Players know their length after the page has run, and a click sorts."""
    source = (pages / "report.html").read_text()
    clicked = tmp_path / "clicked.html"
    clicked.write_text(source.replace("</body>", "<script>document.querySelectorAll('th')[1].click()</script></body>"))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", clicked.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    lengths = [float(found) for found in re.findall(r'class="seconds">([0-9.]+) s<', dom)]
    assert len(lengths) == 8
    assert all(0.5 <= length < 0.7 for length in lengths)  # MP3 frames pad the half second
    assert 'aria-sort="descending"' in dom
