"""`serve` as existing clients use it: the `openai` package, and the requests that three applications are known to send."""

from __future__ import annotations

import base64
import io

import httpx
import openai
import pytest
import soundfile
from speech_server import CLIP, CLIP_TEXT, SpeechServer, message_of

KEY = "key-of-the-tests"


@pytest.fixture(scope="module")
def server(tiny_speaker, tmp_path_factory):
    """With a key, as a server for others has."""
    with SpeechServer(tiny_speaker, tmp_path_factory.mktemp("voices"), api_key=KEY, max_speech_s=0.48) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False)
    ) as made:
        yield made


def duration_s(body: bytes) -> float:
    with soundfile.SoundFile(io.BytesIO(body)) as file:
        return len(file.read()) / file.samplerate


@pytest.mark.parametrize("name", ["mp3", "wav", "flac", "opus", "pcm"])
def test_the_openai_client_gets_every_format(client, name, tmp_path):
    options = {"model": "gpt-4o-mini-tts", "voice": "salma", "input": "هل تعرف الطريق؟", "response_format": name}
    speech = client.audio.speech.create(**options)
    path = tmp_path / f"speech.{name}"
    speech.write_to_file(path)
    if name == "pcm":
        assert len(path.read_bytes()) == 2 * 11520
    else:
        assert 0.48 <= duration_s(path.read_bytes()) < 0.6
    with client.audio.speech.with_streaming_response.create(
        **options, extra_body={"stream_format": "audio", "seed": 9}
    ) as answer:
        assert answer.headers["x-seed"] == "9"
        pieces = list(answer.iter_bytes())
    assert sum(len(piece) for piece in pieces) > 1000


