"""`preprocess slice` where it cuts: known pauses between real clips, the network against its own wheel, odd shapes of speech."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from preprocess.slicing.cutting import CutRules, Unit, cut, units_of
from preprocess.slicing.run import SliceRequest, slice_folder
from preprocess.slicing.voice_activity import FRAME_S, VoiceActivity, _wheel_folder, loud_elsewhere, speech_stretches
from preprocess.sources import SourceRow, read_rows

RATE = 24000
PAUSES_S = {"spk_00": (0.34, 0.5, 0.9, 0.4, 2.5), "spk_01": (0.6, 0.32, 1.2, 0.7, 4.0), "spk_02": (0.45,) * 5}


class Joined:
    """A recording of one speaker's clips with known pauses: where each clip's sound begins and ends, in samples."""

    def __init__(self, clips: list[Path], pauses_s: tuple[float, ...], noise_db: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        parts, self.sounds, self.clips = [np.zeros(RATE // 2)], [], []
        for clip, pause_s in zip(clips, (*pauses_s, 0.5), strict=True):
            wave, rate = soundfile.read(clip)
            assert rate == RATE
            loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
            wave = wave[loud[0] : loud[-1] + 1]
            begin = sum(map(len, parts))
            self.sounds.append((begin, begin + len(wave)))
            self.clips.append(clip)
            parts += [wave, np.zeros(round(pause_s * RATE))]
        clean = np.concatenate(parts)
        self.wave = clean + rng.standard_normal(len(clean)) * 10 ** (noise_db / 20)
        self.clean = clean

    def is_quiet_at(self, sample: int) -> bool:
        """Within 40 ms nothing louder than -34 dB of the peak, the sound of the clips alone."""
        around = self.clean[max(0, sample - RATE // 25) : sample + RATE // 25]
        return bool(np.abs(around).max() < 0.02 * np.abs(self.clean).max())


@pytest.fixture(scope="module")
def joined(repository: Path) -> dict[str, Joined]:
    data = repository / "tests" / "data" / "arabic-mini"
    noises_db = {"spk_00": -200.0, "spk_01": -65.0, "spk_02": -50.0}
    return {
        speaker: Joined(sorted(data.glob(f"{speaker}_*.flac")), pauses_s, noises_db[speaker], seed)
        for seed, (speaker, pauses_s) in enumerate(PAUSES_S.items())
    }


@pytest.fixture(scope="module")
def sliced(joined: dict[str, Joined], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three recordings cut by the default rules: recordings/, list.jsonl, list/."""
    root = tmp_path_factory.mktemp("slice")
    for speaker, recording in joined.items():
        (root / "recordings" / speaker).mkdir(parents=True)
        soundfile.write(root / "recordings" / speaker / "talk.wav", recording.wave, RATE, subtype="PCM_16")
    slice_folder(request(root))
    return root


def request(root: Path, **changes) -> SliceRequest:
    fields = {"source": root / "recordings", "out": root / "list.jsonl", "pieces": root / "list", "without_text": True}
    return SliceRequest(**{**fields, **changes})


def rows_of(root: Path) -> dict[str, dict]:
    """Rows by the path of their target."""
    lines = (root / "list.jsonl").read_text().splitlines()
    return {row["messages"][2]["content"][1]["audio_url"]: row for row in map(json.loads, lines)}


def bounds_of(root: Path, speaker: str) -> Iterator[tuple[int, int]]:
    for row in rows_of(root).values():
        if row["speaker"] == speaker:
            yield round(row["recording_start_s"] * RATE), round(row["recording_end_s"] * RATE)


@pytest.mark.parametrize("speaker", PAUSES_S)
def test_pieces_hold_all_speech(sliced: Path, joined: dict[str, Joined], speaker: str):
    bounds = list(bounds_of(sliced, speaker))
    covered = np.zeros(len(joined[speaker].wave), bool)
    for start, end in bounds:
        assert not covered[start:end].any(), "no second of the recording is in two pieces"
        covered[start:end] = True
    for begin, end in joined[speaker].sounds:
        loud = np.abs(joined[speaker].clean[begin:end]) > 0.02 * np.abs(joined[speaker].clean).max()
        assert covered[begin:end][loud].all()


@pytest.mark.parametrize("speaker", PAUSES_S)
def test_no_word_is_cut(sliced: Path, joined: dict[str, Joined], speaker: str):
    recording = joined[speaker]
    bounds = list(bounds_of(sliced, speaker))
    assert len(bounds) >= 2, "something was cut"
    for start, end in bounds:
        assert recording.is_quiet_at(start), f"{start / RATE:.3f}"
        assert recording.is_quiet_at(end), f"{end / RATE:.3f}"
        assert 3.0 <= (end - start) / RATE <= 15.0


@pytest.mark.parametrize("speaker", PAUSES_S)
def test_edges_are_0_1_to_0_2_seconds(sliced: Path, joined: dict[str, Joined], speaker: str):
    recording = joined[speaker]
    loud = np.flatnonzero(np.abs(recording.clean) > 0.02 * np.abs(recording.clean).max())
    for start, end in bounds_of(sliced, speaker):
        inside = loud[(loud >= start) & (loud < end)]
        assert 0.1 <= (inside[0] - start) / RATE <= 0.4, "what is audible and below -34 dB of the peak is on top"
        assert 0.1 <= (end - inside[-1]) / RATE <= 0.4


