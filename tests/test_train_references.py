"""References drawn of the speaker's other clips: never the target or its audio, never held out, with lengths that are true."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_sets import with_clips, with_reference_of, write_columns

from shards.columns import COLUMNS_DTYPE, audio_hash
from shards.config import SequenceSection
from shards.errors import ConfigError
from shards.index import INDEX_DTYPE, read_index
from shards.reader import SampleReader
from shards.sample import unpack_sample
from shards.sequence import SequenceBuilder
from train.config import DataSource, TrainSection
from train.data.loader import LoaderShare, PlannedSamples
from train.data.plan import Planner, PlanSettings
from train.data.planned_source import PlannedSource
from train.data.references import LISTED, SpeakerReferences
from train.data.stages import RawSample, with_donor
from train.data.streamed_source import StreamedSource
from train.world import ALONE

BUDGET = 400


def lengths_of(rows: np.ndarray) -> np.ndarray:
    texts = rows["num_reference_text_tokens"].astype(np.int64) + rows["num_target_text_tokens"]
    return texts + rows["reference_frames"] + rows["target_frames"]


def fits(rows: np.ndarray) -> np.ndarray:
    return lengths_of(rows) <= BUDGET


CLIP = st.tuples(st.integers(1, 12), st.integers(10, 250))  # audio, frames
ROW = st.tuples(st.integers(0, 3), CLIP, CLIP, st.booleans())  # speaker, reference, target, held out with its speaker
DATA = st.lists(ROW, min_size=1, max_size=60)


def made_up(rows) -> tuple[np.ndarray, np.ndarray]:
    """Index and columns; frames of an audio are those of its first clip, as a file has one length."""
    index, columns = np.zeros(len(rows), INDEX_DTYPE), np.zeros(len(rows), COLUMNS_DTYPE)
    frames: dict[tuple[int, int], int] = {}
    for number, (speaker, reference, target, _) in enumerate(rows):
        index["speaker"][number] = speaker
        for side, (audio, length) in (("reference", reference), ("target", target)):
            index[f"{side}_frames"][number] = frames.setdefault((speaker, audio), length)
            index[f"num_{side}_text_tokens"][number] = audio
            columns[f"{side}_audio"][number] = 1000 * (speaker + 1) + audio
    index["shard"] = np.arange(len(rows)) // 8
    return index, columns


def references_of(rows, has_hashes: bool, with_targets: bool = True, seed: int = 0):
    index, columns = made_up(rows)
    is_trained = index["speaker"] != 3
    names = [columns if has_hashes else None]
    drawn = SpeakerReferences(index, names, (0, len(index)), is_trained, seed, fits, with_targets)
    return index, columns, is_trained, drawn


@settings(max_examples=150, deadline=None)
@given(rows=DATA, has_hashes=st.booleans(), with_targets=st.booleans(), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_a_reference_is_another_clip_of_the_same_speaker(rows, has_hashes, with_targets, seed, epoch):
    index, columns, is_trained, drawn = references_of(rows, has_hashes, with_targets, seed)
    trained = np.flatnonzero(is_trained)
    clips = drawn.clips(epoch, trained)
    found = drawn.with_clips(trained, clips)
    for row, clip, seen in zip(trained.tolist(), clips.tolist(), found, strict=True):
        if clip == LISTED:
            assert seen == index[row]
            continue
        donor, side = clip >> 1, "target" if clip % 2 else "reference"
        assert with_targets or side == "reference"
        assert index["speaker"][donor] == index["speaker"][row]
        assert is_trained[donor]
        assert columns[f"{side}_audio"][donor] != columns["target_audio"][row]
        assert seen["reference_frames"] == index[f"{side}_frames"][donor]
        assert seen["num_reference_text_tokens"] == index[f"num_{side}_text_tokens"][donor]
        assert fits(found[[trained.tolist().index(row)]]).all()
    assert drawn.clips(epoch, trained[::-1])[::-1].tolist() == clips.tolist()  # one row's draw needs no other's


@settings(max_examples=60, deadline=None)
@given(rows=DATA)
def test_every_other_clip_of_a_speaker_can_be_drawn(rows):
    index, columns, is_trained, drawn = references_of(rows, has_hashes=True)
    everywhere = np.concatenate([columns["target_audio"], columns["reference_audio"]])
    speakers = np.concatenate([index["speaker"], index["speaker"]])
    num_listed = 0
    for row in np.flatnonzero(is_trained):
        others = set(everywhere[speakers == index["speaker"][row]].tolist()) - {int(columns["target_audio"][row])}
        assert drawn._sizes(np.array([row]))[0] == len(others)
        num_listed += not others
    assert drawn.num_listed == num_listed


@settings(max_examples=60, deadline=None)
@given(rows=DATA, seed=st.integers(0, 2), epoch=st.integers(0, 2), window=st.sampled_from([8, 1000]))
def test_packs_with_drawn_references_keep_their_budget(rows, seed, epoch, window):
    index, _, is_trained, drawn = references_of(rows, has_hashes=True, seed=seed)
    keep = lambda found: found["speaker"] != 3  # noqa: E731
    if not (is_trained & fits(index)).any():
        return
    planner = Planner(index, lengths_of, PlanSettings(seed, BUDGET, 2, window_samples=window), keep, references=drawn)
    seen: list[int] = []
    for number in range(planner.num_windows(epoch)):
        for pack in planner.window(epoch, number).packs():
            assert lengths_of(drawn.found(epoch, pack)).sum() <= BUDGET
            seen += pack.tolist()
    assert sorted(seen) == np.flatnonzero(is_trained & fits(index)).tolist()
    again = Planner(index, lengths_of, PlanSettings(seed, BUDGET, 2, window_samples=window), keep, references=drawn)
    first = 2 * planner.total_steps(epoch)
    whole = list(itertools.islice(planner.rank_packs(0, 0, 1), first + 4))[first:]
    halves = [list(itertools.islice(again.rank_packs(first // 2, rank, 2), 2)) for rank in range(2)]
    joined = [pack for pair in zip(*halves, strict=True) for pack in pair]
    assert [(e, pack.tolist()) for e, pack in joined] == [(e, pack.tolist()) for e, pack in whole]


def test_epochs_and_seeds_draw_anew():
    rows = [(0, (30, 20), (number + 1, 40 + number), False) for number in range(50)]
    draws = [references_of(rows, True, seed=seed)[3].clips(epoch, np.arange(50)) for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(draws, 2):
        assert (one == other).mean() < 0.2
    assert len(np.unique(draws[0])) > 20


def test_the_same_name_in_two_sets_is_two_people_for_references():
    index, columns = made_up([(0, (1, 20), (number + 2, 30), False) for number in range(8)])
    drawn = SpeakerReferences(index, [columns[:4], columns[4:]], (0, 4, 8), np.ones(8, bool), 0, fits, True)
    for epoch in range(5):
        clips = drawn.clips(epoch, np.arange(8))
        donors = clips[clips != LISTED] >> 1
        assert ((donors < 4) == (np.flatnonzero(clips != LISTED) < 4)).all()


# --- real samples ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builder(tokenizer) -> SequenceBuilder:
    return SequenceBuilder(tokenizer, SequenceSection())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_dataset, make_sample) -> Path:
    """Four speakers of eight clips, one of a single clip; some targets are references of another row."""
    samples = []
    for seed in range(33):
        speaker = f"speaker-{seed % 4}" if seed < 32 else "once"
        sample = make_sample(seed, 5 + seed % 6, 9 + seed % 7, speaker=speaker)
        audio = f"{speaker} {(seed + 4) % 32}" if seed < 32 else "once"
        samples.append(with_clips(sample, audio if seed < 16 else f"r{seed}", f"{speaker} {seed}"))
    last = with_clips(samples[-1], "once 32", "once 32")  # its reference is its target
    samples[-1] = last
    return write_columns(make_dataset(tmp_path_factory.mktemp("drawn"), samples), samples)


def prepared(folder: Path, builder: SequenceBuilder, **values) -> PlannedSource:
    asked = TrainSection(**{"batch_tokens": 700, "packs_per_step": 2, "reference": "same_speaker", **values})
    source = PlannedSource(str(folder) if not asked.data else "", asked)
    source.prepare(builder)
    return source


def heard(source: PlannedSource, epoch: int):
    """(key, audio of the reference, audio of the target) of all samples of an epoch, as the loader reads them."""
    planner = source.planner

    def packs():
        first = planner.total_steps(epoch)
        return itertools.islice(planner.rank_packs(first, 0, 1), planner.num_steps(epoch) * 2)

    raws: list[RawSample] = list(PlannedSamples(source.reader, source.index, packs, planner, source._builder, None))
    for raw in raws:
        assert not raw.reason
        if raw.pack_size:
            facts = with_donor(unpack_sample(raw.key, raw.members), raw.donor).facts
            yield raw.key, audio_hash(facts.reference), audio_hash(facts.target)


def test_real_packs_are_as_long_as_planned_in_every_epoch(dataset, builder):
    source = prepared(dataset, builder)
    steps = source.planner.total_steps(3)
    loaded = list(itertools.islice(source.loaded_packs(0, LoaderShare()), 2 * steps))
    assert not any(pack.faults for pack in loaded)  # a sequence of another length than the plan's is a fault
    assert sum(len(pack.batch.keys) for pack in loaded) == 3 * 33
    epochs = [{key: reference for key, reference, _ in heard(source, epoch)} for epoch in range(3)]
    moved = [key for key in epochs[0] if len({epoch[key] for epoch in epochs}) > 1]
    assert len(moved) > 25


def test_drawn_references_stay_on_their_side_of_the_border(dataset, builder):
    """No held-out audio comes in training, in any of its roles, over three epochs, by hash."""
    for seed in range(4):
        source = prepared(dataset, builder, seed=seed, validation_fraction=0.3)
        columns = source._data.columns()
        keep = source._held_out
        assert keep is not None
        assert columns is not None
        held_out = keep(source.index)
        away = set(columns["target_audio"][held_out].tolist()) | set(columns["reference_audio"][held_out].tolist())
        for epoch in range(3):
            for _, reference, target in heard(source, epoch):
                assert reference not in away
                assert target not in away
                assert reference != target or target == columns["target_audio"][32]


@pytest.mark.parametrize("known", ["hashes", "hashes of some", "codes"])
@pytest.mark.parametrize("reference", ["as_listed", "same_speaker"])
def test_no_audio_of_validation_data_is_heard_in_training(
    known, reference, dataset, builder, tmp_path, make_dataset, make_sample
):
    """In any role over three epochs, by hash, of speakers that both sets have; what would be is left out and counted."""
    own = [make_sample(300 + number, 6, 12 + number, speaker=f"speaker-{number % 4}") for number in range(8)]
    held_out = [with_clips(sample, f"held out {n} reference", f"held out {n}") for n, sample in enumerate(own)]
    trained = list(SampleReader(dataset).read_all(read_index(dataset / "index.npy")))
    held_out[:3] = [
        with_reference_of(sample, other) for sample, other in zip(held_out[:3], trained[16:19], strict=True)
    ]
    folder = make_dataset(tmp_path / "held-out", held_out)
    if known != "codes":
        write_columns(folder, held_out)
    if known == "hashes of some":  # as of shards that another tool wrote
        columns = np.load(folder / "columns.npy")
        columns["reference_audio"][1::2] = 0
        np.save(folder / "columns.npy", columns)
    asked = TrainSection(batch_tokens=700, packs_per_step=2, reference=reference, validation_data=str(folder))
    source = PlannedSource(str(dataset), asked)
    places = source.require_apart()
    assert len(places) == 3
    source.leave_out(places)
    source.prepare(builder)
    packs = source.held_out(ALONE)
    assert packs
    evaluated = {key for loaded in packs.loaded_packs() for key in loaded.batch.keys}
    assert len(evaluated) == 5
    assert {sample.key for sample in source.listening_samples(8)} == evaluated
    samples = SampleReader(folder).read_all(read_index(folder / "index.npy"))
    away = {
        audio_hash(audio)
        for sample in samples
        if sample.key in evaluated
        for audio in (sample.facts.reference, sample.facts.target)
    }
    for epoch in range(3):
        for _, *roles in heard(source, epoch):
            assert away.isdisjoint(roles)


def test_speakers_of_one_clip_keep_theirs_and_are_counted(dataset, builder, caplog):
    logging.getLogger("train").propagate = True
    caplog.set_level(logging.INFO)
    source = prepared(dataset, builder)
    source.describe()
    assert "1 of 33 samples keep the reference of the list" in caplog.text
    (last,) = [found for found in heard(source, 0) if found[0].endswith("32")]
    assert last[1] == last[2]


def test_drawn_references_and_mixed_sets_go_together(dataset, tmp_path, make_dataset, make_sample, builder):
    samples = [make_sample(200 + seed, 6, 12 + seed, speaker="speaker-1") for seed in range(5)]
    other = make_dataset(tmp_path / "other", samples)  # without columns
    data = [DataSource(path=str(dataset), weight=1.0), DataSource(path=str(other), weight=1.0)]
    source = prepared(dataset, builder, data=data)
    loaded = list(itertools.islice(source.loaded_packs(0, LoaderShare()), 2 * source.planner.total_steps(2)))
    assert not any(pack.faults for pack in loaded)
    assert sum(len(pack.batch.keys) for pack in loaded) == sum(map(source.planner.epoch_samples, range(2)))


def test_drawn_references_and_dropped_texts_go_together(dataset, tokenizer):
    source = prepared(dataset, SequenceBuilder(tokenizer, SequenceSection(reference_text_dropout=0.5)))
    loaded = list(itertools.islice(source.loaded_packs(0, LoaderShare()), 2 * source.planner.total_steps(3)))
    assert not any(pack.faults for pack in loaded)
    assert sum(len(pack.batch.keys) for pack in loaded) == 3 * 33


def test_a_damaged_donor_is_named_with_its_sample(dataset, tmp_path, make_dataset, make_sample, builder):
    from damage import flip_payload

    folder = make_dataset(tmp_path / "data", [make_sample(seed, 6, 12 + seed, speaker="a") for seed in range(6)])
    flip_payload(folder, 2)
    source = prepared(folder, builder)
    loaded = list(itertools.islice(source.loaded_packs(0, LoaderShare()), 2 * source.planner.total_steps(1)))
    faults = [fault for pack in loaded for fault in pack.faults]
    assert any(fault.key == "000000000002" for fault in faults)
    assert all(fault.key == "000000000002" or "its reference of this epoch" in fault.reason for fault in faults)


def test_what_cannot_draw_references_says_so(dataset, tokenizer):
    with pytest.raises(ConfigError, match=r'train\.reference = "same_speaker".*stream'):
        StreamedSource(str(dataset), TrainSection(reference="same_speaker", loader="stream", max_steps=2))
    as_written = SequenceBuilder(tokenizer, SequenceSection(layout="as_written"))
    with pytest.raises(ConfigError, match=r"same_speaker.*as_written"):
        prepared(dataset, as_written)
