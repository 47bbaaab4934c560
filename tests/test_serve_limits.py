"""`serve`: what is malformed, oversized, not audio or not allowed is refused with its reason, and nothing is left behind."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging

import httpx
import numpy as np
import pytest
import soundfile
from speech_server import CLIP, SpeechServer, asked, message_of


@pytest.fixture(scope="module")
def server(tiny_speaker, tmp_path_factory):
    limits = {"max_text_chars": 200, "max_upload_bytes": 300_000, "max_reference_s": 12.0, "max_voices": 20}
    with SpeechServer(tiny_speaker, tmp_path_factory.mktemp("voices"), **limits) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(server):
    """Whatever was refused: no voice more, no file outside, no job in the queue."""
    root = server.service.voices._root
    before = sorted(path.relative_to(root.parent) for path in root.parent.rglob("*"))
    yield
    assert server.queue.is_idle
    assert sorted(path.relative_to(root.parent) for path in root.parent.rglob("*")) == before
    assert [one.name for one in server.service.voices.all()] == ["salma"]


def sound(kind: str, samples: np.ndarray, rate: int = 24000, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def noise(seconds: float, rate: int = 24000, channels: int = 1) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal((round(seconds * rate), channels))


BODIES = {
    "empty": (b"", 400, "not JSON"),
    "not JSON": (b"input=hello", 400, "not JSON"),
    "cut off": (b'{"input": "hel', 400, "not JSON"),
    "not UTF-8": (b'{"input": "\xff\xfe"}', 400, "not JSON"),
    "a list": (b'["input"]', 400, "expected a JSON object, got list"),
    "null": (b"null", 400, "expected a JSON object"),
    "NaN": (b'{"input": "a", "temperature": NaN}', 400, "not JSON"),
    "deep": (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "too deep"),
    "larger than any request": (b'{"input": "' + b"a" * 2_000_000 + b'"}', 413, "the body has more than"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_refused(server, name):
    body, status, message = BODIES[name]
    answer = server.client.post("/v1/audio/speech", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, message in message_of(answer)) == (status, True), answer.text


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"input": None}, 400, "input is missing"),
        ({"input": ""}, 400, "input is missing"),
        ({"input": " \n "}, 400, "input is missing"),
        ({"input": ["a"]}, 400, "input: expected a string, got list"),
        ({"input": "a" * 201}, 400, "input: 201 characters, at most 200"),
        ({"input": "..."}, 400, "holds no letter or digit"),
        ({"input": "<|eot_id|> hello"}, 400, "no text may hold that"),
        ({"input": "a\x1b[2Jb"}, 400, "no text may hold that"),
        ({"speed": 2}, 400, "speed: this model has one speed"),
        ({"speed": "fast"}, 400, "speed:"),
        ({"temperature": -1}, 400, "temperature = -1: expected"),
        ({"temperature": "hot"}, 400, "temperature = 'hot': expected"),
        ({"top_p": 0}, 400, "top_p = 0: expected"),
        ({"top_k": 1.5}, 400, "top_k = 1.5: expected"),
        ({"seed": -1}, 400, "seed = -1: expected"),
        ({"seed": True}, 400, "seed = True: expected"),
        ({"max_new_tokens": 0}, 400, "max_new_tokens: expected"),
        ({"max_new_tokens": "all"}, 400, "max_new_tokens: expected"),
        ({"max_seconds": 1e-9}, 400, "max_seconds: expected"),
        ({"stream": "yes"}, 400, "stream: expected true or false"),
        ({"stream_format": "chunks"}, 400, "stream_format: expected audio or sse"),
        ({"response_format": 3}, 400, "response_format: unknown"),
        ({"response_format": "aac"}, 400, "aac is not made here"),
        ({"voice": 7}, 400, "voice: expected a name"),
        ({"voice": "v" * 201}, 400, "voice: expected a name"),
        ({"voice": "huda"}, 404, "no such voice"),
        ({"voice": {"id": "voice_0000000000000000"}}, 404, "no such voice"),
        ({"voice": "../../etc/passwd"}, 404, "no such voice"),
        ({"voice": "/etc/passwd"}, 404, "no such voice"),
        ({"voice": "salma/../salma"}, 404, "no such voice"),
        ({"voice": "salma\x00"}, 404, "no such voice"),
        ({"voice": "%2e%2e%2fsalma"}, 404, "no such voice"),
        ({"ref_audio": "/etc/passwd"}, 400, "no file or address of a request is opened"),
        ({"ref_audio": "file:///etc/passwd"}, 400, "no file or address of a request is opened"),
        ({"ref_audio": "FILE:/etc/passwd"}, 400, "no file or address of a request is opened"),
        ({"ref_audio": str(CLIP)}, 400, "no file or address of a request is opened"),
        ({"ref_audio": "http://127.0.0.1:1/a.wav"}, 400, "fetches no address of that host"),
        ({"ref_audio": "http://[::1"}, 400, "fetches no address of that host"),
        ({"ref_audio": "ftp://127.0.0.1/a.wav"}, 400, "no file or address of a request is opened"),
        ({"ref_audio": "data:audio/wav,UklGRg"}, 400, "expected data:audio/wav;base64"),
        ({"ref_audio": "data:audio/wav;base64,%%%"}, 400, "ref_audio: not base64"),
        ({"ref_audio": "data:audio/wav;base64,"}, 400, "ref_audio is empty"),
        ({"ref_audio": "data:audio/wav;base64," + "A" * 500_000}, 413, "more than"),
        ({"ref_audio": "data:audio/wav;base64,bm90IGF1ZGlv"}, 400, "ref_audio: "),
        ({"ref_text": ["a"]}, 400, "ref_text: expected a string"),
        ({"ref_text": "a" * 3000}, 400, "ref_text: 3000 characters, at most 2000"),
    ],
    ids=lambda value: None if isinstance(value, int) else repr(value)[:40],
)
def test_a_field_that_cannot_be_is_refused(server, fields, status, message):
    answer = server.speak(**fields)
    assert answer.status_code == status, answer.text
    assert message in message_of(answer)


RECORDINGS = {
    "nothing": (b"", 400, "audio_sample is empty"),
    "a text": (b"this is no sound" * 100, 400, "audio_sample: "),
    "a page": (b"<!doctype html><script>alert(1)</script>" * 9, 400, "audio_sample: "),
    "a program": (b"\x7fELF" + bytes(3000), 400, "audio_sample: "),
    "a zip": (b"PK\x03\x04" + bytes(3000), 400, "audio_sample: "),
    "a gzip": (b"\x1f\x8b\x08" + bytes(3000), 400, "audio_sample: "),
    "random bytes": (np.random.default_rng(1).bytes(9000), 400, "audio_sample: "),
    "zeros": (bytes(9000), 400, "audio_sample: "),
    "a wav header alone": (sound("WAV", noise(1))[:44], 400, "audio_sample: "),
    "half a flac": (CLIP.read_bytes()[: CLIP.stat().st_size // 2], 400, "audio_sample: "),
    "too short": (sound("WAV", noise(0.1)), 400, "at least 0.5 s"),
    "longer than here": (sound("FLAC", noise(13, 8000), 8000), 400, "13.0 s, at most 12 s"),
    "longer than anywhere": (sound("WAV", noise(31, 4000), 4000, "PCM_U8"), 400, "at most 30 s"),
    "an hour of silence": (sound("FLAC", np.zeros(8000 * 3600), 8000), 400, "at most 30 s"),
    "28 s at 16 x 384 kHz": (sound("FLAC", np.zeros((384000, 8)), 384000), 400, "samples a second in its header"),
    "silence": (sound("FLAC", np.zeros(48000)), 400, "audio_sample: "),
    "clipped": (sound("FLAC", np.sign(noise(2))), 400, "full scale"),
    "infinite": (sound("WAV", np.full(24000, np.inf), subtype="FLOAT"), 400, "NaN or infinite"),
    "larger than allowed": (sound("WAV", noise(10)), 413, "more than 0.286"),
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_an_upload_that_is_no_voice_is_refused(server, name):
    data, status, message = RECORDINGS[name]
    answer = server.upload("huda", data)
    assert (answer.status_code, message in message_of(answer)) == (status, True), answer.text
    if status == 400 and data:
        coded = base64.b64encode(data).decode()
        again = server.speak(ref_audio=f"data:audio/wav;base64,{coded}")
        assert again.status_code == 400, again.text


@pytest.mark.parametrize(
    "name",
    [
        "",
        "   ",
        ".",
        "..",
        "../huda",
        "..\\huda",
        "/etc/passwd",
        "C:\\huda",
        "huda/x",
        "huda\x00",
        "hu\nda",
        "hu\x1b[2Jda",
        "huda\u202e",
        "hu..da",
        ".huda",
        "%2e%2e%2f",
        "<b>huda</b>",
        'hu"da',
        "hu|da",
        "*",
        "!!!",
        "h" * 101,
        "voice_0123456789abcdef",
        "VOICE_0123456789ABCDEF",
    ],
    ids=lambda name: repr(name)[:20],
)
def test_a_name_that_could_be_a_path_is_refused(server, name):
    answer = server.upload(name)
    assert answer.status_code == 400, answer.text
    assert message_of(answer).startswith("name")


def test_a_name_that_is_taken_is_refused_in_any_spelling(server):
    for name in ("salma", " Salma ", "SALMA"):
        assert server.upload(name).status_code == 409


@pytest.mark.parametrize(
    "path", ["..%2fsalma", "%2e%2e%2f%2e%2e%2fetc", "..%5csalma", "huda", "voice_0000000000000000", "%00"]
)
def test_deleting_what_is_not_there_is_a_404(server, path):
    answer = server.client.delete(f"/v1/audio/voices/{path}")
    assert answer.status_code == 404
    message_of(answer)


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"data": {"name": "huda"}}, 400, "consent is missing"),
        ({"data": {"consent": "yes"}}, 400, "name is missing"),
        ({"data": {"name": "huda", "consent": "yes", "ref_text": "<|eot_id|>"}}, 400, "no text may hold that"),
        ({"data": {"name": "huda", "consent": "yes", "ref_text": "a" * 2001}}, 400, "ref_text: 2001"),
        ({"data": {"name": "huda", "consent": "y" * 101}}, 400, "consent: 101"),
        ({"data": {"name": ["huda", "mona"], "consent": "yes"}}, 400, "a field twice"),
        ({"data": {"name": "huda", "consent": "yes", "speaker_description": "d" * 70_000}}, 400, "the form cannot be read"),
        ({"files": {"other": b"x"}}, 400, "audio_sample is missing"),
        ({"files": {str(number): b"x" for number in range(40)}}, 400, "the form cannot be read"),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "the form cannot be read"),
        ({"content": b"\r\n--y", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400, "the form cannot be read"),
        ({"content": b"{}", "headers": {"Content-Type": "application/json"}}, 415, "multipart/form-data"),
        ({"headers": {"Content-Encoding": "gzip"}}, 415, "not decompressed"),
    ],
)  # fmt: skip
def test_a_form_that_lacks_or_repeats_is_refused(server, change, status, message):
    usual = {"data": {"name": "huda", "consent": "yes"}, "files": {"audio_sample": CLIP.read_bytes()}}
    if "content" in change:
        usual = {}
    answer = server.client.post("/v1/audio/voices", **{**usual, **change})
    assert (answer.status_code, message in message_of(answer)) == (status, True), answer.text


def test_a_body_without_a_length_is_counted(server):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 50_000_000:
            sent += 65536
            yield b"a" * 65536

    with contextlib.suppress(httpx.TransportError):  # the server may close while it is being written to
        assert server.client.post("/v1/audio/speech", content=endless()).status_code == 413
    assert sent < 50_000_000


@pytest.mark.parametrize(
    "path", ["/docs", "/openapi.json", "/v1/files", "/page.html", "/..%2f..%2fetc/passwd", "/page.css/x"]
)
def test_an_address_that_is_not_there_is_answered_as_one(server, path):
    answer = server.client.get(path)
    assert answer.status_code == 404
    assert "no such address" in message_of(answer)
    assert message_of(server.client.get("/v1/audio/speech")) == "not with this method"


def test_logs_hold_ids_and_no_words_of_a_request(server, caplog):
    caplog.set_level(logging.INFO)
    logging.getLogger("serve.access").propagate = True
    ids = {"X-Request-Id": "mine-7", "User-Agent": "a\x1b[2J"}
    server.client.post("/v1/audio/speech?key=hidden", json=asked(input="سري للغاية <|eot_id|>"), headers=ids)
    server.client.get("/nowhere%1b[2J", headers={"X-Request-Id": "bad id!", "Authorization": "Bearer hidden"})
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("serve")]
    assert lines[0].startswith("mine-7 POST /v1/audio/speech 400 ")
    assert " GET unknown 404 " in lines[1]
    assert not any(word in "".join(lines) for word in ("سري", "hidden", "bad id", "\x1b"))


def test_errors_reach_users_of_other_languages_as_one_line(server):
    answer = server.speak(voice="هدى\u202e\n")
    error = json.loads(answer.content)["error"]
    assert "\n" not in error["message"]
    assert error["code"] == "voice_not_found"
