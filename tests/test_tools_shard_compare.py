"""Two data sets side by side, and what a held-out set shares with the one trained on: by tool and at the start of training."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from shards.columns import columns_of, columns_row, common_rows
from shards.errors import ConfigError
from shards.sample import write_npy
from tools.inspect_shards.cli import main
from tools.inspect_shards.compare import distance
from train.config import TrainSection
from train.data.planned_source import PlannedSource


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def make_set(make_dataset, make_sample):
    """A function (folder, seeds, {seed: fields of the target audio}, {seed: target text}) -> data set with columns."""

    def make(
        folder: Path, seeds: range, audio: dict | None = None, texts: dict | None = None, columns: bool = True
    ) -> Path:
        samples = []
        for seed in seeds:
            sample = make_sample(seed, 5 + seed, 8 + seed, speaker=f"speaker-{seed}")
            facts = sample.facts
            said = list(facts.texts)
            said[facts.target_text] = (texts or {}).get(seed, f"جملة رقم {seed} وحدها")
            target = {"sha256": f"{seed:064d}", "path": f"clip-{seed}.wav", **(audio or {}).get(seed, {})}
            facts = msgspec.structs.replace(
                facts,
                texts=said,
                target=msgspec.structs.replace(facts.target, **target),
                reference=msgspec.structs.replace(facts.reference, sha256=f"{1000 + seed:064d}"),
            )
            samples.append(dataclasses.replace(sample, facts=facts))
        make_dataset(folder, samples)
        if columns:
            rows = columns_of([columns_row(sample.facts) for sample in samples])
            (folder / "columns.npy").write_bytes(write_npy(rows))
        return folder

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_set) -> Path:
    return make_set(tmp_path_factory.mktemp("trained"), range(6))


@pytest.mark.parametrize("columns", [True, False])
def test_the_same_audio_under_another_name_is_found(trained, make_set, tmp_path: Path, columns: bool):
    held_out = make_set(tmp_path / "b", range(20, 24), {21: {"sha256": f"{3:064d}"}}, columns=columns)
    done = run("compare", trained, held_out, "--json")
    assert done.exit_code == 1, done.output
    common = json.loads(done.stdout)["common"]
    assert (common["audio"], common["texts"], common["speakers"]) == (1, 0, 0)
    assert "clip-21.wav" in common["audio_samples"][0]


def test_a_reference_of_one_that_the_other_learns_is_found(trained, make_set, tmp_path: Path):
    held_out = make_set(tmp_path / "b", range(20, 22), {20: {"sha256": f"{1002:064d}"}})
    assert run("compare", trained, held_out).exit_code == 1


def test_other_segments_of_one_file_are_other_audio(trained, make_set, tmp_path: Path):
    held_out = make_set(tmp_path / "b", range(20, 22), {20: {"sha256": f"{3:064d}", "offset_s": 30.0}})
    assert run("compare", trained, held_out).exit_code == 0


def test_texts_that_sound_alike_are_counted(trained, make_set, tmp_path: Path):
    held_out = make_set(tmp_path / "b", range(20, 24), texts={22: "جُملةٌ رقم ٤، وحدها!"})
    done = run("compare", trained, held_out, "--json")
    assert done.exit_code == 0, done.output
    common = json.loads(done.stdout)["common"]
    assert (common["texts"], common["text_share"]) == (1, 0.25)


def test_a_set_is_all_of_itself_and_like_itself(trained):
    done = run("compare", trained, trained, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["common"]["audio"] == found["common"]["texts"] == found["common"]["speakers"] == 6
    assert {part["distance"] for part in found["distributions"].values()} == {0.0}
    assert set(found["fingerprints"].values()) == {"same"}


def test_the_table_shows_both(trained, make_set, tmp_path: Path):
    done = run("compare", trained, make_set(tmp_path / "b", range(20, 29)))
    assert done.exit_code == 0, done.output
    assert "target_seconds, median" in done.stdout
    assert "common texts: 0" in done.stdout
    assert "codec: same" in done.stdout


@pytest.mark.parametrize("broken", ["dataset.json", "index.npy", "columns.npy"])
def test_damaged_sets_are_one_line(trained, make_set, tmp_path: Path, broken: str):
    other = make_set(tmp_path / "b", range(3))
    (other / broken).write_bytes(b"\x00 not what it was")
    for pair in ((trained, other), (other, trained)):
        done = run("compare", *pair)
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert broken in done.stderr
        assert done.stdout == ""
    assert run("compare", trained).exit_code == 2
    assert run("compare", trained, tmp_path / "nothing").exit_code == 1


def test_an_empty_set_shares_nothing(trained, make_set, tmp_path: Path):
    empty = make_set(tmp_path / "b", range(0))
    for pair in ((trained, empty), (empty, trained)):
        assert run("compare", *pair).exit_code == 0


def test_unknown_hashes_are_like_nothing():
    ours, theirs = np.array([0, 5, 7], np.uint64), np.array([0, 7], np.uint64)
    assert common_rows(ours, theirs).tolist() == [2]


def test_distance_of_distributions():
    assert distance(np.arange(4.0), np.arange(4.0)) == 0
    assert distance(np.zeros(3), np.ones(5)) == 1
    assert distance(np.array([0.0, 1, 2, 3]), np.array([2.0, 3])) == 0.5


def check(trained: Path, held_out: Path) -> None:
    section = TrainSection(batch_tokens=700, packs_per_step=1, validation_data=str(held_out))
    PlannedSource(str(trained), section).require_apart()


def test_training_refuses_audio_of_another_speaker_and_partner(trained, make_set, tmp_path: Path):
    held_out = make_set(tmp_path / "b", range(20, 24), {21: {"sha256": f"{3:064d}"}})
    with pytest.raises(ConfigError, match=r"1 of its 4 samples have audio of training \(clip-21.wav"):
        check(trained, held_out)


def test_training_warns_of_texts_it_learns(trained, make_set, tmp_path: Path, caplog):
    logging.getLogger("train").propagate = True
    check(trained, make_set(tmp_path / "apart", range(20, 24)))
    assert "texts" not in caplog.text
    check(trained, make_set(tmp_path / "b", range(20, 24), texts={22: "جملة رقم 4 وحدها", 23: "جملة رقم 5 وحدها"}))
    assert "2 of its 4 texts are trained on as well (clip-22.wav" in caplog.text


def test_training_says_where_texts_are_not_compared(trained, make_set, tmp_path: Path, caplog):
    logging.getLogger("train").propagate = True
    caplog.set_level(logging.DEBUG, "train")
    check(trained, make_set(tmp_path / "b", range(20, 24), columns=False))
    assert "texts are not compared" in caplog.text
