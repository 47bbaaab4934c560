"""Rejects: audio that is no file is named, nothing long or secret lands in OUT, no list may change meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preprocess import plan
from preprocess.audio_url import fault_of_url, not_a_file
from preprocess.config import PreprocessConfig
from preprocess.plan import Request, identify_job, ingest, plan_job
from preprocess.reasons import MAX_FIELD_CHARS, reject
from preprocess.row_checks import check_row, has_speaker, speaker_of
from preprocess.sources import SourceRow, read_rows
from preprocess.text import TextSection
from shards.config import read_config
from shards.errors import DataError
from shards.manifest import Fingerprints
from shards.writer import Reject

SECRET = "hf_" + "a1B2" * 8


def row(audio: dict, **more: object) -> dict:
    user = [{"type": "text", "text": "نص المرجع"}, {"type": "audio", "audio_url": "a.wav"}]
    assistant = [{"type": "text", "text": "نص الهدف"}, {"type": "audio", **audio}]
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], **more}


def written(folder: Path, rows: list[dict]) -> Path:
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


BASE64 = "UklGRiQA" * 30000
ELSEWHERE = {
    "data": [f"data:audio/wav;base64,{BASE64}", "DATA:;base64,AAAA", " data:audio/wav,x", "data%3Aaudio/wav;base64,A"],
    "file": ["file:///tmp/a.wav", "File://localhost/a.wav", "file:a.wav", "\ufeffFILE:/a.wav"],
    "http": [
        "http://h/a.wav",
        "HTTP://h/a.wav",
        "<http://h/a.wav>",
        "http:/h/a.wav",
        "http :// h/a.wav",
        "http:\\\\h\\a.wav",
    ],
    "https": [f"https://u:{SECRET}@h/a.wav?token={SECRET}", "https%3A%2F%2Fh/a.wav"],
    "s3": ["s3://bucket/a.wav", "S3://bucket/a.wav"],
    "gs": ["gs://bucket/a.wav"],
    "pipe": ["pipe:cat a.wav"],
    "odd+scheme": ["odd+scheme://x"],
}


@pytest.mark.parametrize("scheme", ELSEWHERE)
def test_an_address_is_a_reject_that_says_what_is_supported(tmp_path: Path, scheme: str):
    urls = ELSEWHERE[scheme]
    for found, url in zip(read_rows(written(tmp_path, [row({"audio_url": url}) for url in urls])), urls, strict=True):
        assert isinstance(found, Reject), url[:40]
        assert found.reason == "audio_not_a_file"
        assert f"{scheme}: in audio_url; audio_url must be the path of a file on this machine" in found.detail
        assert SECRET not in found.detail


@pytest.mark.parametrize("key", ["raw_audio", "RAW_AUDIO", "rawAudio", "audio_bytes", "input_audio"])
def test_audio_inside_the_list_is_named(tmp_path: Path, key: str):
    for audio in ({"audio_url": "placeholder", key: BASE64}, {key: BASE64}):
        found = next(read_rows(written(tmp_path, [row(audio)])))
        assert isinstance(found, Reject)
        assert f"{key} holds the audio itself" in found.detail
        assert len(found.detail) < 200
    assert not_a_file(row({"audio_url": "a.wav", key: None})) is None
    assert "is it the audio itself?" in str(fault_of_url(BASE64))


@pytest.mark.parametrize(
    "path", ["a.wav", "/data/a b.wav", "./x:y.wav", "spk:01.wav", "C:\\a.wav", "داتا/ص.wav", "~/a.wav"]
)
def test_paths_are_no_addresses(path: str):
    assert fault_of_url(path) is None


def test_details_of_a_row_are_cut_and_hold_no_tokens(tmp_path: Path):
    long = reject(
        1, "i" * 10**6, "ingest", "row_invalid", f"{'x' * (MAX_FIELD_CHARS - 9)} {SECRET} " + "y" * 10**6, "p" * 5000
    )
    assert len(long.id) < MAX_FIELD_CHARS + 40
    assert len(long.detail) < MAX_FIELD_CHARS + 40
    assert len(long.path or "") < MAX_FIELD_CHARS + 40
    assert "hf_" not in long.detail
    assert (
        reject(0, "a", "audio", "audio_missing", "x", f"s3://b/{SECRET}?X-Amz-Signature=abcdef").path
        == "s3://b/***?X-Amz-Signature=***"
    )
    rows = [row({"audio_url": "b.wav"}, id=f"https://h/?token={SECRET}", speaker={"x": SECRET * 999})]
    ingest(Request(written(tmp_path, rows), tmp_path / "out"), 0)
    rejects = (tmp_path / "out/job/rejects.jsonl").read_text(encoding="utf-8")
    assert SECRET not in rejects
    assert len(rejects) < 1000


def test_a_list_that_changes_while_it_is_read_is_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path, [row({"audio_url": f"{number}.wav"}) for number in range(3)])

    def growing(path: Path):
        for number, found in enumerate(read_rows(path)):
            if number == 1:
                with path.open("a") as file:
                    file.write(json.dumps(row({"audio_url": "late.wav"})) + "\n")
            yield found

    monkeypatch.setattr(plan, "read_rows", growing)
    with pytest.raises(DataError, match="changed while it was read; run the same command again"):
        ingest(Request(path, tmp_path / "out"), 0)
    assert not (tmp_path / "out/job/order.npy").exists()


def test_a_list_that_changed_after_its_hash_is_shortened(tmp_path: Path):
    path = written(tmp_path, [row({"audio_url": "b.wav"})])
    config = read_config(PreprocessConfig, None, [])
    identity = identify_job(Request(path, tmp_path / "out"), config, Fingerprints("a", "b", None))
    written(tmp_path, [row({"audio_url": "c.wav"})])
    with pytest.raises(DataError, match="changed while it was read"):
        plan_job(Request(path, tmp_path / "out"), config, identity)
    assert not (tmp_path / "out/job.json").exists()


@pytest.mark.parametrize("speaker", [None, "", "  ", "unknown", "Unknown", "None", "nan", "-"])
def test_a_missing_speaker_is_one_per_reference_file(tmp_path: Path, speaker: str | None):
    named = {} if speaker is None else {"speaker": speaker}
    found = next(read_rows(written(tmp_path, [row({"audio_url": "b.wav"}, **named)])))
    assert isinstance(found, SourceRow)
    assert not has_speaker(found)
    assert "speaker_from_reference" in check_row(found, TextSection()).warnings
    assert speaker_of(found, "ab" * 32) == speaker_of(found, "ab" * 32) == "reference-abababababababab"
    assert speaker_of(found, "cd" * 32) != speaker_of(found, "ab" * 32)


def test_a_named_speaker_stays(tmp_path: Path):
    found = next(read_rows(written(tmp_path, [row({"audio_url": "b.wav"}, speaker=" s 1 ")])))
    assert isinstance(found, SourceRow)
    assert speaker_of(found, "ab" * 32) == " s 1 "
    assert check_row(found, TextSection()).warnings == []
