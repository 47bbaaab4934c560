"""A speech server on 127.0.0.1 with the tiny model, in a thread of the test or as a process: real sockets, the real thing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

CLIP = Path(__file__).parent / "data" / "arabic-mini" / "spk_00_36.flac"
CLIP_TEXT = "الجسر الجديد يربط ضفتي النهر."
WITHIN_S = 60.0


@contextlib.contextmanager
def serve_process(
    tiny_dir: Path, repository: Path, voices: Path, *options: object
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`serve` as a process of its own that is ready and holds the voice salma: (process, its URL)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "import sys; sys.argv[0] = 'serve'; from tools.serve.cli import main; main()"
    given = [tiny_dir / "model", "--config", tiny_dir / "pipeline.toml", "--voices", voices, "--port", port, *options]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, given), "--device", "cpu"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=WITHIN_S, trust_env=False) as client:
            end = time.monotonic() + 2 * WITHIN_S
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.1)
            form = {"name": "salma", "consent": "yes", "ref_text": CLIP_TEXT}
            client.post("/v1/audio/voices", data=form, files={"audio_sample": CLIP.read_bytes()}).raise_for_status()
        yield process, url
    finally:
        process.kill()
        process.wait()


class SpeechServer:
    """Use it in a `with`. Settings are those of Service, Rules and Limits by name, and a `Patience`."""

    def __init__(
        self,
        speaker: Any,
        voices: Path,
        *,
        num_slots: int = 4,
        has_voice: bool = True,
        patience: Any = None,
        **given: Any,
    ) -> None:
        from tools.serve import speech_fields
        from tools.serve.app import make_app
        from tools.serve.guard import Rules
        from tools.serve.limits import Limits
        from tools.serve.server import make_server
        from tools.serve.service import Service
        from tools.serve.speech_queue import SpeechQueue
        from tools.serve.voice_store import VoiceStore

        # The random model draws an end before its first sound for one seed in 500.
        speech_fields.drawn_seed = itertools.cycle([3, 5]).__next__
        limits = Limits(**{name: given.pop(name) for name in list(given) if name in Limits.__dataclass_fields__})
        given_rules = {name: given.pop(name) for name in ("cors_origins", "hosts") if name in given}
        rules = Rules(given.get("api_key", ""), **given_rules, limits=limits)
        load = given.pop("load", lambda: speaker)
        self.queue = SpeechQueue(load, num_slots, limits.max_waiting)
        self.service = Service(self.queue, VoiceStore(voices, limits.max_voices), limits, **given)
        self.app = make_app(self.service, rules)
        self.key = rules.api_key
        self._has_voice = has_voice
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = make_server(self.app, self.queue, 10.0, self.url, patience)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._listener]))

    def __enter__(self) -> SpeechServer:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=WITHIN_S, trust_env=False)
        self.queue.start()
        self._thread.start()
        if self._has_voice:
            self.wait(lambda: self.queue.state == "ready")
            assert self.upload("salma").status_code == 200
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(WITHIN_S)
        self.queue.end()
        self._listener.close()
        self.service.voices.close()

    def wait(self, holds: Any, within_s: float = WITHIN_S) -> None:
        end = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < end, "it did not come to pass"
            time.sleep(0.01)

    def upload(self, name: str, data: bytes | None = None, **more: str) -> httpx.Response:
        fields = {"name": name, "consent": "recording-7", "ref_text": CLIP_TEXT, **more}
        sample = CLIP.read_bytes() if data is None else data
        return self.client.post(
            "/v1/audio/voices", data=fields, files={"audio_sample": ("a.flac", sample, "audio/flac")}
        )

    def speak(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/audio/speech", json=asked(**fields))


def asked(**fields: Any) -> dict[str, Any]:
    """A body; half a second of speech, unless it says otherwise."""
    return {"model": "tts-1", "input": "هل تعرف الطريق؟", "voice": "salma", "max_new_tokens": 12, "seed": 3, **fields}


def message_of(answer: httpx.Response) -> str:
    error = json.loads(answer.content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]
