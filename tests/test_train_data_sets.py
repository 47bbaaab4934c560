"""Several data sets in one run: read as one, refused where they do not fit, held out together, known to checkpoints."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from mixed_sets import with_clips, write_columns

from shards.config import FeaturesSection, SequenceSection, parse_toml, read_config, to_toml
from shards.errors import CheckpointError, ConfigError, ShardError
from shards.index import hash64
from shards.manifest import Dataset, Fingerprints, digest_of, open_dataset
from shards.sequence import SequenceBuilder
from shards.writer import write_json
from train.cli import main as train_command
from train.config import DataSource, TrainConfig, TrainSection
from train.data.data_sets import short_names
from train.data.loader import LoaderShare
from train.data.planned_source import PlannedSource
from train.data.streamed_source import StreamedSource
from train.loop import RunOptions, train
from train.model.conditioning import CODES, decide_conditioning
from train.probe_learning_rate import probe_rates
from train.run_folder.identity import MUST_BE_EQUAL, ModelFiles, check_identity, make_identity

ALONE_HERE = LoaderShare()
MODEL = ModelFiles(base="a", tokenizer="b", codec="c")


@pytest.fixture(scope="module")
def builder(tokenizer) -> SequenceBuilder:
    return SequenceBuilder(tokenizer, SequenceSection())


@pytest.fixture(scope="module")
def expected(sets) -> Fingerprints:
    return open_dataset(sets[0])[0].fingerprints


@pytest.fixture(scope="module")
def sets(tmp_path_factory, make_dataset, make_sample) -> list[Path]:
    """A large and a small data set with other speakers, in folders of one name."""
    place = tmp_path_factory.mktemp("sets")
    large = [make_sample(seed, 5, 20 + seed % 9, speaker=f"large-{seed % 4}") for seed in range(40)]
    small = [make_sample(100 + seed, 6, 18 + seed, speaker=f"small-{seed % 2}") for seed in range(6)]
    return [make_dataset(place / "one" / "data", large), make_dataset(place / "two" / "data", small)]


def section(*sources: tuple[Path | str, float | None], **values) -> TrainSection:
    data = [DataSource(path=str(path), weight=weight) for path, weight in sources]
    return TrainSection(**{"batch_tokens": 700, "packs_per_step": 2, "data": data, **values})


def prepared(asked: TrainSection, builder: SequenceBuilder, location: str = "") -> PlannedSource:
    source = PlannedSource(location, asked)
    source.prepare(builder)
    return source


def epoch_packs(source: PlannedSource, epoch: int = 0) -> list:
    """Packs of one epoch as they are read, without fillers."""
    planner = source.planner
    first = planner.total_steps(epoch)
    loaded = itertools.islice(source.loaded_packs(first, LoaderShare()), planner.num_steps(epoch) * 2)
    return [pack for pack in loaded if pack.batch.keys]


def test_rows_are_read_from_the_data_set_they_are_of(sets, builder):
    source = prepared(section((sets[0], None), (sets[1], None)), builder)
    packs = epoch_packs(source)
    assert sum(len(pack.batch.keys) for pack in packs) == 46
    assert not any(pack.faults for pack in packs)
    speakers = {int(speaker) for pack in packs for speaker in pack.batch.speakers}
    assert len(speakers) == 6
    small = source.reader.read(source.index[-1])
    assert small.facts.speaker == "small-1"
    assert source.reader.shard_name(source.index[-1]) == "data-2/shards/000/shard-000000.tar"


def test_real_packs_have_the_weights_that_were_asked_for(sets, builder):
    source = prepared(section((sets[0], 1.0), (sets[1], 1.0)), builder)
    frames = {"large": 0, "small": 0}
    names = {hash64(name): name for one in sets for name in open_dataset(one)[0].speakers}
    lengths = {
        (names[int(row["speaker"])], sample.key): int(row["target_frames"])
        for row, sample in zip(source.index, source.reader.read_all(source.index), strict=True)
    }
    for window in range(source.planner.num_windows(0)):
        for row in source.planner.window(0, window).rows:
            sample = source.reader.read(source.index[row])
            frames[sample.facts.speaker.split("-")[0]] += lengths[sample.facts.speaker, sample.key]
    assert abs(frames["large"] / sum(frames.values()) - 0.5) < 0.01
    assert sum(len(pack.batch.keys) for pack in epoch_packs(source)) == source.planner.epoch_samples(0)


def digest_of_packs(
    source: PlannedSource, share: LoaderShare = ALONE_HERE, first: int = 0, count: int = 12
) -> list[str]:
    """A digest of all that the model reads of each pack."""
    found = []
    for pack in itertools.islice(source.loaded_packs(first, share), count):
        batch = pack.batch
        parts = (batch.text_ids, batch.codes, batch.audio_targets, batch.text_targets, batch.segments)
        found.append(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
    return found


def test_mixed_packs_are_the_same_for_ranks_and_resumed_runs(sets, builder):
    def open_one() -> PlannedSource:
        return prepared(section((sets[0], 1.0), (sets[1], 2.0), speaker_temperature=0.5), builder)

    whole = digest_of_packs(open_one())
    ranks = [digest_of_packs(open_one(), LoaderShare(rank, 2), count=6) for rank in range(2)]
    assert [one for pair in zip(*ranks, strict=True) for one in pair] == whole
    assert digest_of_packs(open_one(), first=4, count=4) == whole[8:]
    assert open_one().facts(0) == open_one().facts(0)


def test_one_named_data_set_is_what_it_is_without_a_name(sets, builder):
    named = prepared(section((sets[0], 3.0)), builder)
    plain = prepared(section(), builder, str(sets[0]))
    assert digest_of_packs(named) == digest_of_packs(plain)
    assert named.digest == plain.digest
    assert named.planner.fingerprint() == plain.planner.fingerprint()


def rewrite(folder: Path, change: Callable[[Dataset], Dataset]) -> None:
    """Another record of a data set, with the digest that it then has."""
    record = change(msgspec.json.decode((folder / "dataset.json").read_bytes(), type=Dataset))
    write_json(folder / "dataset.json", msgspec.structs.replace(record, digest=digest_of(record)))


def remade(folder: Path, place: Path, **fingerprints: str) -> Path:
    """A data set's records under other fingerprints."""
    place.mkdir()
    for name in ("dataset.json", "index.npy"):
        (place / name).write_bytes((folder / name).read_bytes())

    def other(record: Dataset) -> Dataset:
        made = msgspec.structs.replace(record.fingerprints, **fingerprints)
        return msgspec.structs.replace(record, fingerprints=made, num_rows=record.num_rows + 1)

    rewrite(place, other)
    return place


