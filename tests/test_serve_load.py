"""`serve` under load: many at once, clients that leave, memory, a model that loads or fails, and the end by a signal."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from speech_server import CLIP, CLIP_TEXT, WITHIN_S, SpeechServer, asked, message_of, serve_process

from shards.errors import CheckpointError


@pytest.fixture(scope="module")
def server(tiny_speaker, tmp_path_factory):
    with SpeechServer(tiny_speaker, tmp_path_factory.mktemp("voices"), max_waiting=16) as running:
        yield running


@pytest.fixture(autouse=True)
def all_slots_are_free_again(server):
    yield
    server.wait(lambda: server.queue.is_idle)
    assert server.queue._engine.num_free_slots == server.queue.num_slots or not server.queue._engine.has_work


def test_fifty_at_once_are_spoken_or_refused_with_429(server):
    alone = server.speak(response_format="pcm", seed=1).content

    def ask(_: int) -> httpx.Response:
        with httpx.Client(base_url=server.url, timeout=WITHIN_S, trust_env=False) as client:
            return client.post("/v1/audio/speech", json=asked(response_format="pcm", seed=1))

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    counts = Counter(one.status_code for one in answers)
    assert set(counts) <= {200, 429}
    assert counts[200] >= 20
    for one in answers:
        if one.status_code == 200:
            assert one.content == alone, "a request says the same alone and beside others"
        else:
            assert int(one.headers["retry-after"]) >= 1
            assert "queue is full" in message_of(one)


def test_clients_that_leave_half_way_lose_no_slot(server):
    """Leaving while waiting, while being spoken, in a stream, or before the request is whole."""
    body = httpx.Request("POST", server.url, json=asked(max_new_tokens=250, input="نص " * 60)).content
    stream = httpx.Request("POST", server.url, json=asked(max_new_tokens=250, input="نص " * 60, stream=True)).content
    host, port = server.url.removeprefix("http://").split(":")
    for number in range(24):
        content = (body, stream)[number % 2]
        head = (
            f"POST /v1/audio/speech HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        )
        with socket.create_connection((host, int(port))) as client:
            sent = head + content
            client.sendall(sent[: len(sent) // 2] if number % 8 == 7 else sent)
            if number % 4 == 1:
                client.settimeout(WITHIN_S)
                client.recv(1)
            elif number % 4 == 2:
                time.sleep(0.05)
    server.wait(lambda: server.queue.is_idle)
    assert server.speak().status_code == 200
    ended = server.service.metrics.value("speech_total", ended="left")
    assert ended >= 15


def test_a_full_queue_of_one_refuses_the_third(tiny_speaker, tmp_path):
    with SpeechServer(tiny_speaker, tmp_path / "voices", num_slots=1, max_waiting=1) as server:
        long = asked(max_new_tokens=200, input="نص " * 60)
        with server.client.stream("POST", "/v1/audio/speech", json=long | {"stream": True}):
            second = threading.Thread(target=lambda: server.client.post("/v1/audio/speech", json=asked()))
            second.start()
            server.wait(lambda: server.service.metrics.value("waiting") == 1)
            third = server.speak()
            assert third.status_code == 429
        second.join(WITHIN_S)
        server.wait(lambda: server.queue.is_idle)


@pytest.mark.parametrize(
    ("first", "more"), [(20, 40), pytest.param(100, 400, marks=pytest.mark.long)], ids=["60", "500"]
)
def test_memory_is_flat_over_hundreds_of_requests(server, first, more):
    """Whole and streamed, every format, voices stored and deleted; the first requests fill caches."""
    formats = ("mp3", "wav", "flac", "opus", "pcm")

    def ask(number: int) -> int:
        stream = {"stream": True} if number % 2 else {}
        fields = asked(max_new_tokens=2, response_format=formats[number % 5], **stream)
        if number % 10 == 0:
            assert server.upload(f"voice {number}").status_code == 200
            assert server.client.delete(f"/v1/audio/voices/voice {number}").status_code == 200
        return server.client.post("/v1/audio/speech", json=fields).status_code

    with ThreadPoolExecutor(4) as pool:
        begun = list(pool.map(ask, range(first)))
        settled = server.service.metrics.value("resident_memory_bytes")
        rest = list(pool.map(ask, range(first, first + more)))
    assert Counter(begun + rest) == {200: first + more}
    assert server.service.metrics.value("resident_memory_bytes") - settled < 48e6


def test_health_says_503_until_the_model_is_warm(tiny_speaker, tmp_path):
    may_load = threading.Event()

    def load():
        may_load.wait(WITHIN_S)
        return tiny_speaker

    with SpeechServer(tiny_speaker, tmp_path / "voices", has_voice=False, load=load) as server:
        assert server.client.get("/health").json() == {"status": "loading"}
        assert server.client.get("/health").status_code == 503
        early = server.speak()
        assert (early.status_code, early.headers["retry-after"]) == (503, "5")
        may_load.set()
        server.wait(lambda: server.client.get("/health").status_code == 200)


def test_a_fault_of_the_model_is_reported_and_not_spread(server, monkeypatch):
    real = server.queue._engine.advance
    faults = iter([RuntimeError("out of memory at 0x7f"), None])

    def advance():
        if fault := next(faults, None):
            raise fault
        return real()

    monkeypatch.setattr(server.queue._engine, "advance", advance)
    failed = server.speak()
    assert failed.status_code == 500
    assert message_of(failed) == "the model has a fault: RuntimeError"
    assert server.speak().status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path):
    from tools.serve.app import make_app
    from tools.serve.guard import Rules
    from tools.serve.server import listen, run_server
    from tools.serve.service import Service
    from tools.serve.speech_queue import SpeechQueue
    from tools.serve.voice_store import VoiceStore

    def load():
        raise CheckpointError("no model here")

    queue = SpeechQueue(load, 1, 1)
    app = make_app(Service(queue, VoiceStore(tmp_path)), Rules())
    with pytest.raises(CheckpointError, match="no model here"):
        run_server(app, queue, listen("127.0.0.1", 0), 1.0)


@pytest.mark.slow
def test_sigterm_under_load_leaves_nobody_without_an_answer(tiny_dir, repository, tmp_path):
    """A process of its own with two slots; 24 clients, some streaming, when the signal comes."""
    with serve_process(tiny_dir, repository, tmp_path / "voices", "--slots", 2) as (process, url):
        asking = threading.Barrier(25)

        def ask(number: int) -> int | str:
            body = asked(max_new_tokens=20, response_format="wav", **({"stream": True} if number % 2 else {}))
            with httpx.Client(base_url=url, timeout=WITHIN_S, trust_env=False) as client:
                client.get("/health")
                asking.wait(WITHIN_S)
                answer = client.post("/v1/audio/speech", json=body)
                if answer.status_code == 200:
                    assert len(answer.content) > 1000
                return answer.status_code

        with ThreadPoolExecutor(24) as pool:
            answers = [pool.submit(ask, number) for number in range(24)]
            asking.wait(WITHIN_S)
            while not any(one.done() for one in answers):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            counts = Counter(one.result(WITHIN_S) for one in answers)
        assert set(counts) <= {200, 503}, counts
        assert counts[200] >= 2
        assert process.wait(WITHIN_S) == 0
        assert process.stderr is not None
        log = process.stderr.read()
        assert "serving at http://127.0.0.1:" in log
        assert "Traceback" not in log
        assert asked()["input"][:6] not in log


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--default-voice", "huda"], 2, "--default-voice 'huda': not stored"),
        (["--cors-origin", "*"], 2, "--cors-origin '*': expected scheme://host"),
        (["--api-key-file", "nowhere"], 1, "nowhere: No such file"),
        (["--api-key-file", "short"], 2, "the API key: expected 8 or more"),
        (["--slots", "0"], 2, "--slots"),
        (["--voices", "short"], 2, "--voices short: File exists"),
        (["--port", "TAKEN"], 1, "Address already in use"),
    ],
)
def test_mistakes_in_the_command_are_one_line(tiny_dir, tmp_path, monkeypatch, options, status, message):
    from click.testing import CliRunner

    from tools.serve import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "begin_logs", lambda: None)
    (tmp_path / "short").write_text("short")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [str(taken.getsockname()[1]) if one == "TAKEN" else one for one in options]
        result = CliRunner().invoke(cli.main, [str(tiny_dir / "model"), *given])
    assert result.exit_code == status, result.output
    assert message in result.stderr


def test_bench_serve_stores_every_figure(tiny_speaker, tmp_path, capsys):
    from tools.bench.serve import Settings, bench

    figures = bench(tiny_speaker, Settings(str(CLIP), CLIP_TEXT, [1, 2], 2, 0.2, 2), tmp_path / "figures.json")
    assert [one["concurrency"] for one in figures["serve"]] == [1, 2]
    for one in figures["serve"]:
        assert 0 < one["first_sound_p50_s"] <= one["p95_s"]
        assert one["audio_s_per_s"] == pytest.approx(0.2 * one["requests_per_s"])
    assert "requests/s" in capsys.readouterr().err
    assert (tmp_path / "figures.json").is_file()