def test_pieces_are_the_recording_bit_for_bit(sliced: Path):
    for path, row in rows_of(sliced).items():
        piece, rate = soundfile.read(path, dtype="int16")
        whole, _ = soundfile.read(sliced / "recordings" / row["recording"], dtype="int16")
        first, last = round(row["recording_start_s"] * rate), round(row["recording_end_s"] * rate)
        np.testing.assert_array_equal(piece, whole[first:last][: len(piece)])
        assert abs(len(piece) - (last - first)) <= 3  # of rounding to 0.1 ms


def test_the_list_has_the_form_stage_one_takes(sliced: Path):
    rows = list(read_rows(sliced / "list.jsonl"))
    assert all(isinstance(row, SourceRow) for row in rows)
    assert {row.chat.speaker for row in rows if isinstance(row, SourceRow)} == set(PAUSES_S)


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:DeprecationWarning")
def test_the_network_is_the_wheels_own(joined: dict[str, Joined]):
    import torch

    wave = joined["spk_01"].wave[: RATE * 8].astype(np.float32)  # played too slowly, which the comparison does not mind
    ours, _ = VoiceActivity().listen([wave[:1000], wave[1000:50001], wave[50001:]])
    assert ours.max() > 0.9
    assert ours.min() < 0.1
    theirs = torch.jit.load(str(_wheel_folder() / "data" / "silero_vad.jit"))
    frames = np.pad(wave, (0, -len(wave) % 512)).reshape(-1, 512)
    with torch.inference_mode():
        expected = [theirs(torch.from_numpy(frame), 16000).item() for frame in frames]
    np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_silence_and_noise_hold_no_speech():
    voice = VoiceActivity()
    noise = np.random.default_rng(0).standard_normal(16000 * 10).astype(np.float32) * 0.05
    for wave in (np.zeros(16000 * 10, np.float32), noise, np.zeros(0, np.float32), np.zeros(5, np.float32)):
        assert speech_stretches(*voice.listen([wave])) == []


def test_loud_parts_that_are_no_speech_are_told():
    levels = np.full(1000, -70.0)
    for start, end, level_db in ((100, 300, -25), (400, 450, -30), (455, 500, -30), (600, 620, -20), (700, 800, -50)):
        levels[start:end] = level_db
    speech = [(100 * FRAME_S, 300 * FRAME_S)]
    assert loud_elsewhere(levels, speech, []) == [(400 * FRAME_S, 500 * FRAME_S)], "of a second and more, near speech"
    assert loud_elsewhere(levels, speech, [(390 * FRAME_S, 510 * FRAME_S)]) == [], "in a piece"
    assert [start for start, _ in loud_elsewhere(levels, [], [])] == [100 * FRAME_S, 400 * FRAME_S]


def test_speech_without_a_pause_is_skipped_not_cut():
    units = units_of([(0.5, 5.0), (5.2, 12.0), (12.1, 18.0), (19.0, 24.0)], 0.3)
    pieces, skipped = cut(units, 25.0, CutRules())
    assert [(part.start_s, part.end_s, part.reason) for part in skipped] == [(0.5, 18.0, "no_pause")]
    assert [(round(piece.start_s, 2), round(piece.end_s, 2)) for piece in pieces] == [(18.8, 24.2)]


def test_a_word_alone_is_skipped_as_too_short():
    pieces, skipped = cut(units_of([(1, 2), (40, 45)], 0.3), 50, CutRules())
    assert [part.reason for part in skipped] == ["too_short"]
    assert len(pieces) == 1


def test_a_short_answer_joins_its_neighbour():
    pieces, skipped = cut(units_of([(1, 9), (9.5, 10), (10.6, 18)], 0.3), 20, CutRules())
    assert skipped == []
    assert sorted(len(piece.units) for piece in pieces) == [1, 2]


def test_units_of_two_labels_never_share_a_piece():
    units = [Unit(0, 4, "a"), Unit(4.5, 8, "b"), Unit(8.4, 12, "b")]
    pieces, skipped = cut(units, 12, CutRules())
    assert skipped == []
    assert [{unit.label for unit in piece.units} for piece in pieces] == [{"a"}, {"b"}]


def test_no_cut_where_a_unit_goes_on():
    units = [Unit(0, 7, goes_on=True), Unit(7.5, 14), Unit(14.5, 19)]
    pieces, _ = cut(units, 19, CutRules())
    assert [len(piece.units) for piece in pieces] == [2, 1]


@pytest.mark.parametrize("seed", range(5))
def test_random_speech_is_covered_once_or_named(seed: int):
    rng = np.random.default_rng(seed)
    stretches, place = [], float(rng.uniform(0, 1))
    for _ in range(200):
        end = place + float(rng.exponential(3)) + 0.06
        stretches.append((place, end))
        place = end + float(rng.exponential(0.5)) + 0.03
    rules = CutRules()
    pieces, skipped = cut(units_of(stretches, rules.min_pause_s), place, rules)
    parts = sorted([(part.start_s, part.end_s) for part in [*pieces, *skipped]])
    assert all(left[1] <= right[0] + 1e-9 for left, right in itertools.pairwise(parts))
    for start, end in stretches:
        assert any(first <= start and end <= last for first, last in parts)
    assert all(rules.min_s - 1e-6 <= piece.duration_s <= rules.max_s + 1e-6 for piece in pieces)
