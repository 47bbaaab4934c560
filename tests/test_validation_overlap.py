"""train.validation_data against the data trained on: the same set, common audio, common voices, and sound ones."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from mixed_sets import with_reference_of

from shards.errors import ConfigError
from shards.sample import Sample
from tools.evaluate.dataset_items import chosen_rows
from train.config import TrainSection
from train.data.held_out_rows import without_heard
from train.data.planned_source import PlannedSource
from train.data.streamed_source import StreamedSource
from train.data.validation_overlap import look_alikes
from train.data.validation_split import choose_speakers, of_speakers
from train.loop import RunOptions, train
from train.world import ALONE


@pytest.fixture(scope="module")
def samples(make_sample) -> list[Sample]:
    return [make_sample(seed, 5 + seed, 8 + seed, speaker=f"speaker-{seed % 4}") for seed in range(12)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, make_dataset, samples) -> Path:
    return make_dataset(tmp_path_factory.mktemp("trained"), samples)


@pytest.fixture
def compare(dataset, make_dataset, tmp_path, caplog):
    """A function held-out samples -> log text of the comparison with `dataset`."""
    logging.getLogger("train").propagate = True
    caplog.set_level(logging.INFO)

    def compare(held_out: list[Sample]) -> str:
        folder = make_dataset(tmp_path / "held-out", held_out)
        source = PlannedSource(str(dataset), section(folder))
        source.leave_out(source.require_apart())
        return caplog.text

    return compare


def section(folder: Path, **values) -> TrainSection:
    return TrainSection(batch_tokens=700, packs_per_step=1, validation_data=str(folder), **values)


def by(sample: Sample, speaker: str) -> Sample:
    return dataclasses.replace(sample, facts=msgspec.structs.replace(sample.facts, speaker=speaker))


def turned(sample: Sample) -> Sample:
    """Another row of the same list: reference and target change places, with their texts."""
    facts = sample.facts
    swapped = msgspec.structs.replace(
        facts,
        reference=facts.target,
        target=facts.reference,
        texts=[facts.texts[0], facts.texts[3], facts.texts[2], facts.texts[1]],
        text_token_counts=[facts.text_token_counts[i] for i in (0, 3, 2, 1)],
    )
    ids = np.concatenate([sample.text_item_ids(i) for i in (0, 3, 2, 1)])
    return dataclasses.replace(
        sample,
        facts=swapped,
        text_ids=ids,
        reference_codes=sample.target_codes,
        target_codes=sample.reference_codes,
    )


@pytest.mark.parametrize("copied", [False, True])
def test_the_training_set_is_not_held_out_data(dataset, short_config, tmp_path, copied):
    place = shutil.copytree(dataset, tmp_path / "copy") if copied else dataset
    config = short_config(f"train.validation_data={place}")
    with pytest.raises(
        ConfigError, match=r"validation_data = .* is the data set that is trained on \(12 samples"
    ) as told:
        train(config, dataset, tmp_path / "run", RunOptions())
    assert "give another one, or hold out speakers of this one with train.validation_fraction" in str(told.value)


def test_common_audio_is_refused_with_count_and_example(compare, samples, make_sample):
    others = [make_sample(seed, speaker="other") for seed in range(50, 55)]
    with pytest.raises(
        ConfigError, match=r"at least 2 clips of it are trained on .*sample 000000000003\), held out"
    ) as told:
        compare([*others, *samples[3:5]])
    assert "run preprocess again" in str(told.value)


def test_common_audio_is_found_under_another_speaker(compare, samples):
    with pytest.raises(ConfigError, match="at least 1 clips of it are trained on"):
        compare([by(samples[7], "somebody else")])


def test_a_reference_that_was_a_target_is_common_audio(compare, samples):
    with pytest.raises(ConfigError, match="at least 2 clips of it are trained on"):
        compare([turned(samples[7])])


def test_samples_with_references_of_training_are_left_out(compare, samples, make_sample):
    """A speaker's one prompt in both sets: nothing that is learned is held out, but it is heard."""
    shared = with_reference_of(make_sample(60, 5, 40, speaker="speaker-1"), samples[1])
    said = compare([shared, make_sample(61, speaker="new"), make_sample(62, speaker="new")])
    assert "1 of its 3 samples have a reference that is heard in training as well; they are not evaluated with" in said
    assert "1 of its 2 speakers, with 1 of its 3 samples, are trained on as well: speaker-1; their losses" in said


def test_held_out_data_whose_references_are_heard_are_refused(compare, samples, make_sample):
    everything = [with_reference_of(make_sample(60 + number, 5, 40), samples[number]) for number in range(3)]
    with pytest.raises(ConfigError, match="the references of all its 3 samples are heard in training as well"):
        compare(everything)


def test_samples_of_equal_lengths_are_not_taken_for_the_same(compare, samples):
    """Same speaker, lengths and texts, other codes."""
    rng = np.random.default_rng(1)
    others = [
        dataclasses.replace(
            sample,
            target_codes=rng.integers(0, 1024, sample.target_codes.shape).astype(np.uint16),
            reference_codes=rng.integers(0, 1024, sample.reference_codes.shape).astype(np.uint16),
        )
        for sample in samples
    ]
    assert "4 of its 4 speakers, with 12 of its 12 samples" in compare(others)


def test_sound_held_out_data_are_not_remarked_on(compare, make_sample):
    assert compare([make_sample(seed, speaker="new") for seed in range(70, 74)]) == ""


