"""`serve`: clients that are slow, that leave or that pull on the model, and disks that are full: nobody else notices."""

from __future__ import annotations

import contextlib
import itertools
import resource
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from speech_server import CLIP, CLIP_TEXT, WITHIN_S, SpeechServer, asked, message_of

from tools.serve.connection import Patience
from tools.serve.sound_formats import Encoder

LONG = {"max_new_tokens": 80, "input": "نص " * 60}


@pytest.fixture(scope="module")
def server(tiny_speaker, tmp_path_factory):
    """Without patience."""
    short = {"max_body_pause_s": 0.5, "max_body_s": 2.0, "patience": Patience(0.5, 1.0)}
    with SpeechServer(tiny_speaker, tmp_path_factory.mktemp("voices"), **short) as running:
        yield running


@pytest.fixture(autouse=True)
def the_next_one_is_served(server):
    yield
    server.wait(lambda: server.queue.is_idle)
    assert server.speak().status_code == 200
    assert server.queue.state == "ready"


def connected(server: SpeechServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    client.settimeout(WITHIN_S)
    return client


def head(length: int, path: str = "/v1/audio/speech", more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def all_of(client: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: client.recv(65536), b""))
    return b""


@pytest.mark.parametrize("begun", [b"", b"POST /v1/au", b"GET /he"], ids=["nothing", "first", "second"])
def test_a_head_that_never_ends_is_given_up(server, begun):
    """Nothing at all, half a head, half a second one on a connection that was good."""
    with connected(server) as client:
        if begun == b"GET /he":
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(begun)
        assert b"HTTP/1.1" not in all_of(client)


def test_a_head_that_comes_byte_by_byte_is_given_up(server):
    with connected(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(200):
                client.sendall(b"X: y\r\n")
                time.sleep(0.05)
            pytest.fail("the server has all the time in the world")


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/audio/voices", "/generate_speech"])
@pytest.mark.parametrize("pause_s", [60.0, 0.2], ids=["stops", "trickles"])
def test_a_body_that_does_not_come_is_a_408(server, path, pause_s):
    with connected(server) as client:
        client.sendall(head(10_000, path, "Content-Type: multipart/form-data; boundary=x\r\n") + b"--x\r\n")
        gone = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not gone.wait(pause_s):
                    client.sendall(b"a")

        thread = threading.Thread(target=trickle)
        thread.start()
        answer = all_of(client)
        gone.set()
        thread.join()
    assert answer.startswith(b"HTTP/1.1 408 "), answer
    assert b"slow_body" in answer


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/audio/voices", "/generate_speech"])
def test_a_client_that_leaves_in_its_body_is_no_fault(server, path):
    left = {"route": path, "status": "499"}
    before = server.service.metrics.value("requests_total", **left)
    with connected(server) as client:
        client.sendall(head(10_000, path, "Content-Type: multipart/form-data; boundary=x\r\n") + b"--x\r\n")
    server.wait(lambda: server.service.metrics.value("requests_total", **left) == before + 1)
    assert "500" not in "".join(key for _, key in server.service.metrics._counts)


def test_a_client_that_reads_nothing_is_given_up(server, monkeypatch):
    """Its speech is made, but neither the connection nor the bytes are kept for it."""
    from tools.serve import speech_answer

    class Large(Encoder):
        def feed(self, wave: np.ndarray) -> bytes:
            return bytes(8 << 20)

    monkeypatch.setattr(speech_answer, "Encoder", Large)
    content = server.client.build_request("POST", "/", json=asked(stream=True, response_format="pcm")).content
    connections = server._server.server_state.connections
    with connected(server) as client:
        mine = client.getsockname()[1]
        client.sendall(head(len(content)) + content)
        server.wait(lambda: any(one.client == ("127.0.0.1", mine) for one in connections))
        server.wait(lambda: not any(one.client == ("127.0.0.1", mine) for one in list(connections)))
        assert len(all_of(client)) < 8 << 20


@pytest.mark.parametrize("name", ["mp3", "flac", "opus"])
def test_an_encoder_is_not_closed_under_its_writer(name):
    """A client that leaves closes it while a thread still encodes; libsndfile would crash the process."""
    encoder, may_write, is_writing = Encoder(name), threading.Event(), threading.Event()
    real = encoder._sink.write

    def write(data):
        is_writing.set()
        may_write.wait(WITHIN_S)
        return real(data)

    encoder._sink.write = write
    feeding = threading.Thread(target=encoder.feed, args=(np.zeros(240_000, np.float32),))
    feeding.start()
    assert is_writing.wait(WITHIN_S)
    closing = threading.Thread(target=encoder.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    may_write.set()
    for thread in (feeding, closing):
        thread.join(WITHIN_S)
    assert encoder.feed(np.zeros(24_000, np.float32)) == b""


@pytest.mark.parametrize("name", ["mp3", "flac"])
def test_clients_that_leave_a_stream_do_not_end_the_server(server, name):
    for number in range(3):
        with server.client.stream(
            "POST", "/v1/audio/speech", json=asked(stream=True, response_format=name, **LONG)
        ) as answer:
            for _ in itertools.islice(answer.iter_raw(), number):
                pass


@pytest.mark.parametrize(
    "rules",
    [
        {"top_p": 1e-320},
        {"top_p": 1e-40},
        {"top_p": 5e-324, "top_k": 0},
        {"temperature": 1e-320},
        {"temperature": 1e-38, "top_p": 1e-45, "top_k": 1},
        {"temperature": 100, "top_k": 2**31 - 1, "ras_win_max_num_repeat": 2**31 - 1},
        {"seed": 2**63 - 1, "ras_win_len": 1000, "ras_win_max_num_repeat": 1},
    ],
    ids=str,
)
def test_no_setting_that_is_accepted_is_a_fault_of_the_model(server, rules):
    """A fault would end whoever is spoken beside it, and three of them the server."""
    beside = {}

    def other() -> None:
        beside["status"] = server.speak(max_new_tokens=40).status_code

    thread = threading.Thread(target=other)
    thread.start()
    answer = server.speak(**rules)
    thread.join(WITHIN_S)
    assert (answer.status_code, beside["status"]) == (200, 200), answer.text


def test_a_fault_of_ours_is_an_error_of_the_api(server, monkeypatch, caplog):
    """Not the web framework's plain text; the words of the fault stay in the log."""

    def all_of_them():
        raise ZeroDivisionError("a secret place")

    monkeypatch.setattr(server.service.voices, "all", all_of_them)
    answer = server.client.get("/v1/audio/voices")
    assert answer.status_code == 500
    assert message_of(answer) == "a fault of the server: ZeroDivisionError"
    monkeypatch.undo()


def test_a_voice_that_is_deleted_while_it_speaks_speaks_on(server):
    whole = server.speak(response_format="pcm", **LONG).content
    server.upload("huda")
    with server.client.stream(
        "POST", "/v1/audio/speech", json=asked(voice="huda", stream=True, response_format="pcm", **LONG)
    ) as answer:
        pieces = answer.iter_raw()
        first = next(pieces)
        assert server.client.delete("/v1/audio/voices/huda").status_code == 200
        rest = b"".join(pieces)
    assert len(first + rest) == len(whole)
    assert server.speak(voice="huda").status_code == 404


def test_a_full_disk_stores_nothing_and_says_so(server):
    """The system's own limit on the size of files takes the place of a disk."""
    root: Path = server.service.voices._root
    before = sorted(root.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        answer = server.upload("huda")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert answer.status_code == 507
    assert message_of(answer) == "the voice could not be stored: File too large"
    assert sorted(root.iterdir()) == before
    assert server.upload("huda").status_code == 200
    assert server.client.delete("/v1/audio/voices/huda").status_code == 200


def test_an_upload_is_never_put_on_disk_before_it_is_checked(server, monkeypatch):
    """Files of a form over a megabyte go to a temporary file of starlette's, unless somebody asks it not to."""
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    answer = server.upload("huda", b"RIFF" + bytes(3 << 20))
    assert answer.status_code == 400, answer.text
    assert message_of(answer).startswith("audio_sample: ")


def test_too_many_bodies_at_once_are_refused(server, monkeypatch):
    monkeypatch.setattr("tools.serve.guard.BODIES_AT_ONCE", 0)
    full = server.speak()
    assert (full.status_code, full.headers["retry-after"]) == (503, "5")
    monkeypatch.undo()
    server.wait(lambda: server.app._held_bytes == 0)


def test_every_method_is_answered_as_an_error_of_the_api(server):
    for method in ("PUT", "PATCH", "TRACE", "OPTIONS", "FOO"):
        answer = server.client.request(method, "/v1/audio/voices")
        assert answer.status_code == 405
        assert message_of(answer) == "not with this method"
        assert {"GET", "HEAD", "POST"} == set(answer.headers["allow"].split(", "))
    for path in ("/", "/health", "/metrics", "/v1/models", "/v1/audio/voices"):
        answer = server.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_the_guide_s_form_names_its_own_fields(server):
    files = {"reference_audio": ("me.flac", CLIP.read_bytes())}
    for form, message in (
        ({"reference_text": CLIP_TEXT}, "target_text is missing"),
        ({"target_text": "نعم", "reference_text": "a" * 2001}, "reference_text: 2001 characters"),
        ({"target_text": "نعم", "reference_text": "..."}, "reference_text: "),
        ({"target_text": "نعم", "temperature": "nan"}, "temperature: expected a number"),
    ):
        answer = server.client.post("/generate_speech", files=files, data=form)
        assert answer.status_code == 400
        assert message in message_of(answer)