@pytest.mark.parametrize("what", ["codec", "tokenizer", "mel"])
def test_sets_made_by_other_models_are_refused_by_both_names(what, sets, tmp_path):
    other = remade(sets[1], tmp_path / "other", **{what: "f" * 64})
    with pytest.raises(ShardError) as raised:
        PlannedSource("", section((sets[0], None), (other, None)))
    message = str(raised.value)
    assert str(sets[0]) in message
    assert str(other) in message
    assert f"{what} " in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", [PlannedSource, StreamedSource])
def test_codes_of_two_precisions_are_not_mixed(kind, sets, tmp_path, model_dir):
    """One codec in float32 and in bfloat16: each data set alone fits the model, in training and in validation never both."""
    codec = open_dataset(sets[0])[0].fingerprints.codec
    bf16 = remade(sets[1], tmp_path / "bf16", codec=f"{codec}-bf16")
    shutil.copytree(sets[1] / "shards", bf16 / "shards")
    stream = {"loader": "stream", "max_steps": 2} if kind is StreamedSource else {}
    expected = open_dataset(sets[0])[0].fingerprints
    conditioning = decide_conditioning(SequenceSection(), FeaturesSection(), model_dir)
    kind(str(bf16), section(**stream)).check(expected, conditioning)
    mixed = section((sets[0], None), (bf16, None), **stream)
    validated = section(validation_data=str(bf16), **stream)
    for open_mixed in (lambda: kind("", mixed), lambda: kind(str(sets[0]), validated)):
        with pytest.raises(ShardError, match=rf"in two precisions \({codec[:16]} and {codec[:16]}-bf16\)") as raised:
            open_mixed().check(expected, conditioning)
        assert str(sets[0]) in str(raised.value)
        assert str(bf16) in str(raised.value)
        assert "codec_precision" in str(raised.value)


