"""The page of `serve` in a real browser: both languages and directions, from an upload to sound with a duration."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, opened
from speech_server import CLIP, CLIP_TEXT, SpeechServer

PAGE = Path("tools/serve/page")
CONTROLS = {"button", "link", "textbox", "combobox", "checkbox", "image", "Audio", "DisclosureTriangle", "slider"}
WORDS = {
    "en": ("ltr", "Speak", "Ready", "No voice yet: add one", "The voice is stored", "Done"),
    "ar": ("rtl", "انطق", "جاهز", "لا يوجد صوت بعد: أضف صوتا", "حفظ الصوت", "انتهى"),
}


def labels(script: str, language: str) -> set[str]:
    begin = script.index(f"  {language}: {{")
    return set(re.findall(r"(\w+): \"", script[begin : script.index("\n  },", begin)]))


def test_every_label_is_there_in_both_languages(repository):
    script, page = ((repository / PAGE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("js", "html"))
    used = set(re.findall(r'data-label="(\w+)"', page)) | set(re.findall(r'label\("(\w+)"\)', script))
    assert labels(script, "en") == labels(script, "ar") >= used
    fields = set(re.findall(r"<(?:input|select|textarea)[^>]* id=\"([\w-]+)\"", page)) - {"consent"}
    assert fields <= set(re.findall(r'<label for="([\w-]+)"', page)), "a field without its label"


def test_no_resource_of_the_page_is_external(repository):
    for file in (repository / PAGE).iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"(?:https?:)?//[a-z0-9]", re.sub(r"(?m)//\s.*$", "", text)), file.name
        assert "innerHTML" not in text, "texts of requests are never markup"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("language", ["en", "ar"])
def test_upload_and_speak_in_a_browser(tiny_speaker, tmp_path, language):
    """Pictures go to $SERVE_PICTURES, where it is set, to be looked at."""
    with SpeechServer(tiny_speaker, tmp_path / "voices", has_voice=False, max_speech_s=2.0) as server:
        asyncio.run(use(server, tmp_path, language))


async def use(server: SpeechServer, folder: Path, language: str) -> None:
    direction, speak, _, lacking, stored, done = WORDS[language]
    async with opened(f"{server.url}/?lang={language}", folder / "profile") as page:
        await page.until(f"document.getElementById('state').textContent === {lacking!r}")
        assert await page.value("getComputedStyle(document.body).direction") == direction
        assert await page.value("document.documentElement.lang") == language
        assert await page.value("document.getElementById('say').textContent") == speak
        await picture(page, f"{language}-empty.png")
        await page.choose_file("#file", CLIP)
        await fill(page, "ref-text", CLIP_TEXT)
        await fill(page, "name", "سلمى")
        await page.value("document.getElementById('consent').click()")
        await page.value("document.querySelector('#upload button[type=submit]').click()")
        await page.until(f"document.getElementById('state').textContent === {stored!r}")
        assert [one.name for one in server.service.voices.all()] == ["سلمى"]
        assert await page.value("document.activeElement.id") == "text"
        await fill(page, "text", "هل تعرف الطريق إلى محطة الحافلات؟")
        assert await page.value("getComputedStyle(document.getElementById('text')).direction") == "rtl"
        for _ in range(3):  # format, seed, then the button: by keyboard alone
            await page.key("Tab")
        assert await page.value("document.activeElement.id") == "say"
        await page.value("document.activeElement.click()")
        await page.until(f"document.getElementById('state').textContent === {done!r}")
        await page.until("document.getElementById('player').duration > 0.2")
        assert await page.value("document.querySelectorAll('#takes li').length") == 1
        assert await page.value("document.querySelectorAll('#timing dd').length") == 4
        is_drawn = (
            "document.getElementById({!r}).getContext('2d').getImageData(0, 0, 960, 120).data.some((value) => value)"
        )
        assert await page.value(is_drawn.format("wave"))
        assert await page.value(is_drawn.format("mel"))
        assert await page.value("document.getElementById('message').textContent") == ""
        await picture(page, f"{language}-spoken.png")
        await page.value("document.getElementById('language').click()")
        assert await page.value("getComputedStyle(document.body).direction") != direction
        assert await page.value("document.documentElement.scrollWidth <= innerWidth")
        lacking = [role for role, name in await page.spoken_tree() if role in CONTROLS and not name.strip()]
        assert lacking == [], "controls without a name"
        await page.send("Emulation.setDeviceMetricsOverride", width=340, height=900, deviceScaleFactor=1, mobile=True)
        await page.value("document.getElementById('new-voice').open = true")
        assert await page.value("document.documentElement.scrollWidth <= innerWidth"), "a telephone scrolls sideways"
        foreign = [one for one in page.asked if not one.startswith((server.url, "data:", "blob:", "about:"))]
        assert foreign == []
        assert page.faults == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_recording_by_microphone_becomes_a_voice(tiny_speaker, tmp_path):
    """Chromium's own microphone beeps; all by keyboard, in the order of the page, and what is lacking is shown in its place."""
    flags = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")

    async def use_microphone(server: SpeechServer) -> None:
        async with opened(f"{server.url}/?lang=en", tmp_path / "profile", flags=flags) as page:
            await page.until("document.getElementById('state').textContent === 'No voice yet: add one'")
            order = []
            for _ in range(9):
                await page.key("Tab")
                order.append(await page.value("document.activeElement.id || document.activeElement.className"))
            assert order[:2] == ["skip", "language"]
            # One stop each, but for the buttons without an id: the summary of the form and its last button.
            assert [one for one in order if one] == [
                "skip",
                "language",
                "file",
                "record",
                "ref-text",
                "name",
                "consent",
            ]
            await page.key("Enter")
            lacking = "document.getElementById('upload-message').textContent"
            await page.until(f"{lacking} === 'Choose a recording or make one'")
            await page.value("document.getElementById('record').click()")
            await page.until("document.getElementById('record').getAttribute('aria-pressed') === 'true'")
            await asyncio.sleep(2.5)
            await page.value("document.getElementById('record').click()")
            await page.until("document.getElementById('sample').duration > 1")
            await fill(page, "name", "المجهر")
            send = "document.querySelector('#upload button[type=submit]').click()"
            await page.value(send)
            await page.until(f"{lacking} === 'The person who is heard must agree'")
            await page.value("document.getElementById('consent').click()")
            await page.value(send)
            await page.until("document.getElementById('state').textContent === 'The voice is stored'")
            assert await page.value(lacking) == ""
            (voice,) = server.service.voices.all()
            assert voice.name == "المجهر"
            assert 1 < voice.duration_s < 30
            assert page.faults == []

    with SpeechServer(tiny_speaker, tmp_path / "voices", has_voice=False) as server:
        server.wait(lambda: server.queue.state == "ready")
        asyncio.run(use_microphone(server))


async def fill(page: Page, name: str, text: str) -> None:
    await page.value(f"document.getElementById({name!r}).value = {text!r}")


async def picture(page: Page, name: str) -> None:
    if folder := os.environ.get("SERVE_PICTURES"):
        await page.picture(Path(folder) / name)
