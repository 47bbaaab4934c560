"""The report and the blind page: one file each, no request, hostile text harmless, sound that plays."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from browser import CHROMIUM, Page, opened

from tools.evaluate.report import write_report
from tools.evaluate.request import Request
from tools.evaluate.run import evaluate
from tools.evaluate.systems import read_evaluate_config
from tools.web_page.page import POLICY, arabic
from train.model.generate import Sampling

HOSTILE = 'نص "><script>alert(1)</script> \u202e http://evil.example/x.png'


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


async def look_at_the_report(page: Page) -> None:
    await page.until(
        "document.readyState === 'complete' && [...document.querySelectorAll('audio')].every(a => a.duration)"
    )
    lengths = await page.value("[...document.querySelectorAll('audio')].map(a => a.duration)")
    assert len(lengths) == 8
    assert all(0.5 <= length < 0.7 for length in lengths)  # MP3 frames pad the half second
    await page.value("document.querySelectorAll('th')[1].click()")
    assert await page.value("document.querySelectorAll('th')[1].ariaSort") == "descending"
    systems = "document.querySelector('.wide')"
    assert await page.value(f"{systems}.scrollWidth > {systems}.clientWidth"), "it is wide here"
    assert await page.value("document.documentElement.scrollWidth <= innerWidth"), "but the page is not"
    left = "getBoundingClientRect().left"
    names = await page.value(f"({systems}.scrollLeft = 9999, {systems}.querySelector('td').{left} >= {systems}.{left})")
    assert names, "systems' names stay in sight while their figures are scrolled"


async def look_at_both_schemes(page: Page) -> None:
    colours = "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
    light = await page.value(colours)
    await page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = await page.value(colours)
    assert [brightness(colour) > 128 for colour in (*light, *dark)] == [False, True, True, False]


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


async def vote(page: Page, folder: Path) -> None:
    """A for the first pair, no difference for the second, and then B for the first after all."""
    await page.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    await page.value("document.getElementById('listener').value = 'سلمى'")
    for number, choice in ((0, "A"), (1, "no difference"), (0, "B")):
        await page.value(f"document.querySelector('#pair-{number} [data-choice=\"{choice}\"]').click()")
    assert await page.value("document.getElementById('count').textContent") == "2 of 2"
    assert await page.value("document.querySelector('#pair-0 .mine').textContent") == "your vote: B"
    await page.value("document.getElementById('download').click()")
    async with asyncio.timeout(30):
        while not (folder / "votes.json").is_file():
            await asyncio.sleep(0.05)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_the_pages_work_in_chromium_and_ask_for_nothing(pages: Path, tmp_path: Path):
    """Players know their length, tables sort and scroll, light and dark, votes are downloaded; no request leaves the pages."""

    async def look() -> None:
        async with opened((pages / "report.html").as_uri(), tmp_path / "profile", width=1300) as page:
            await look_at_the_report(page)
            await look_at_both_schemes(page)
            await page.send("Page.navigate", url=(pages / "blind.html").as_uri())
            await page.until("document.title === 'Blind comparison' && document.readyState === 'complete'")
            await vote(page, tmp_path)
            foreign = [one for one in page.asked if not one.startswith(("file:", "data:", "blob:"))]
            assert (foreign, page.faults) == ([], [])

    asyncio.run(look())
    found = json.loads((tmp_path / "votes.json").read_text())
    key = json.loads((pages / "blind.html").read_text().split('id="key">')[1].split("</script>")[0])
    assert (found["listener"], found["question"]) == ("سلمى", key["question"])
    first, second = found["votes"]
    assert (first["vote"], first["preferred"]) == ("B", key["pairs"][0]["b"])
    assert (second["vote"], second["preferred"]) == ("no difference", "no difference")
    assert [{name: row[name] for name in ("item", "speaker", "a", "b")} for row in (first, second)] == key["pairs"]