def test_the_openai_client_reads_events(client):
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="salma", input="نعم", response_format="pcm", stream_format="sse"
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: {") for line in lines)
    assert '"speech.audio.done"' in lines[-1]


def test_the_openai_client_shows_our_words(client, server):
    with pytest.raises(openai.NotFoundError, match="no such voice"):
        client.audio.speech.create(model="tts-1", voice="huda", input="نعم")
    with pytest.raises(openai.BadRequestError, match="aac is not made here"):
        client.audio.speech.create(model="tts-1", voice="salma", input="نعم", response_format="aac")
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert "tts-1" in [one.id for one in client.models.list()]


def test_open_webui_lists_voices_without_a_key_and_speaks(server):
    """backend/open_webui/routers/audio.py: voices without a header, then the browser's JSON; the body is kept as .mp3."""
    with httpx.Client(trust_env=False) as plain:
        answer = plain.get(f"{server.url}/v1/audio/voices").json()
        assert [one["name"] for one in answer["voices"]] == ["salma"]
        assert set(answer) == {"voices"}, "more needs the key"
        assert plain.get(f"{server.url}/v1/audio/models").status_code == 200
        body = {"input": "هل تعرف الطريق؟", "voice": answer["voices"][0]["id"], "model": "tts-1"}
        refused = plain.post(f"{server.url}/v1/audio/speech", json=body)
        assert refused.status_code == 401
        assert "API key" in message_of(refused)
    spoken = server.client.post("/v1/audio/speech", json=body)
    assert spoken.headers["content-type"] == "audio/mpeg"
    assert duration_s(spoken.content) >= 0.48


def test_names_of_openai_get_the_default_voice_and_a_header(server):
    """Open WebUI sends alloy where it could not read the list."""
    spoken = server.client.post("/v1/audio/speech", json={"input": "نعم", "voice": "alloy", "model": "tts-1"})
    assert spoken.status_code == 200
    assert "default voice" in spoken.headers["x-voice-stand-in"]
    assert spoken.headers["x-voice"] == server.service.voices.all()[0].id


def test_librechat_joins_what_it_gets_as_mpeg(server):
    """TTSService.js: no format, an unknown field, pieces of a long text joined."""
    answers = [
        server.client.post(
            "/v1/audio/speech", json={"input": text, "model": "tts-1", "voice": "salma", "backend": "librechat"}
        )
        for text in ("النص الأول", "النص الثاني")
    ]
    assert {one.headers["content-type"] for one in answers} == {"audio/mpeg"}
    total = sum(duration_s(one.content) for one in answers)
    assert abs(duration_s(b"".join(one.content for one in answers)) - total) < 0.1


def test_home_assistant_checks_its_key_lists_voices_and_streams(server):
    """sfortis/openai_tts: the key is checked without sound; voice may be absent; users add fields of their own."""
    with httpx.Client(trust_env=False) as plain:
        assert plain.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer nonsense"}).status_code == 401
        assert plain.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    body = {"model": "tts-1", "input": "نعم", "response_format": "mp3", "speed": 1.0, "chunk_size": 400, "x": {"y": 1}}
    with server.client.stream("POST", "/v1/audio/speech", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert duration_s(b"".join(answer.iter_bytes())) > 0
    gone = server.client.post("/v1/audio/speech", json=body | {"voice": "a voice that has been deleted"})
    assert gone.status_code == 404
    assert "GET /v1/audio/voices lists them" in message_of(gone)


def test_vllm_omni_s_voices_are_uploaded_listed_and_deleted(server):
    answer = server.upload("هدى", speaker_description="warm").json()
    assert answer["success"]
    assert answer["voice"]["consent"] == "recording-7"
    listed = server.client.get("/v1/audio/voices").json()
    assert [one["name"] for one in listed["uploaded_voices"]] == ["salma", "هدى"]
    assert listed["uploaded_voices"][1]["ref_text"] == CLIP_TEXT
    for voice in ("هدى", answer["voice"]["id"], {"id": answer["voice"]["id"]}):
        assert server.speak(voice=voice).headers["x-voice"] == answer["voice"]["id"]
    assert server.client.delete("/v1/audio/voices/هدى").json()["success"]
    assert server.speak(voice="هدى").status_code == 404
    assert server.speak(voice={"id": answer["voice"]["id"]}).status_code == 404


def test_voices_outlive_the_server_and_another_codec(server, tiny_speaker, tmp_path):
    """Their codes are computed once, unless another codec would make others; half-written ones are cleared."""
    root = tmp_path / "voices"
    said = {"response_format": "pcm", "seed": 2}
    with SpeechServer(tiny_speaker, root) as first:
        (voice,) = first.service.voices.all()
        spoken = first.speak(**said).content
    (root / f".new-{voice.id}").mkdir()
    record = root / voice.id / "voice.json"
    codes = (root / voice.id / "codes.npy").read_bytes()
    with SpeechServer(tiny_speaker, root, has_voice=False) as again:
        again.wait(lambda: again.queue.state == "ready")
        assert again.speak(**said).content == spoken
    record.write_text(record.read_text().replace(voice.codec, "0" * 16))
    (root / voice.id / "codes.npy").write_bytes(b"of another codec")
    with SpeechServer(tiny_speaker, root, has_voice=False) as other:
        other.wait(lambda: other.queue.state == "ready")
        assert other.speak(**said).content == spoken
    assert (root / voice.id / "codes.npy").read_bytes() == codes
    assert sorted(path.name for path in root.iterdir()) == [voice.id]


def test_ref_urls_are_fetched_only_from_named_hosts(tiny_speaker, tmp_path, http_server):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "a.flac").write_bytes(CLIP.read_bytes())
    address = http_server(tmp_path / "www")
    named = frozenset({address.removeprefix("http://")})
    with SpeechServer(tiny_speaker, tmp_path / "voices", allowed_hosts=named) as server:
        coded = base64.b64encode(CLIP.read_bytes()).decode()
        options = {"ref_text": CLIP_TEXT, "seed": 1, "response_format": "pcm"}
        fetched = server.speak(ref_audio=f"{address}/a.flac", **options)
        assert fetched.status_code == 200, fetched.text
        assert fetched.content == server.speak(ref_audio=f"data:audio/flac;base64,{coded}", **options).content
        for wrong in (
            f"{address}/b.flac",
            address.replace("127.0.0.1", "localhost") + "/a.flac",
            f"{address[:-1]}/a.flac",
        ):
            assert server.speak(ref_audio=wrong).status_code == 400


def test_other_sites_and_names_are_refused(tiny_speaker, tmp_path):
    origins, hosts = frozenset({"https://app.example"}), frozenset({"127.0.0.1"})
    with SpeechServer(tiny_speaker, tmp_path / "voices", has_voice=False, cors_origins=origins, hosts=hosts) as server:
        ask = server.client.get
        assert ask("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
        assert ask("/v1/models", headers={"Origin": "null"}).status_code == 403
        assert ask("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        own = ask("/v1/models", headers={"Origin": server.url})
        assert own.status_code == 200
        assert "access-control-allow-origin" not in own.headers
        allowed = ask("/v1/models", headers={"Origin": "https://app.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        wanted = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        assert server.client.options("/v1/audio/speech", headers=wanted).status_code == 204


def test_unknown_names_can_be_errors_and_no_voice_is_a_404(tiny_speaker, tmp_path):
    with SpeechServer(tiny_speaker, tmp_path / "voices", has_voice=False, unknown_voice="error") as server:
        server.wait(lambda: server.queue.state == "ready")
        assert server.speak(voice="alloy").status_code == 404
        empty = server.speak(voice=None)
        assert empty.status_code == 404
        assert "no voice is stored" in message_of(empty)
