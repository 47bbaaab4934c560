"""The fitted codec of `tiny`: what it was fitted to comes back, what it was not does not, and codes stay worth learning."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from preprocess.audio import AudioLimits, decode
from shards.encoders.codec import load_codec
from shards.errors import DataError
from tools.tiny import cli
from tools.tiny.clips import read_clips
from tools.tiny.fitted_codec import write_fitted_codec

FITTED = ("spk_00_36", "spk_06_35", "spk_11_25")
UNFITTED = "spk_03_06"


@pytest.fixture(scope="module")
def waves(repository: Path) -> dict[str, np.ndarray]:
    """A second and a half of each, not a whole number of frames."""
    folder = repository / "tests" / "data" / "arabic-mini"
    whole = {name: decode((folder / f"{name}.flac").read_bytes(), AudioLimits()).wave for name in (*FITTED, UNFITTED)}
    return {name: wave[12000:48100] for name, wave in whole.items()}


@pytest.fixture(scope="module")
def folder(waves, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    num_held = write_fitted_codec(folder, 0, [waves[name] for name in FITTED])
    assert num_held == sum(-(-len(waves[name]) // 960) for name in FITTED)
    return folder


@pytest.fixture(scope="module")
def codec(folder: Path):
    return load_codec(folder)


def snr_db(wanted: np.ndarray, decoded: np.ndarray) -> float:
    return 10 * np.log10(np.square(wanted).sum() / np.square(wanted - decoded).sum())


def below_6_khz(wave: np.ndarray) -> np.ndarray:
    spectrum = np.fft.rfft(wave)
    spectrum[len(wave) // 4 :] = 0  # of 12 kHz
    return np.fft.irfft(spectrum, len(wave)).astype(np.float32)


@pytest.mark.parametrize("name", FITTED)
def test_a_clip_comes_back_below_6_khz(codec, waves, name):
    wave = waves[name]
    decoded = codec.decode(codec.encode(wave))[: len(wave)]
    fade = 480  # the first and last 20 ms have no neighbouring frame
    assert snr_db(below_6_khz(wave)[fade:-fade], decoded[fade:-fade]) > 30
    assert snr_db(wave, decoded) > 10, "what lies above 6 kHz is little of speech"
    spectrum = np.abs(np.fft.rfft(decoded)) ** 2
    assert spectrum[int(len(spectrum) * 6.5 / 12) :].sum() < 1e-4 * spectrum.sum()


def test_a_voice_it_was_not_fitted_to_comes_back_roughly(codec, waves):
    wave = waves[UNFITTED]
    decoded = codec.decode(codec.encode(wave))[: len(wave)]
    assert -3 < snr_db(wave, decoded) < 10
    loudness, of_decoded = (np.square(w[: len(w) // 960 * 960]).reshape(-1, 960).mean(axis=1) for w in (wave, decoded))
    assert np.corrcoef(np.log(loudness + 1e-6), np.log(of_decoded + 1e-6))[0, 1] > 0.8, "its rhythm is kept"


def test_books_and_clips_have_codes_of_their_own(codec, waves):
    codes = {name: codec.encode(wave) for name, wave in waves.items()}
    for name, books in codes.items():
        assert books.dtype == np.uint16
        assert books.shape == (8, -(-len(waves[name]) // 960))
        assert all(len(np.unique(book)) > 0.4 * len(book) for book in books)
        for one, other in itertools.combinations(books, 2):
            assert (one == other).mean() < 0.05
    for one, other in itertools.combinations(codes.values(), 2):
        num_frames = min(one.shape[1], other.shape[1])
        assert (one[:, :num_frames] == other[:, :num_frames]).mean() < 0.1


@pytest.mark.parametrize("branch", ["acoustic", "semantic"])
def test_codes_depend_on_both_branches(folder, codec, waves, branch):
    deaf = load_codec(folder)
    columns = slice(0, 480) if branch == "acoustic" else slice(480, None)
    with torch.no_grad():
        deaf._model.fc.weight[:, columns] = 0
    equal = (deaf.encode(waves[UNFITTED]) == codec.encode(waves[UNFITTED])).mean()
    assert equal < (0.6 if branch == "acoustic" else 0.99)


def test_decoding_a_part_equals_the_part_of_the_whole(codec, waves):
    """The decoder looks one frame to each side, so a stream can be cut anywhere with little context."""
    codes = codec.encode(waves[FITTED[0]])
    whole, part = codec.decode(codes), codec.decode(codes[:, 5:30])
    np.testing.assert_allclose(part[960:-960], whole[6 * 960 : 29 * 960], atol=2e-3)


def test_same_seed_and_clips_give_the_same_bytes(waves, tmp_path):
    clip = [waves[FITTED[0]]]
    threads = torch.get_num_threads()
    write_fitted_codec(tmp_path / "one", 0, clip)
    torch.set_num_threads(threads + 1)
    try:
        write_fitted_codec(tmp_path / "again", 0, clip)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    write_fitted_codec(tmp_path / "other", 1, clip)
    one, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other"))
    assert one == again
    assert one != other


# --- which clips ----------------------------------------------------------------------------------------------------


def test_clips_come_from_a_list_in_its_order_and_once(repository, arabic_mini):
    clips = read_clips(arabic_mini, 1024, base=repository)
    names = [path.stem for path in clips.paths]
    assert names[:3] == ["spk_00_36", "spk_00_08", "spk_00_04"]
    assert len(names) == len(set(names)) == 10
    assert sum(-(-len(wave) // 960) for wave in clips.waves[:-1]) < 1024
    assert (clips.num_left, clips.skipped) == (62, [])


def test_a_folder_is_read_in_order_and_faults_are_counted(repository, tmp_path):
    data = repository / "tests" / "data" / "arabic-mini"
    (tmp_path / "deep").mkdir()
    shutil.copy(data / "spk_01_06.flac", tmp_path / "deep" / "b.FLAC")
    shutil.copy(data / "spk_00_36.flac", tmp_path / "a.flac")
    (tmp_path / "c.wav").write_bytes((data / "spk_00_36.flac").read_bytes()[:5000])
    (tmp_path / "d.wav").write_text("no audio")
    (tmp_path / "notes.txt").write_text("no clip")
    clips = read_clips(tmp_path, 1024)
    assert [path.name for path in clips.paths] == ["a.flac", "b.FLAC"]
    assert len(clips.skipped) == 2
    assert "c.wav: audio_unreadable" in clips.skipped[0]
    assert "d.wav: audio_unreadable" in clips.skipped[1]


def test_a_row_with_a_fault_is_skipped(repository, arabic_mini, tmp_path):
    rows = json.loads(arabic_mini.read_text())[:3]
    rows[0]["messages"] = rows[0]["messages"][:1]  # no audio
    rows[1] = ["not a row"]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    clips = read_clips(tmp_path / "list.jsonl", 1024, base=repository)
    assert [path.stem for path in clips.paths] == ["spk_00_16", "spk_00_04"]
    assert ["row 0" in clips.skipped[0], "row 1" in clips.skipped[1]] == [True, True]


def test_a_part_of_a_file_is_a_clip_of_its_own(repository, arabic_mini, tmp_path):
    row = json.loads(arabic_mini.read_text())[0]
    parts = [
        item for turn in row["messages"] for item in turn["content"] if isinstance(item, dict) and "audio_url" in item
    ]
    for item, offset_s in zip(parts, (0.25, 1.5), strict=True):
        item.update(audio_url="tests/data/arabic-mini/spk_00_36.flac", offset=offset_s, duration=1.0)
    (tmp_path / "list.json").write_text(json.dumps([row, row]))
    first, second = read_clips(tmp_path / "list.json", 1024, base=repository).waves
    whole = decode((repository / "tests/data/arabic-mini/spk_00_36.flac").read_bytes(), AudioLimits()).wave
    np.testing.assert_array_equal(first, whole[6000:30000])
    np.testing.assert_array_equal(second, whole[36000:60000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "no usable clip"),
        (lambda path: path.write_text('[{"messages": []}]'), "the first of 1 faults"),
        (lambda path: path.write_text("RIFF"), "list"),
        (lambda path: None, "no such file"),
    ],
)
def test_nothing_to_fit_to_is_one_line(tmp_path, make, message):
    make(tmp_path / "list.json")
    with pytest.raises(DataError, match=r"list\.json") as error:
        read_clips(tmp_path / "list.json", 1024)
    assert message in str(error.value)
    result = CliRunner().invoke(cli.main, [str(tmp_path / "out"), "--fit", str(tmp_path / "list.json")])
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_fits_to_a_folder_and_says_what_it_holds(repository, tmp_path):
    (tmp_path / "clips").mkdir()
    shutil.copy(repository / "tests/data/arabic-mini/spk_06_35.flac", tmp_path / "clips")
    (tmp_path / "clips" / "x.wav").write_text("no audio")
    small = ("--hidden-size", "32", "--layers", "1")
    result = CliRunner().invoke(cli.main, [str(tmp_path / "out"), "--fit", str(tmp_path / "clips"), *small])
    assert result.exit_code == 0, result.output
    assert (
        "gives back 1 clip, below 6 kHz; other sounds only roughly (0 more clips not read, 1 skipped)" in result.output
    )
    assert f"skipped: {tmp_path}/clips/x.wav: audio_unreadable" in result.output
    wave = decode((tmp_path / "clips" / "spk_06_35.flac").read_bytes(), AudioLimits()).wave
    codec = load_codec(tmp_path / "out" / "codec")
    assert snr_db(below_6_khz(wave), codec.decode(codec.encode(wave))[: len(wave)]) > 30
