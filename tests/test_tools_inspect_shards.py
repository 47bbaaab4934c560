"""`inspect-shards`: samples by what they are, the sound of their codes, damage found side by side, balance of speakers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from damage import flip_payload

from shards.encoders.codec import load_codec
from shards.manifest import open_dataset
from shards.reader import SampleReader
from shards.writer import shard_path
from tools.inspect_shards.cli import main
from tools.inspect_shards.opened import open_data
from tools.inspect_shards.samples import SORT_KEYS, Wanted, chars_per_s, wanted_samples
from tools.inspect_shards.summary import speaker_balance


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def varied(tmp_path_factory, make_dataset, make_sample) -> Path:
    """Twelve samples of three speakers, half a second to six long, every third with a warning."""
    samples = []
    for seed in range(12):
        sample = make_sample(seed, 5, 13 + 12 * seed)
        frames = sample.target_codes.shape[1]
        target = msgspec.structs.replace(sample.facts.target, duration_s=frames / 25 - 0.013, num_frames=frames)
        warnings = ["target_clipped"] if seed % 3 == 0 else []
        facts = msgspec.structs.replace(sample.facts, target=target, warnings=warnings)
        samples.append(dataclasses.replace(sample, facts=facts))
    return make_dataset(tmp_path_factory.mktemp("varied"), samples)


QUESTIONS = {
    "speaker": Wanted(speaker="speaker-1"),
    "nobody": Wanted(speaker="speaker-9"),
    "long": Wanted(min_seconds=3.0),
    "short": Wanted(max_seconds=0.507),
    "between": Wanted(min_seconds=1.0, max_seconds=4.0),
    "slow": Wanted(max_chars_per_s=10.0),
    "fast": Wanted(min_chars_per_s=10.0),
    "warned": Wanted(warning="target_clipped"),
    "text": Wanted(text=" "),
    "all at once": Wanted(speaker="speaker-0", min_seconds=1.0, warning="target_clipped"),
}


@pytest.mark.parametrize("wanted", QUESTIONS.values(), ids=QUESTIONS)
def test_the_index_hides_no_sample_that_is_asked_for(varied, wanted):
    """Most questions are answered without reading a sample; the answer is that of reading all."""
    _, index = open_dataset(varied)
    expected = [sample.key for sample in SampleReader(varied).read_all(index) if wanted.holds(sample)]
    assert [sample.key for sample in wanted_samples(open_data(str(varied)), wanted)] == expected
    assert len(expected) < 12 or wanted.text


def test_the_bounds_are_seconds_of_the_audio_not_of_its_frames(varied):
    found = list(wanted_samples(open_data(str(varied)), QUESTIONS["short"]))
    assert [sample.facts.target.duration_s for sample in found] == [pytest.approx(13 / 25 - 0.013)]


@pytest.mark.parametrize("sort", SORT_KEYS)
@pytest.mark.parametrize("descending", [False, True])
def test_sorted_by_value_then_by_key(varied, sort, descending):
    found = list(wanted_samples(open_data(str(varied)), Wanted(), sort, descending))
    values = [SORT_KEYS[sort](sample) for sample in found]
    assert values == sorted(values, reverse=descending)  # pyright: ignore[reportArgumentType]
    assert len({sample.key for sample in found}) == 12
    for one, other in itertools.pairwise(found):
        assert SORT_KEYS[sort](one) != SORT_KEYS[sort](other) or one.key < other.key


def test_list_takes_the_options(varied):
    shown = run("list", varied, "--sort", "seconds", "--descending", "--limit", 2, "--json")
    assert shown.exit_code == 0, shown.output
    lengths = [json.loads(line)["target"]["duration_s"] for line in shown.stdout.splitlines()]
    assert lengths == [pytest.approx((13 + 12 * seed) / 25 - 0.013) for seed in (11, 10)]
    plain = run("list", varied, "--speaker", "speaker-2", "--max-seconds", 2)
    assert plain.stdout.count("speaker-2") == plain.stdout.count("chars/s") == 1
    assert run("list", varied, "--sort", "beauty").exit_code == 2


def test_a_question_without_an_answer_says_so(varied):
    done = run("list", varied, "--warning", "noisy", "--json")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == "none of 12 samples is like that; warnings that are there: none\n"


def test_the_rate_is_of_the_target(varied):
    _, index = open_dataset(varied)
    sample = SampleReader(varied).read(index[4])
    assert chars_per_s(sample) == len(sample.facts.texts[sample.facts.target_text]) / sample.facts.target.duration_s


def test_decode_writes_what_the_codes_hold(varied, tiny_dir, tmp_path):
    _record, index = open_dataset(varied)
    sample = SampleReader(varied).read(index[3])
    config = ("--config", tiny_dir / "pipeline.toml")
    for flags, codes in (([], sample.target_codes), (["--reference"], sample.reference_codes)):
        out = tmp_path / f"{len(flags)}.wav"
        done = run("decode", varied, sample.key, out, *flags, *config, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["duration_s"] == codes.shape[1] / 25
        wave, rate = soundfile.read(out, dtype="float32")
        assert (rate, len(wave)) == (24000, 960 * codes.shape[1])
        expected = np.clip(load_codec(tiny_dir / "codec").decode(codes), -1, 1)
        assert np.abs(wave - expected).max() < 1e-4  # 16 bits


def test_decode_refuses_a_codec_that_did_not_make_the_codes(varied, tiny_dir, tmp_path):
    import shutil

    other = shutil.copytree(tiny_dir / "codec", tmp_path / "codec")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    done = run("decode", varied, "000000000000", tmp_path / "x.wav", "--set", f"model.codec={other}")
    assert done.exit_code == 1
    assert "codes were made with codec" in done.stderr
    assert not (tmp_path / "x.wav").exists()


def test_verify_names_the_faults_of_all_shards_in_order(varied, make_dataset, make_sample, tmp_path):
    assert run("verify", varied).exit_code == 0
    copy = make_dataset(tmp_path / "copy", [make_sample(seed, 5, 9) for seed in range(4)])
    flip_payload(copy, 2)
    done = run("verify", copy, "--json")
    assert done.exit_code == 1
    assert "sample 2 of 4" in " ".join(json.loads(done.stdout)["faults"])
    shard_path(copy, 0, ".tar").unlink()
    gone = run("verify", copy)
    assert gone.exit_code == 1
    assert "No such file" in gone.stderr


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([5, 5, 5, 5], "largest 25% of the samples, Gini 0.00"),
        ([97, 1, 1, 1], "largest 97% of the samples, Gini 0.72"),
        ([3], "largest 100% of the samples, Gini 0.00"),
        ([], "no samples"),
    ],
)
def test_speaker_balance(counts, said):
    """0.72 by the definition: mean difference of all pairs over twice the mean."""
    assert speaker_balance(counts) == said
    if counts:
        values = np.array(counts, float)
        by_definition = np.abs(values[:, None] - values[None, :]).mean() / (2 * values.mean())
        assert f"Gini {by_definition:.2f}" in said


def test_a_lost_shard_is_told_once_and_its_samples_are_counted(varied, tmp_path):
    copy = shutil.copytree(varied, tmp_path / "copy")
    tar = shard_path(copy, 0, ".tar")
    tar.unlink()
    listed = run("list", copy)
    assert (listed.exit_code, listed.stdout) == (0, "")
    assert listed.stderr.count(f"skipped: {tar}: No such file") == 1
    assert "skipped: 12 of 12 samples are not usable" in listed.stderr
    verified = run("verify", copy)
    assert verified.exit_code == 1
    assert f"{tar}: No such file or directory" in verified.stderr
    assert "Errno" not in verified.stderr
    said = run("summary", copy)
    assert "warning: 12 of 12 samples that were drawn are not readable: inspect-shards verify" in said.stdout
