"""A headless Chromium by its debugging protocol: enough to fill in a page and to see what it shows and asks for."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-port=0 --no-first-run"
WITHIN_S = 60.0


class Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self._answers: dict[int, asyncio.Future] = {}
        self.asked: list[str] = []  # addresses
        self.faults: list[str] = []  # of scripts
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            value = json.loads(message.data)
            if value.get("id") in self._answers:
                self._answers.pop(value["id"]).set_result(value)
            elif value.get("method") == "Network.requestWillBeSent":
                self.asked.append(value["params"]["request"]["url"])
            elif value.get("method") == "Runtime.exceptionThrown" or (
                value.get("method") == "Log.entryAdded" and value["params"]["entry"]["level"] in ("error", "warning")
            ):
                self.faults.append(json.dumps(value["params"])[:500])

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        answer = await asyncio.wait_for(self._answers[number], WITHIN_S)
        assert "error" not in answer, answer
        return answer["result"]

    async def value(self, expression: str) -> Any:
        answer = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str) -> None:
        async with asyncio.timeout(WITHIN_S):
            while not await self.value(expression):
                await asyncio.sleep(0.05)

    async def spoken_tree(self) -> list[tuple[str, str]]:
        """(role, name) of what a screen reader is given."""
        nodes = (await self.send("Accessibility.getFullAXTree"))["nodes"]
        return [(one["role"]["value"], one.get("name", {}).get("value", "")) for one in nodes if not one["ignored"]]

    async def choose_file(self, selector: str, path: Path) -> None:
        root = (await self.send("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.send("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    async def key(self, name: str) -> None:
        code = {"Tab": 9, "Enter": 13}[name]
        text = {"text": "\r"} if name == "Enter" else {}  # without its text it presses no button
        await self.send(
            "Input.dispatchKeyEvent", type="keyDown", key=name, code=name, windowsVirtualKeyCode=code, **text
        )
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=name, code=name, windowsVirtualKeyCode=code)

    async def picture(self, path: Path) -> None:
        answer = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextlib.asynccontextmanager
async def opened(address: str, folder: Path, width: int = 1000, flags: tuple[str, ...] = ()) -> AsyncIterator[Page]:
    """A page in a browser of its own; `flags` are Chromium's."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        *FLAGS.split(),
        *flags,
        f"--user-data-dir={folder}",
        f"--window-size={width},1400",
        "about:blank",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = folder / "DevToolsActivePort"
        async with asyncio.timeout(WITHIN_S):
            while not (port.is_file() and port.read_text().strip()):
                assert process.poll() is None, "the browser did not start"
                await asyncio.sleep(0.05)
        number = port.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{number}/json/list") as answer:
                target = next(one for one in await answer.json() if one["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Network", "Runtime", "Log", "Page", "DOM"):
                    await page.send(f"{domain}.enable")
                await page.send("Page.navigate", url=address)
                await page.until("document.readyState === 'complete' && document.title !== ''")
                yield page
    finally:
        process.terminate()
        process.wait(WITHIN_S)