@pytest.mark.parametrize("role", ["mixed", "streamed", "held out"])
def test_sets_whose_clips_were_edited_otherwise_are_refused(role, sets, tmp_path, make_dataset, make_sample, expected):
    """[audio] cuts silence and sets loudness before clips are encoded; both values are told, in words."""
    other = make_dataset(tmp_path / "other", [make_sample(300 + seed, speaker=f"other-{seed}") for seed in range(3)])
    edits = {"max_edge_silence_s": 0.2, "target_rms_db": 0.0}
    rewrite(other, lambda record: msgspec.structs.replace(record, config={**record.config, "audio": edits}))
    kind, asked = {
        "mixed": (PlannedSource, section((sets[0], None), (other, None))),
        "streamed": (StreamedSource, section((sets[0], None), (other, None), loader="stream", max_steps=2)),
        "held out": (PlannedSource, section((sets[0], None), validation_data=str(other))),
    }[role]
    with pytest.raises(ShardError, match=r"audio\.max_edge_silence_s off and 0\.2; run preprocess") as raised:
        kind("", asked).check(expected, CODES)
    assert str(sets[0]) in str(raised.value)
    assert str(other) in str(raised.value)
    assert "target_rms_db" not in str(raised.value)


@pytest.mark.parametrize("way", ["named twice", "through a link", "copied"])
def test_a_data_set_given_twice_is_refused(way, sets, tmp_path):
    again = sets[0]
    if way == "through a link":
        again = tmp_path / "link"
        again.symlink_to(sets[0])
    elif way == "copied":
        again = shutil.copytree(sets[0], tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"one data set.*with a weight"):
        PlannedSource("", section((sets[0], None), (again, None)))


