"""What `bench serve` measures: requests a second, time to the first sound and to the last, against concurrency.

In: a model and a recording. Out: a table and JSON. The server is the real application on a loopback socket, with its clients as
threads of the same process, which costs both of them some of the interpreter's time; beside it the same texts are said one
after the other as `speak` says them. Speech is cut at a given length, so that every request is the same work.
"""

from __future__ import annotations

import http.client
import json
import math
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import PipelineError
from shards.sequence import SAMPLE_RATE
from shards.terminal import print_line, print_table

if TYPE_CHECKING:
    from tools.speaker import Speaker

TEXT = "هل تعرف الطريق إلى محطة الحافلات؟ نعم، هي خلف الجسر الجديد الذي يربط ضفتي النهر."
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Settings:
    reference: str
    reference_text: str
    concurrency: list[int]
    requests: int  # at every concurrency
    seconds: float  # of every speech
    slots: int


def bench(speaker: Speaker, settings: Settings, out: Path) -> dict[str, Any]:
    """Measure everything, print the table, write the JSON file."""
    from shards.writer import write_json

    figures: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "device": str(speaker.model.audio_lm_head.weight.device),
        "settings": dict(settings.__dict__),
        "speak": said_in_a_loop(speaker, settings),
    }
    with tempfile.TemporaryDirectory() as folder, served(speaker, settings, Path(folder)) as port:
        ask(port, settings, 0)  # not timed
        figures["serve"] = [asked_at_once(port, settings, number) for number in settings.concurrency]
    write_json(out, figures)
    print_figures(figures, out)
    return figures


def said_in_a_loop(speaker: Speaker, settings: Settings) -> dict[str, float]:
    """One text after the other in one slot."""
    from tools.inference import HiggsAudioInference

    voice = HiggsAudioInference.of(speaker)

    def say(seed: int) -> tuple[float, float]:
        begun = time.monotonic()
        speech = voice.generate_speech(
            settings.reference, TEXT, settings.reference_text, seed=seed, max_seconds=settings.seconds
        )
        return time.monotonic() - begun, len(speech.waveform) / SAMPLE_RATE

    say(0)  # not timed: loads kernels, encodes the reference
    took = [say(number + 1) for number in range(settings.requests)]
    return summary([seconds for seconds, _ in took], sum(audio_s for _, audio_s in took), sum(one for one, _ in took))


@contextmanager
def served(speaker: Speaker, settings: Settings, folder: Path) -> Iterator[int]:
    """A server with one voice; gives its port."""
    import asyncio

    from tools.serve.app import make_app
    from tools.serve.guard import Rules
    from tools.serve.server import address_of, listen, make_server
    from tools.serve.service import Service
    from tools.serve.speech_queue import SpeechQueue
    from tools.serve.voice_store import VoiceStore, new_facts

    queue = SpeechQueue(lambda: speaker, settings.slots, max(settings.concurrency))
    voices = VoiceStore(folder)
    app = make_app(Service(queue, voices), Rules())
    recording = Path(settings.reference).read_bytes()
    from tools.reference import read_recordings

    audio = read_recordings([recording])[0]
    reference = speaker.reference([audio], settings.reference_text)
    given = {"consent": "bench", "ref_text": settings.reference_text, "speaker_description": "", "mime_type": ""}
    facts = new_facts("bench", audio, **given, file_size=len(recording), codec=voices.probe(speaker))
    voices.add(facts, recording, reference.codes, reference)
    listener = listen("127.0.0.1", 0)
    server = make_server(app, queue, 10.0, address_of(listener))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    queue.start()
    thread.start()
    try:
        while queue.state == "loading":
            time.sleep(0.05)
        if queue.fault is not None:
            raise PipelineError(f"the model failed: {queue.fault}")
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        queue.end()


def asked_at_once(port: int, settings: Settings, concurrency: int) -> dict[str, float]:
    """`requests` streams, so many at a time."""
    begun = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool:
        took = list(pool.map(lambda seed: ask(port, settings, seed), range(1, settings.requests + 1)))
    whole_s = time.monotonic() - begun
    audio_s = sum(seconds for _, _, seconds in took)
    first = sorted(one for one, _, _ in took)
    return {
        "concurrency": concurrency,
        **summary([last for _, last, _ in took], audio_s, whole_s),
        "first_sound_p50_s": statistics.median(first),
        "first_sound_p95_s": percentile(first, 0.95),
    }


def ask(port: int, settings: Settings, seed: int) -> tuple[float, float, float]:
    """(seconds to the first sound, to the last, seconds of speech). Raises PipelineError for another status."""
    body = {"input": TEXT, "response_format": "pcm", "stream": True, "max_seconds": settings.seconds, "seed": seed}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    begun = time.monotonic()
    try:
        connection.request("POST", "/v1/audio/speech", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise PipelineError(f"the server answered {answer.status}: {answer.read()[:200]!r}")
        num_bytes = len(answer.read1(1 << 16))
        first_s = time.monotonic() - begun
        while piece := answer.read1(1 << 16):
            num_bytes += len(piece)
    finally:
        connection.close()
    return first_s, time.monotonic() - begun, num_bytes / 2 / SAMPLE_RATE


def percentile(ordered: list[float], share: float) -> float:
    """The smallest of them that so many do not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1]


def summary(took: list[float], audio_s: float, whole_s: float) -> dict[str, float]:
    ordered = sorted(took)
    return {
        "requests_per_s": len(took) / whole_s,
        "audio_s_per_s": audio_s / whole_s,
        "p50_s": statistics.median(ordered),
        "p95_s": percentile(ordered, 0.95),
    }


def print_figures(figures: dict[str, Any], out: Path) -> None:
    def row(name: str, one: dict[str, float]) -> tuple[str, ...]:
        keys = ("requests_per_s", "audio_s_per_s", "first_sound_p50_s", "first_sound_p95_s", "p50_s", "p95_s")
        return name, *(f"{one[key]:.3g}" if key in one else "-" for key in keys)

    rows = [row("speak in a loop", figures["speak"])]
    rows += [row(f"serve, {one['concurrency']} at once", one) for one in figures["serve"]]
    headings = ("", "requests/s", "audio s/s", "first p50 s", "first p95 s", "p50 s", "p95 s")
    print_table(
        rows, headings=headings, width=100, title=f"on {figures['device']}, {figures['settings']['slots']} slots"
    )
    print_line(f"written to {out}")
