"""`serve`: what existing clients ask for comes, in the container that they asked for, and says what it is."""

from __future__ import annotations

import base64
import io
import json

import av
import numpy as np
import pytest
from speech_server import CLIP, CLIP_TEXT, SpeechServer, asked, message_of

from tools.serve.sound_formats import FORMATS, Encoder, encoded

SPEECH_S = 12 * 0.04


@pytest.fixture(scope="module")
def server(tiny_speaker, tmp_path_factory):
    with SpeechServer(tiny_speaker, tmp_path_factory.mktemp("voices")) as running:
        yield running


def decoded(body: bytes, name: str) -> np.ndarray:
    """What a decoder that is not the encoder's library makes of it, to the last packet."""
    if name == "pcm":
        return np.frombuffer(body, "<i2").astype(np.float32) / 32767
    with av.open(io.BytesIO(body), "r") as container:
        frames = list(container.decode(audio=0))
    rate = frames[0].sample_rate
    wave = np.concatenate([frame.to_ndarray().astype(np.float32).mean(axis=0) for frame in frames])
    wave = wave / 32768 if frames[0].format.name.startswith("s16") else wave
    return wave[:: rate // 24000]


@pytest.mark.parametrize("name", FORMATS)
def test_whole_and_streamed_bodies_hold_every_sample(name):
    wave = (0.4 * np.sin(np.arange(24000 * 3 + 123) / 20)).astype(np.float32)
    encoder = Encoder(name)
    streamed = [encoder.feed(piece) for piece in np.split(wave, [500, 7680, 50000])] + [encoder.finish()]
    for body in (encoded(name, [wave]), b"".join(streamed)):
        found = decoded(body, name)
        assert 0 <= len(found) - len(wave) <= 0.1 * 24000
        loud = np.abs(found[-2400 - (len(found) - len(wave)) :])
        assert loud.max() > 0.3, "the end is missing"


def test_a_streamed_flac_and_mp3_begin_with_sound():
    """MP3 without a frame that counts other frames; FLAC that does not claim a length."""
    wave = np.zeros(24000, np.float32)
    for name in ("mp3", "flac"):
        encoder = Encoder(name)
        body = encoder.feed(wave) + encoder.finish()
        assert b"Info" not in body
        assert b"Xing" not in body
    assert int.from_bytes(body[18:26], "big") & (1 << 36) - 1 == 0


def test_joined_mp3_bodies_play_to_the_end():
    """LibreChat joins the answers to pieces of a long text."""
    wave = (0.4 * np.sin(np.arange(48000) / 20)).astype(np.float32)
    one = encoded("mp3", [wave])
    assert len(decoded(one + one, "mp3")) == 2 * len(decoded(one, "mp3"))
    with av.open(io.BytesIO(one + one), "r") as container:
        assert container.duration is not None
        assert container.duration > 4e6


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_comes_under_its_own_name(server, name):
    answer = server.speak(response_format=name, seed=5)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == FORMATS[name].media_type
    assert answer.headers["x-seed"] == "5"
    assert answer.headers["x-stopped"] == "max_seconds"
    assert len(answer.headers["x-request-id"]) == 16
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert abs(len(decoded(answer.content, name)) / 24000 - SPEECH_S) < 0.1


def test_mp3_is_what_comes_without_a_format(server):
    answer = server.speak()
    assert answer.headers["content-type"] == "audio/mpeg"
    assert answer.content[:2] == b"\xff\xf3"


@pytest.mark.parametrize("name", ["aac", "mp4", "WAVE", "../wav"])
def test_a_format_that_cannot_be_made_is_refused(server, name):
    answer = server.speak(response_format=name)
    assert answer.status_code == 400
    assert "known are mp3, wav, flac, opus, pcm" in message_of(answer)


def test_a_whole_wav_has_true_sizes_and_a_stream_has_none(server):
    whole = server.speak(response_format="wav").content
    assert int.from_bytes(whole[4:8], "little") == len(whole) - 8
    assert int.from_bytes(whole[40:44], "little") == len(whole) - 44
    streamed = server.speak(response_format="wav", stream_format="audio").content
    assert streamed[4:8] == streamed[40:44] == b"\xff\xff\xff\xff"
    assert len(streamed) == len(whole)


def test_the_same_seed_says_the_same_streamed_or_not(server):
    whole = server.speak(response_format="pcm", seed=3).content
    for more in ({"stream": True}, {"stream_format": "audio"}, {"stream": False, "stream_format": "audio"}):
        again = server.speak(response_format="pcm", seed=3, **more)
        assert np.abs(decoded(again.content, "pcm") - decoded(whole, "pcm")).max() < 1e-3
        assert ("content-length" in again.headers) == (more.get("stream") is False)
    assert server.speak(response_format="pcm", seed=4).content != whole


def test_a_seed_that_was_drawn_can_be_asked_for(server):
    first = server.speak(response_format="pcm", seed=None)
    seeds = {first.headers["x-seed"], server.speak(response_format="pcm", seed=None).headers["x-seed"]}
    assert len(seeds) == 2
    again = server.speak(response_format="pcm", seed=int(first.headers["x-seed"]))
    assert again.content == first.content


@pytest.mark.parametrize("name", FORMATS)
def test_events_carry_the_sound_and_how_it_ended(server, name):
    text = "".join(server.speak(response_format=name, stream_format="sse", seed=3).text)
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
    assert {one["type"] for one in events[:-1]} == {"speech.audio.delta"}
    body = b"".join(base64.b64decode(one["audio"]) for one in events[:-1])
    assert abs(len(decoded(body, name)) / 24000 - SPEECH_S) < 0.1
    assert events[-1]["type"] == "speech.audio.done"
    assert events[-1]["stopped"] == "max_seconds"
    assert events[-1]["usage"] == {"input_tokens": 15, "output_tokens": 12, "total_tokens": 27}


def test_sound_comes_while_it_is_spoken(server):
    """The first bytes of a text are there while it has its slot."""
    with server.client.stream(
        "POST", "/v1/audio/speech", json=asked(max_new_tokens=80, response_format="pcm", stream=True, input="نص " * 60)
    ) as answer:
        pieces = answer.iter_raw()
        first = next(pieces)
        assert server.service.metrics.value("slots_busy") == 1
        assert len(first) < sum(len(piece) for piece in pieces)


def test_a_reference_in_the_request_is_cloned(server):
    """vLLM-Omni's fields, with a data: URL; the same voice as the stored one says the same."""
    coded = base64.b64encode(CLIP.read_bytes()).decode()
    fields = {"ref_audio": f"data:audio/flac;base64,{coded}", "ref_text": CLIP_TEXT, "language": "Arabic", "seed": 1}
    answer = server.speak(response_format="pcm", voice=None, task_type="Base", **fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ignored"] == "language, task_type"
    assert "x-voice" not in answer.headers
    assert answer.content == server.speak(response_format="pcm", seed=1).content


def test_the_guide_s_form_is_answered_with_sound(server):
    files = {"reference_audio": ("me.flac", CLIP.read_bytes())}
    form = {"target_text": "نعم", "reference_text": CLIP_TEXT, "max_seconds": "0.48", "temperature": "0"}
    answer = server.client.post("/generate_speech", files=files, data=form)
    assert answer.headers["content-type"] == "audio/wav", answer.text
    assert len(decoded(answer.content, "wav")) == 12 * 960
    same = server.client.post("/generate_speech", files=files, params=form)
    assert same.content == answer.content
    lacking = server.client.post("/generate_speech", data=form, files={"other": b"x"})
    assert lacking.status_code == 400
    assert "reference_audio is missing" in message_of(lacking)


def test_models_are_listed_and_named(server):
    names = [one["id"] for one in server.client.get("/v1/models").json()["data"]]
    assert names == ["voice", "tts-1", "tts-1-hd", "gpt-4o-mini-tts"]
    assert server.client.get("/v1/models/tts-1").json()["id"] == "tts-1"
    assert server.client.get("/v1/models/gpt-5").status_code == 404


def test_metrics_are_prometheus_text(server):
    server.speak()
    lines = server.client.get("/metrics").text.splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"}
    assert values["speech_server_slots"] == 4
    assert values["speech_server_ready"] == values["speech_server_voices"] == 1
    assert values["speech_server_resident_memory_bytes"] > 1e7
    assert values['speech_server_requests_total{route="/v1/audio/speech",status="200"}'] >= 1
    assert values['speech_server_speech_total{ended="max_seconds"}'] >= 1
    counts = [values[f'speech_server_speech_seconds_bucket{{le="{edge}"}}'] for edge in ("0.05", "60", "+Inf")]
    assert counts == sorted(counts)
