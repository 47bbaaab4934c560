"""Voices of `serve` on disk: servers that share a folder, names that look alike, and folders that were left half or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from speech_server import SpeechServer, message_of

from tools.serve.api_errors import ApiError
from tools.serve.voice_names import checked_name, folded
from tools.serve.voice_store import VoiceFacts, VoiceStore


@pytest.fixture(scope="module")
def pair(tiny_speaker, tmp_path_factory):
    """Two servers on one folder."""
    root = tmp_path_factory.mktemp("voices")
    with (
        SpeechServer(tiny_speaker, root) as first,
        SpeechServer(tiny_speaker, root, has_voice=False) as second,
    ):
        second.wait(lambda: second.queue.state == "ready")
        yield first, second


def names(server: SpeechServer) -> list[str]:
    return [one["name"] for one in server.client.get("/v1/audio/voices").json()["voices"]]


def test_two_servers_on_one_folder_know_the_same_voices(pair):
    first, second = pair
    said = {"response_format": "pcm", "seed": 3}
    assert second.speak(**said).content == first.speak(**said).content
    stored = second.upload("huda").json()["voice"]["id"]
    assert names(first) == names(second) == ["salma", "huda"]
    assert first.upload("HUDA").status_code == 409
    assert first.speak(voice=stored).status_code == 200
    assert first.client.delete("/v1/audio/voices/huda").status_code == 200
    assert second.speak(voice=stored).status_code == 404
    assert second.client.delete("/v1/audio/voices/huda").status_code == 404
    assert names(second) == ["salma"]


def test_a_second_server_leaves_what_is_being_stored_alone(pair, tiny_speaker, tmp_path):
    root: Path = pair[0].service.voices._root
    new = root / ".new-voice_0123456789abcdef"
    new.mkdir()
    with SpeechServer(tiny_speaker, root, has_voice=False):
        assert new.is_dir()
    new.rmdir()
    alone = tmp_path / "voices"
    (alone / new.name).mkdir(parents=True)
    (alone / ".gone-voice_0123456789abcdef").write_text("of another time")
    with SpeechServer(tiny_speaker, alone, has_voice=False):
        assert list(alone.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "empty", "of another shape", "not of numpy"])
def test_codes_that_are_lost_are_made_anew(tiny_speaker, tmp_path, damage):
    import numpy as np

    root = tmp_path / "voices"
    with SpeechServer(tiny_speaker, root) as server:
        said = server.speak(response_format="pcm", seed=3).content
        codes = root / server.service.voices.all()[0].id / "codes.npy"
        before = codes.read_bytes()
        if damage == "missing":
            codes.unlink()
        elif damage == "of another shape":
            np.save(codes, np.zeros((3, 5), np.uint16))
        else:
            codes.write_bytes(b"" if damage == "empty" else b"x" * 99)
        server.service.voices._kept.clear()
        assert server.speak(response_format="pcm", seed=3).content == said
        assert codes.read_bytes() == before


def test_a_damaged_recording_says_so_and_others_speak(tiny_speaker, tmp_path):
    root = tmp_path / "voices"
    for name, text in (("voice_0123456789abcdef", "{"), ("voice_0123456789abcde0", json.dumps({"id": "x"}))):
        (root / name).mkdir(parents=True)
        (root / name / "voice.json").write_text(text)
    (root / "voice_0123456789abcde1").write_text("a file")
    (root / "notes.txt").write_text("somebody's")
    with SpeechServer(tiny_speaker, root) as server:
        assert names(server) == ["salma"]
        server.upload("huda")
        (root / server.service.voices.all()[1].id / "recording.bin").write_bytes(b"")
        server.service.voices._kept.clear()
        answer = server.speak(voice="huda")
        assert answer.status_code == 500
        assert "damaged; delete it" in message_of(answer)
        assert server.speak().status_code == 200
        assert server.client.delete("/v1/audio/voices/huda").status_code == 200


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("سلمى", "\ufeb3\ufee0\ufee4\ufef0"),  # presentation forms
        ("سلمى", "سل\u200cمى"),
        ("salma", "sal\u200dma"),
        ("salma", "ｓａｌｍａ"),
        ("é", "e\u0301"),
        ("Straße", "STRASSE"),
        ("umm kulthum", "umm\u00a0 kulthum"),
        ("ﬁda", "fida"),
    ],
)
def test_names_that_look_alike_are_one_name(one, other):
    assert checked_name(one)
    assert folded(checked_name(other)) == folded(one)


@pytest.mark.parametrize("name", ["سلمى", "नमस्ते", "ሰላም", "გიორგი", "Ünal", "美咲", "می‌نا", "O'Brien (2)"])
def test_names_of_every_script_are_kept(name):
    assert folded(checked_name(name)) == folded(name) != ""


@pytest.mark.parametrize(
    "name", ["\u3164\u3164", "a\u2066b\u2069", "\u202ea", "sal\u00adma", "\ufeffa", "a\u3164", "\u2800"]
)
def test_names_that_nobody_can_read_are_refused(name):
    with pytest.raises(ApiError, match="name: "):
        checked_name(name)


def test_voices_of_one_second_are_listed_as_they_were_stored(tmp_path):
    """Ids are random: by them a second voice would stand first every other time."""
    store = VoiceStore(tmp_path / "voices")
    given = [f"voice {number}" for number in range(8)]
    for name in given:
        facts = VoiceFacts(
            id="",
            name=name,
            created_at=1_800_000_000,
            consent="yes",
            ref_text=None,
            speaker_description="",
            mime_type="audio/wav",
            file_size=5,
            duration_s=1.0,
            codec="",
        )
        store.add(facts, b"sound", np.zeros((8, 25), np.uint16), cast(Any, None))
    assert [one.name for one in store.all()] == given