@pytest.mark.parametrize("way", ["named twice", "through a link", "by its shards"])
def test_a_stream_refuses_shards_that_are_given_twice(way, sets, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(sets[0])
    again = {"named twice": sets[0], "through a link": link, "by its shards": sets[0] / "shards/*/*.tar"}[way]
    with pytest.raises(ConfigError, match=r"give (it|each shard) once, with a weight"):
        StreamedSource("", section((sets[0], None), (again, None), loader="stream", max_steps=2))


def test_data_sets_that_give_nothing_are_told(sets, tmp_path, make_dataset, make_sample, builder, caplog):
    """An empty one is refused; one whose share or whose samples fit nowhere is warned of. Repeats are counted."""
    logging.getLogger("train").propagate = True
    caplog.set_level(logging.INFO)
    empty = make_dataset(tmp_path / "empty", [])
    with pytest.raises(ConfigError, match=r"/empty holds no sample .*; leave it out"):
        PlannedSource("", section((sets[0], None), (empty, None)))
    prepared(section((sets[0], 1.0), (sets[1], 1e-9)), builder).describe()
    assert "data-2: its share is less than a sample, so none of it comes; raise its weight" in caplog.text
    long = make_dataset(tmp_path / "long", [make_sample(600, 5, 690, speaker="long")])
    prepared(section((sets[0], None), (long, None)), builder).describe()
    assert "long: no sample of it takes part: all are too long for train.batch_tokens" in caplog.text
    caplog.clear()
    prepared(section((sets[0], 1.0), (sets[1], 9.0)), builder).describe()
    repeats = next(line for line in caplog.messages if "has of data-2" in line)
    assert re.search(
        r"\d\d\.\d % of the audio \(asked 90\.0\).* samples \(\d+ of them again, one at most \d+ times\)", repeats
    )
    assert "wait for another epoch" in caplog.text


@pytest.mark.parametrize("kind", [PlannedSource, StreamedSource])
def test_weights_are_for_all_or_none_and_exclude_a_temperature(kind, sets):
    stream = {"loader": "stream", "max_steps": 2} if kind is StreamedSource else {}
    with pytest.raises(ConfigError, match=r"has no weight"):
        kind("", section((sets[0], 1.0), (sets[1], None), **stream))
    with pytest.raises(ConfigError, match=r"data_temperature = 0\.5 and weights"):
        kind("", section((sets[0], 1.0), (sets[1], 1.0), data_temperature=0.5, **stream))


def test_names_of_data_sets_differ_and_hold_no_query():
    names = short_names(["a/data/", "b/data", "https://host/data?token=secret", "s3://bucket/voices"])
    assert names == ("data", "data-2", "data-3", "voices")


# --- held out -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def same_people(tmp_path_factory, make_dataset, make_sample) -> list[Path]:
    """Two data sets made of one corpus: speakers 0 and 1 have the same clips under other names, 2 and 3 are by name the same."""
    place = tmp_path_factory.mktemp("people")
    folders = []
    for which in range(2):
        samples = []
        for seed in range(24):
            person = seed % 6
            name = f"person-{person}" if person in (2, 3) else f"set{which}-{person}"
            sample = make_sample(200 * which + seed, 6 + seed % 3, 12 + seed % 5, speaker=name)
            # Of persons 0 and 1 a target of one set is a reference of the other: never the same role.
            shared = [f"clip-{person}-{seed}", f"clip-{person}-{(seed + 6) % 24}"]
            own = [f"{which}-{person}-r{seed}", f"{which}-{person}-t{seed}"]
            samples.append(with_clips(sample, *((shared if which else shared[::-1]) if person < 2 else own)))
        folders.append(write_columns(make_dataset(place / f"set{which}", samples), samples))
    return folders


@pytest.mark.parametrize("seed", range(6))
def test_no_held_out_audio_or_speaker_is_in_training(seed, same_people, builder):
    """By hash, in any role, over three epochs of two data sets that share people and clips."""
    asked = section((same_people[0], 1.0), (same_people[1], 3.0), seed=seed, validation_fraction=0.3)
    source = prepared(asked, builder)
    columns = source._data.columns()
    assert columns is not None
    assert source._held_out is not None
    held_out = source._held_out(source.index)
    assert held_out.any()
    trained = np.zeros(len(source.index), bool)
    for epoch in range(3):
        for window in range(source.planner.num_windows(epoch)):
            trained[source.planner.window(epoch, window).rows] = True
    assert not (trained & held_out).any()
    for one, other in itertools.product(["reference_audio", "target_audio"], repeat=2):
        assert not np.isin(columns[one][trained], columns[other][held_out]).any()
    assert not np.isin(source.index["speaker"][trained], source.index["speaker"][held_out]).any()


def test_the_only_speaker_of_a_data_set_is_not_held_out(tmp_path, make_dataset, make_sample, sets, builder):
    """Else a whole data set would silently be missing from training."""
    one = make_dataset(tmp_path / "one", [make_sample(400 + seed, 6, 12 + seed, speaker="only") for seed in range(6)])
    for seed in range(12):
        source = prepared(section((sets[0], 1.0), (one, 1.0), seed=seed, validation_fraction=0.15), builder)
        assert source._held_out
        held_out = source._held_out(source.index)
        assert held_out.any()
        assert not held_out[40:].any()
    two = make_dataset(tmp_path / "two", [make_sample(500 + seed, 6, 12 + seed, speaker="alone") for seed in range(6)])
    with pytest.raises(ConfigError, match=r"each of the 2 speakers is the only one of a data set"):
        prepared(section((one, None), (two, None), validation_fraction=0.15), builder)


def test_speakers_all_linked_by_one_clip_cannot_be_held_out(tmp_path, make_dataset, make_sample, builder):
    folders = []
    for which in range(2):
        samples = [
            with_clips(
                make_sample(50 * which + seed, 6, 12 + seed, speaker=f"{which}-{seed}"), "one prompt", f"{which} {seed}"
            )
            for seed in range(6)
        ]
        folders.append(write_columns(make_dataset(tmp_path / str(which), samples), samples))
    with pytest.raises(ConfigError, match=r"all 12 speakers are linked"):
        prepared(section((folders[0], None), (folders[1], None), validation_fraction=0.2), builder)


# --- checkpoints and commands ---------------------------------------------------------------------------------------


def identity_of(config: TrainConfig):
    return make_identity(config, MODEL, "digest", "", 1)


def test_default_keys_leave_an_identity_as_it_was(short_config):
    plain = identity_of(short_config())
    assert "train.data_temperature" not in plain.settings
    assert "data_weights" not in msgspec.to_builtins(plain)
    assert plain.settings.keys() <= MUST_BE_EQUAL


@pytest.mark.parametrize(
    ("before", "now", "what"),
    [
        ([1.0, 2.0], [1.0, 3.0], r"weights of train\.data: trained with 0\.3333 : 0\.6667, now 0\.25 : 0\.75"),
        ([1.0, 2.0], None, r"weights of train\.data: .*now none"),
        (None, None, r"train\.speaker_temperature: trained with 1\.0, now 0\.5"),
    ],
)
def test_another_mix_is_another_run(before, now, what, short_config, tmp_path):
    def config(weights, **values) -> TrainConfig:
        data = [DataSource(path=str(i), weight=weight) for i, weight in enumerate(weights or [None, None])]
        plain = short_config()
        return msgspec.structs.replace(plain, train=msgspec.structs.replace(plain.train, data=data, **values))

    write_json(tmp_path / "identity.json", identity_of(config(before)))
    check_identity(tmp_path, identity_of(config(before and [weight * 2 for weight in before])))  # only shares count
    with pytest.raises(CheckpointError, match=what):
        check_identity(tmp_path, identity_of(config(now, **({} if before else {"speaker_temperature": 0.5}))))


def test_data_sets_of_a_configuration_come_back_as_written(tmp_path):
    text = '[[train.data]]\npath = "صوت/a \\"b\\""\nweight = 2\n[[train.data]]\npath = "b"\n'
    (tmp_path / "in.toml").write_text(text, encoding="utf-8")
    config = read_config(TrainConfig, tmp_path / "in.toml")
    assert config.train.data == [DataSource(path='صوت/a "b"', weight=2.0), DataSource(path="b")]
    (tmp_path / "out.toml").write_text(to_toml(config), encoding="utf-8")
    assert read_config(TrainConfig, tmp_path / "out.toml") == config
    assert parse_toml(to_toml(read_config(TrainConfig, None)))["train"]["data"] == []


@pytest.mark.parametrize(
    "entry",
    [
        'weight = 1\npath = ""',
        *(f"weight = {weight}\npath = 'a'" for weight in ("0", "-1", "nan", "inf")),
        "path = 'a'\nwight = 1",
        "weight = 1",
    ],
)
def test_a_wrong_entry_of_train_data_is_one_line(entry, tmp_path):
    (tmp_path / "in.toml").write_text(f"[[train.data]]\n{entry}\n")
    with pytest.raises(ConfigError, match=r"train\.data") as raised:
        read_config(TrainConfig, tmp_path / "in.toml")
    assert "\n" not in str(raised.value)


def test_the_command_says_which_data_it_was_not_given(sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke

    def said(*arguments: object) -> str:
        result = run(train_command, [str(argument) for argument in arguments])
        assert result.exit_code == 1
        return result.output

    assert "give SHARDS and RUN" in said("run")
    named = f'train.data=[{{path = "{sets[0]}"}}]'
    assert "named twice" in said(sets[1], "run", "--set", named)
    assert "is a data set" in said(sets[0], sets[1])
    assert "nowhere" in said(sets[0], "nowhere", "run")


def test_a_mixed_run_goes_on_but_not_with_other_weights(sets, short_config, tmp_path):
    def config(small: float, *overrides: str) -> TrainConfig:
        plain = short_config("train.reference=same_speaker", "train.validation_fraction=0.2", *overrides)
        data = [DataSource(path=str(sets[0]), weight=1.0), DataSource(path=str(sets[1]), weight=small)]
        return msgspec.structs.replace(plain, train=msgspec.structs.replace(plain.train, data=data))

    run = tmp_path / "run"
    train(config(2.0, "train.max_steps=1", "train.eval_every=1"), "", run, RunOptions())
    values = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for part in ("loss", "eval"):  # the whole is made of the sets
        of_sets = [values[f"{part}/audio_loss/{name}"] for name in ("data", "data-2")]
        assert min(of_sets) < values[f"{part}/audio_loss"] < max(of_sets)
        assert values[f"{part}/text_loss/data-2"] > 0
    assert values["eval/samples/data"] + values["eval/samples/data-2"] == values["eval/samples"]
    assert values["metrics/hours/data"] > 0
    assert values["metrics/samples/data-2"] > 0
    kept = json.loads((run / "checkpoints/checkpoint-1/metrics.json").read_text())
    assert kept["metrics/samples/data"] == values["metrics/samples/data"]
    assert read_config(TrainConfig, run / "config.toml").train.data[1].weight == 2.0
    with pytest.raises(CheckpointError, match=r"weights of train\.data"):
        train(config(3.0), "", run, RunOptions())
    train(config(2.0, "train.max_steps=3"), "", run, RunOptions(dry_run=True))  # the same run: nothing is refused
    (probe,) = probe_rates(config(2.0), "", tmp_path / "probe", [1e-4], 1, skip_preflight=True)
    assert probe.loss_first == pytest.approx(values["loss/total_loss"], abs=1e-5)


# --- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_gives_each_list_its_share_at_any_time(sets, builder):
    stream = {"loader": "stream", "max_steps": 9, "shuffle_buffer": 4, "num_workers": 0}
    source = StreamedSource("", section((sets[0], 1.0), (sets[1], 3.0), **stream))
    source.prepare(builder)
    small = {hash64(name) for name in open_dataset(sets[1])[0].speakers}
    frames, counted = np.zeros(2), np.zeros(2)
    for loaded in itertools.islice(source.loaded_packs(0, LoaderShare()), 60):
        batch = loaded.batch
        counted += batch.set_counts[:, 1].numpy()
        for number, speaker in enumerate(batch.speakers.tolist()):
            frames[int(speaker % (1 << 64) in small)] += int((batch.segments == 2 * number + 1).sum()) - 9
    assert abs(frames[1] / frames.sum() - 0.75) < 0.05
    assert counted.tolist() == frames.tolist(), "metrics know which list a sample is of"


def test_a_stream_refuses_what_needs_an_index(sets, tmp_path):
    stream = {"loader": "stream", "max_steps": 2}
    with pytest.raises(ConfigError, match=r"cannot balance speakers"):
        StreamedSource("", section((sets[0], None), (sets[1], None), speaker_temperature=0.5, **stream))
    (tmp_path / "a.tar").write_bytes((sets[0] / "shards/000/shard-000000.tar").read_bytes())
    with pytest.raises(ConfigError, match=r"hours are not known"):
        StreamedSource("", section((sets[0], None), (tmp_path, None), data_temperature=0.5, **stream))
    with pytest.raises(ConfigError, match=r"1 shards in .*/one/data of train\.data for 2 readers"):
        next(StreamedSource("", section((sets[0], 1.0), (sets[1], 1.0), **stream)).loaded_packs(0, LoaderShare(0, 2)))