def test_a_stream_is_compared_by_the_data_set_its_shards_lie_in(dataset, samples, make_dataset, tmp_path):
    held_out = make_dataset(tmp_path / "held-out", [samples[2]])
    stream = {"loader": "stream", "max_steps": 2}
    tars = str(dataset / "shards" / "*" / "*.tar")
    for location, folder, told in (
        (tars, dataset, "is the data set that is trained on"),
        (dataset, held_out, "1 clips"),
    ):
        with pytest.raises(ConfigError, match=told):
            StreamedSource(str(location), section(folder, **stream)).require_apart()


def test_foreign_shards_are_logged_as_not_compared(dataset, samples, make_dataset, tmp_path, caplog):
    logging.getLogger("train").propagate = True
    caplog.set_level(logging.INFO)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(next(dataset.rglob("*.tar")), foreign / "a.tar")
    held_out = make_dataset(tmp_path / "held-out", [samples[2]])
    StreamedSource(str(foreign), section(held_out, loader="stream", max_steps=2)).require_apart()
    assert "not compared with the stream" in caplog.text


def test_nothing_is_read_behind_a_url_and_that_is_logged(dataset, samples, make_dataset, tmp_path, http_server, caplog):
    logging.getLogger("train").propagate = True
    address = http_server(dataset)
    held_out = make_dataset(tmp_path / "held-out", [samples[2]])
    PlannedSource(address, section(held_out, cache_dir=str(tmp_path / "cache"))).require_apart()
    assert "1 training samples have speaker and lengths of held-out ones" in caplog.text
    assert not [path for path in http_server.gets if path.endswith(".tar")]


def test_look_alikes_beyond_one_chunk_are_found(monkeypatch, dataset):
    import train.data.validation_overlap as module

    index = PlannedSource(str(dataset), TrainSection()).index
    whole, _ = look_alikes(index, index[9:11])
    monkeypatch.setattr(module, "CHUNK", 5)
    chunked, _ = look_alikes(index, index[9:11])
    assert whole.tolist() == chunked.tolist()
    assert {9, 10} <= set(whole[:2].tolist())
    assert look_alikes(index, index[:0])[0].tolist() == []


def test_audio_with_another_speaker_and_partner_is_found(compare, samples, make_sample):
    """One target of the training set, under another name and behind another reference."""
    with pytest.raises(ConfigError, match="at least 1 clips of it are trained on"):
        compare([with_target_of(make_sample(80, speaker="new"), samples[6])])


def with_target_of(sample: Sample, other: Sample) -> Sample:
    facts, theirs = sample.facts, other.facts
    texts, counts = [*facts.texts[:3], theirs.texts[3]], [*facts.text_token_counts[:3], theirs.text_token_counts[3]]
    ids = np.concatenate([*(sample.text_item_ids(item) for item in range(3)), other.text_item_ids(3)])
    facts = msgspec.structs.replace(facts, texts=texts, text_token_counts=counts, target=theirs.target)
    return dataclasses.replace(sample, facts=facts, text_ids=ids, target_codes=other.target_codes)


def held_out_of(folder: Path) -> tuple[int, int]:
    """(rows that are evaluated with, rows of held-out speakers)."""
    source = PlannedSource(str(folder), TrainSection(batch_tokens=700, packs_per_step=1))
    speakers = choose_speakers(source.index, 0, 0.3)
    trained, held_out = (of_speakers(speakers, inside=inside) for inside in (False, True))
    kept = without_heard(source._data, trained, held_out, ALONE)
    ((_, _, rows),) = chosen_rows([folder], TrainSection(validation_fraction=0.3), [folder])
    assert np.flatnonzero(kept(source.index)).tolist() == rows.tolist(), "evaluate speaks the same"
    return int(kept(source.index).sum()), int(held_out(source.index).sum())


def test_held_out_samples_whose_audio_is_trained_on_are_skipped(make_dataset, samples, tmp_path, caplog):
    """By speakers: a clip that lies in the list under two names would be on both sides."""
    logging.getLogger("train").propagate = True
    caplog.set_level(logging.INFO)
    kept, held_out = held_out_of(make_dataset(tmp_path / "sound", samples))
    assert kept == held_out > 0
    assert caplog.text == ""
    everything = [*samples]
    source = PlannedSource(str(tmp_path / "sound"), TrainSection(batch_tokens=700, packs_per_step=1))
    inside = of_speakers(choose_speakers(source.index, 0, 0.3), inside=True)(source.index)
    first, trained = np.flatnonzero(inside)[0], np.flatnonzero(~inside)[0]
    everything[first] = with_target_of(samples[first], samples[trained])
    kept, held_out = held_out_of(make_dataset(tmp_path / "shared", everything))
    assert kept == held_out - 1
    everything[first] = with_reference_of(samples[first], samples[trained])  # heard, although not learned
    assert held_out_of(make_dataset(tmp_path / "prompt", everything)) == (kept, held_out)
    assert (
        "1 samples of held-out speakers have audio that is heard in training under another name (trained" in caplog.text
    )
    assert "they are not evaluated with" in caplog.text
    for place in np.flatnonzero(inside):
        everything[place] = with_target_of(samples[place], samples[trained])
    with pytest.raises(ConfigError, match="and nothing else is held out: name the speakers in the list"):
        held_out_of(make_dataset(tmp_path / "all", everything))
