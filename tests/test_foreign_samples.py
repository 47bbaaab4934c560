"""Samples and lists of shards that strangers wrote: no way out of a folder, into a shell, or past the checks."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from shards.config import SequenceSection
from shards.errors import ConfigError, ShardError
from shards.index import INDEX_DTYPE
from shards.printable import file_name
from shards.reader import split_members
from shards.sample import compress, pack_sample, unpack_sample, write_npy
from shards.sequence import SequenceBuilder
from train.data.shard_urls import shard_urls
from train.data.stages import RawSample, build_sequences, collate
from train.evaluation.listening import Listening
from train.world import ALONE

OBJECTS = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (8, 9), }"
KEYS = ["../../up", "/tmp/absolute", "a/b", "..", "con\x00", "ليلى", "x" * 300, "-rf", ".hidden", "a\\..\\b"]


@pytest.mark.parametrize("key", KEYS)
def test_no_key_leaves_its_folder(key: str, tmp_path: Path):
    path = (tmp_path / file_name(key)).resolve()
    assert path.parent == tmp_path.resolve()
    path.mkdir()


def test_plain_keys_stay_and_others_do_not_meet():
    assert file_name("000000000012") == "000000000012"
    assert len({file_name(key) for key in KEYS}) == len(KEYS)


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("keys", [["a", "a", "a-1"], ["a-1", "a", "a"], ["../x", "../x", "a", "a", "a-3", "a-3_"]])
def test_every_sample_of_a_listening_set_has_a_folder(keys: list[str], make_sample, tmp_path):
    samples = [dataclasses.replace(make_sample(0), key=key) for key in keys]
    folders = Listening(samples, cast(Any, None), None, tmp_path, ALONE).folders
    assert len(set(folders)) == len(keys)
    assert {folder.parent for folder in folders} == {tmp_path}


def test_a_stream_with_keys_that_climb_writes_inside_run(make_sample, short_config, tmp_path):
    from train.loop import RunOptions, train

    (tmp_path / "in").mkdir()
    keys = ["../../escaped", str(tmp_path / "absolute"), "deep/er", "ليلى", "plain", "again/plain"]
    samples = {key: dict(pack_sample(make_sample(number, 5, 8))) for number, key in enumerate(keys)}
    write_tar(tmp_path / "in" / "a.tar", samples)
    before = {path for path in tmp_path.rglob("*") if "run" not in path.parts}
    config = short_config(
        *("train.loader=stream", "train.shuffle_buffer=2", "train.max_steps=1", "train.listening_samples=6")
    )
    train(config, tmp_path / "in", tmp_path / "run", RunOptions())
    assert {path for path in tmp_path.rglob("*") if "run" not in path.relative_to(tmp_path).parts} == before
    folders = list((tmp_path / "run" / "listening").iterdir())
    assert len(folders) == 6
    assert all((folder / "step-000001.wav").is_file() for folder in folders)


@pytest.mark.parametrize("optimized", [[], ["-O"]])
def test_a_pipe_runs_in_no_spelling(tmp_path, repository, optimized):
    done = tmp_path / "done"
    spellings = [f"pipe:touch {done}", f"PIPE:touch {done}", f" pipe:touch {done}", f"\tPi\tPe:touch {done}"]
    spellings += [f"a.tar::Pipe:touch {done}", f"{{a.tar,pipe:touch {done}}}", f"pipe:curl http://x; touch {done}"]
    spellings += [f"\x01pipe:touch {done}", f"\u200bpipe:touch {done}", f"pipe://touch {done}"]
    code = (
        "import sys\nfrom shards.errors import ConfigError\nfrom train.data.shard_urls import read_shards, shard_urls\n"
        "for text in sys.argv[1:]:\n"
        "    try:\n        list(read_shards([text]))\n    except ConfigError: pass\n"
        "    try:\n        list(read_shards(shard_urls(text)))\n    except ConfigError: continue\n"
        "    raise SystemExit(repr(text))\n"
    )
    ran = subprocess.run(
        [sys.executable, *optimized, "-c", code, *spellings], cwd=repository, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert not done.exists()
    with pytest.raises(ConfigError, match="a pipe would run a shell command"):
        shard_urls("PIPE:true")


@pytest.fixture(scope="module")
def sound(make_sample):
    return make_sample(3, 6, 9)


@pytest.fixture(scope="module")
def builder(tokenizer):
    return SequenceBuilder(tokenizer, SequenceSection())


def facts_with(sample, **changes) -> bytes:
    return msgspec.json.encode({**msgspec.to_builtins(sample.facts), **changes})


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def faults_of(sample) -> dict[str, dict[str, bytes]]:
    """name -> the members that differ from the sound ones."""
    facts, ids, codes = sample.facts, sample.text_ids, sample.target_codes
    counts = facts.text_token_counts
    text = msgspec.json.encode(facts).decode()

    def with_id(value: int, place: int = -1) -> bytes:
        changed = ids.copy()
        changed[place] = value
        return write_npy(changed)

    def turns(*items) -> bytes:
        return facts_with(sample, turns=[{"role": "assistant", "items": list(items)}])

    def misc(value: str) -> bytes:
        return text.replace('"misc":null', f'"misc":{{"a":{value}}}').encode()

    target = msgspec.to_builtins(facts.target)
    return {
        "id outside the vocabulary": {"ids.npy": with_id(128256)},
        "negative id": {"ids.npy": with_id(-1)},
        "huge id": {"ids.npy": with_id(2**31 - 1, 0)},
        "end of turn in a text": {"ids.npy": with_id(128009)},
        "audio token in a text": {"ids.npy": with_id(128016)},
        "scene token in a spoken text": {"ids.npy": with_id(128018)},
        "ids are float": {"ids.npy": write_npy(ids.astype(np.float32))},
        "ids are 64 bits": {"ids.npy": write_npy(ids.astype(np.int64))},
        "ids are a matrix": {"ids.npy": write_npy(ids[None])},
        "ids are big-endian": {"ids.npy": write_npy(ids.astype(">i4"))},
        "one id too few": {"ids.npy": write_npy(ids[:-1])},
        "negative count": {"json": facts_with(sample, text_token_counts=[counts[0] + counts[1] + 5, -5, *counts[2:]])},
        "fractional count": {"json": facts_with(sample, text_token_counts=[counts[0] + 0.5, *counts[1:]])},
        "a count too few": {"json": facts_with(sample, text_token_counts=[counts[0] + counts[1], *counts[2:]])},
        "huge count": {"json": facts_with(sample, text_token_counts=[2**63, *counts[1:]])},
        "text is a number": {"json": facts_with(sample, texts=[*facts.texts[:-1], 7])},
        "target text behind the end": {"json": facts_with(sample, target_text=len(counts))},
        "negative target text": {"json": facts_with(sample, target_text=-1)},
        "reference text is null": {"json": facts_with(sample, reference_text=None)},
        "system text behind the end": {"json": facts_with(sample, system_text=99)},
        "turn names no text": {"json": turns(99, "reference", "target")},
        "turn with a negative text": {"json": turns(-1, "reference", "target")},
        "two targets": {"json": turns("target", "reference", "target")},
        "no target": {"json": turns("reference")},
        "unknown role": {"json": facts_with(sample, turns=[{"role": "root", "items": ["reference", "target"]}])},
        "no turns": {"json": facts_with(sample, turns=[])},
        "speaker is a list": {"json": facts_with(sample, speaker=["a"])},
        "misc 300 deep": {"json": misc(deep(300))},
        "misc 100,000 deep": {"json": misc(deep(100_000))},
        "json of 5 MB": {"json": misc(f'"{"x" * 5_000_000}"')},
        "json is not UTF-8": {"json": text.encode("utf-16")},
        "json is empty": {"json": b""},
        "json is a list": {"json": b"[]"},
        "NaN as duration": {"json": text.replace('"duration_s":', '"duration_s":NaN,"x":', 1).encode()},
        "endless duration": {"json": text.replace('"duration_s":', '"duration_s":1e999,"x":', 1).encode()},
        "negative frames": {"json": facts_with(sample, target={**target, "num_frames": -9})},
        "codes 1024": {"tgt.codes.npy": write_npy(np.full_like(codes, 1024))},
        "codes 65535": {"ref.codes.npy": write_npy(np.full_like(sample.reference_codes, 65535))},
        "codes are signed": {"tgt.codes.npy": write_npy(codes.astype(np.int16))},
        "codes are float": {"tgt.codes.npy": write_npy(codes.astype(np.float64))},
        "seven codebooks": {"tgt.codes.npy": write_npy(codes[:7])},
        "codes are transposed": {"tgt.codes.npy": write_npy(codes.T)},
        "codes without a frame": {"tgt.codes.npy": write_npy(codes[:, :0])},
        "codes are objects": {"tgt.codes.npy": OBJECTS},
        "header without end": {"tgt.codes.npy": write_npy(codes)[:60]},
        "header claims a terabyte": {"tgt.codes.npy": write_npy(codes).replace(b"(8, 9)", b"(8, 99999999999)")},
        "cut in the middle": {"ref.codes.npy": write_npy(sample.reference_codes)[:-3]},
        "a member is missing": {"ids.npy": None},  # pyright: ignore[reportReturnType]
    }


def members_with(sample, changes: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in {**dict(pack_sample(sample)), **changes}.items() if data is not None}


def test_every_kind_of_contradiction_is_a_named_fault(sound, builder):
    for name, changes in faults_of(sound).items():
        raw = RawSample(f"key of {name}", members_with(sound, changes), "a.tar")
        (built,) = build_sequences(builder)([raw])
        assert built.sequence is None, name
        assert built.reason, name
        loaded = collate([built], 0)
        assert f"key of {name}" in str(loaded.faults[0])
        with pytest.raises(ShardError, match="key of"):
            unpack_sample(raw.key, raw.members)


def test_what_stage_one_may_write_passes(sound, builder, tokenizer):
    """Sound event tokens in a text, the scene tokens in a system text, a `misc` as deep as a person writes it."""
    counts = sound.facts.text_token_counts
    ids = sound.text_ids.copy()
    ids[0] = 128018  # text 0 is the system text
    ids[counts[0]] = 128022
    changes = {"ids.npy": write_npy(ids), "json": facts_with(sound, misc={"a": json.loads(deep(60))})}
    unpack_sample("k", members_with(sound, changes))


def test_an_index_that_contradicts_its_sample_is_a_fault(sound, builder):
    length = len(builder.training(sound))
    given = {"members": dict(pack_sample(sound)), "shard": "a.tar"}
    (right,) = build_sequences(builder)([RawSample("k", **given, length=length)])
    (wrong,) = build_sequences(builder)([RawSample("k", **given, length=length - 1)])
    assert right.sequence is not None
    assert wrong.sequence is None
    assert "the index says" in wrong.reason


def test_bad_whisper_features_are_a_fault(sound, tokenizer):
    with_whisper = SequenceBuilder(tokenizer, SequenceSection(conditioning="whisper+codes"))
    mel = {"num_samples": 16000, "floor": -1.0}
    good = np.zeros((128, 102), np.float16)
    arrays = [
        good[:80],
        good.astype(np.float32),
        good[0],
        good[:, :0],
        np.zeros((128, 3001), np.float16),
        good + np.nan,
    ]
    packed = [compress(write_npy(array)) for array in arrays] + [b"junk", compress(b"junk"), b""]
    packed.append(compress(write_npy(np.zeros((128, 200_000), np.float16))))
    for data in packed:
        changes = {"json": facts_with(sound, mel=mel), "ref.mel.npy.zst": data}
        (built,) = build_sequences(with_whisper)([RawSample("k", members_with(sound, changes), "a.tar")])
        assert built.sequence is None
    changes = {"json": facts_with(sound, mel=mel), "ref.mel.npy.zst": compress(write_npy(good))}
    (built,) = build_sequences(with_whisper)([RawSample("k", members_with(sound, changes), "a.tar")])
    assert built.sequence is not None
    for facts in ({**mel, "num_samples": -5}, {**mel, "num_samples": 0}, {**mel, "num_samples": 2**40}):
        with pytest.raises(ShardError, match="mel of"):
            unpack_sample("k", members_with(sound, {**changes, "json": facts_with(sound, mel=facts)}))


def test_four_hundred_mutated_samples_are_built_or_named(sound, builder):
    """Bytes flipped, cut, doubled and swapped, JSON values replaced: never another exception than a named fault."""
    rng = random.Random(11)
    strange = [None, -1, 0, 2**31, 2**64, 1.5, 1e308, "", "x", [], {}, [[]], True, "\x1b[31m", 10**30, "9" * 50]
    num_faults = 0
    for number in range(400):
        members = dict(pack_sample(sound))
        name = rng.choice([*members, "json", "json"])
        data = bytearray(members[name])
        if name == "json" and rng.random() < 0.7:
            record = json.loads(data)
            holder = rng.choice([record, record["target"], record["reference"]])
            holder[rng.choice(list(holder))] = rng.choice(strange)
            data = bytearray(json.dumps(record).encode())
        else:
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(data))
                action = rng.randrange(4)
                if action == 0:
                    data[place] = rng.randrange(256)
                elif action == 1:
                    del data[place:]
                elif action == 2:
                    data[place:place] = data[: rng.randint(1, 64)]
                else:
                    del data[place : place + rng.randint(1, 9)]
                data = data or bytearray(b"\0")
        members[name] = bytes(data)
        (built,) = build_sequences(builder)([RawSample(f"k{number}", members, "a.tar")])
        assert (built.sequence is None) == bool(built.reason)
        if built.sequence is not None:
            ids, codes = built.sequence.token_ids, built.sequence.codes
            assert ids.min() >= 0
            assert ids.max() < 128256
            assert codes.min() >= 0
            assert codes.max() <= 1025
            collate([built], 0)
        num_faults += built.sequence is None
    assert num_faults > 200


@pytest.mark.parametrize(
    "header",
    [
        b"../../x.json",
        b"/etc/x.json",
        b"a.json",
        b"000000000000.evil",
        b"00000000000\xd9\xa0.json",
        b"000000000000.json",
    ],
)
@pytest.mark.parametrize("size", [b"00000000010", b"-0000000777", b"77777777777", b"           "])
def test_no_tar_header_leads_astray(header: bytes, size: bytes):
    """A negative size would lead back to the same header for ever."""
    block = bytearray(512)
    block[: len(header)] = header
    block[124:135] = size
    try:
        members = split_members(bytes(block) + bytes(512), "here")
    except ShardError:
        return
    assert header == b"000000000000.json"
    assert members["__key__"] == "000000000000"


def test_planned_data_skip_bad_samples_by_name_everywhere(run_command, make_dataset, make_sample, tiny_dir, tmp_path):
    """Foreign shards with checksums that fit: preflight, training, listening set and inspect-shards go on."""
    from train_process import train_arguments

    good = [make_sample(seed, 5, 8) for seed in range(11)]
    bad = make_sample(20, 5, 8)
    ids = bad.text_ids.copy()
    ids[-1] = 200_000
    dataset = make_dataset(tmp_path / "set", [dataclasses.replace(bad, text_ids=ids), *good])
    settings = [
        "train.listening_samples=2",
        "train.max_steps=2",
        "train.max_bad_fraction=0.5",
        "train.packs_per_step=2",
    ]
    done = run_command("train", *train_arguments(dataset, tmp_path / "run", tiny_dir, *settings))
    assert done.returncode == 0, done.stderr
    assert "sample 000000000000: " in done.stderr
    assert "token 200000" in done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["metrics/bad_samples"] >= 1
    done = run_command("inspect-shards", "list", dataset)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 11)
    assert "skipped: 1 of 12 samples" in done.stderr
    done = run_command("inspect-shards", "show", dataset, "000000000000")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert run_command("inspect-shards", "show", dataset, "sample-3").returncode == 0
    assert run_command("inspect-shards", "verify", dataset).returncode == 0, "its bytes are as they were written"


def npy_with(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


HEADERS = [
    f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({size},), }}\n" for size in ("10000000000000", "-1", "9" * 30)
]
HEADERS += ["(" * 5000, "{'descr': '''\n", "{'descr': (1L, \n", "[1]\n", "\0" * 64, "{'descr': 5, 'shape': (1,)}\n"]
HEADERS += ["{'descr': '<i4', 'fortran_order': False, 'shape': (True,), }\n"]
FILES = [*map(npy_with, HEADERS), b"", b"PK\x03\x04" + bytes(50), b"\x80\x04K\x01.", b"\x93NUMPY\x09\x00" + bytes(90)]


@pytest.mark.parametrize("number", range(len(FILES)))
def test_no_npy_header_is_a_traceback(number: int, tmp_path: Path):
    """Indexes of a folder, of a URL, and arrays of samples, whose mels are read only when a sequence is built."""
    from shards.index import read_index
    from shards.sample import read_npy
    from train.data.remote import check_index

    (tmp_path / "index.npy").write_bytes(FILES[number])
    with pytest.raises(ShardError, match="index"):
        read_index(tmp_path / "index.npy")
    with pytest.raises(ShardError, match="index"):
        check_index("http://x", FILES[number], SimpleNamespace(num_samples=1, shards=[]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"array|npy|offset|buffer|dimension"):
        read_npy(FILES[number])


@pytest.mark.parametrize("row", [{"offset": 2**64 - 1, "num_bytes": 9}, {"offset": 2**63}, {"num_bytes": 0}])
def test_an_index_row_that_leads_nowhere_is_a_named_fault(row: dict[str, int], make_dataset, sound, tmp_path):
    from shards.reader import SampleReader

    rows = np.load(make_dataset(tmp_path / "set", [sound]) / "index.npy")
    for name, value in row.items():
        rows[0][name] = value
    rows[0]["crc32"] = 0
    reader = SampleReader(tmp_path / "set")
    with pytest.raises(ShardError, match="damaged"):
        reader.read(rows[0])
    assert reader.key_of(rows[0], 0)


@pytest.mark.parametrize("levels", [500, 1000, 100_000])
def test_a_deep_record_is_read_or_named(levels: int, tmp_path: Path):
    from shards.manifest import Dataset, read_dataset, read_record

    (tmp_path / "job.json").write_text('{"config": {"a": ' + deep(levels) + "}}")
    with pytest.raises(ShardError, match="unreadable Dataset record"):
        read_record(tmp_path / "job.json", Dataset)
    with pytest.raises(ShardError, match="unreadable Dataset record"):
        read_dataset((tmp_path / "job.json").read_bytes(), "dataset.json")


def test_an_index_of_another_shape_is_refused(make_dataset, sound, tmp_path):
    from shards.manifest import open_dataset

    dataset = make_dataset(tmp_path / "set", [sound])
    np.save(dataset / "index.npy", np.zeros((1, 1), INDEX_DTYPE))
    with pytest.raises(ShardError, match="index"):
        open_dataset(dataset)
