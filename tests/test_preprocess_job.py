"""Stage one as a job: same bytes whoever makes it and however often it is killed; mistakes are named; damage is found."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from webdataset.compat import WebDataset

from shards.config import SequenceSection
from shards.manifest import open_dataset
from shards.reader import SampleReader, decode_zst
from shards.sample import pack_sample
from shards.sequence import SequenceBuilder
from tools.inspect_shards.report import speakers_part
from tools.inspect_shards.summary import summary_facts

MEMBERS = ("ids.npy", "json", "ref.codes.npy", "ref.mel.npy.zst", "tgt.codes.npy")
SMALL_SHARDS = ("--set", "preprocess.samples_per_shard=16")


@pytest.fixture(scope="module")
def preprocess(run_command, tiny_dir):
    def run(*arguments: object):
        return run_command("preprocess", *arguments, "--config", tiny_dir / "pipeline.toml")

    return run


@pytest.fixture(scope="module")
def job(preprocess, arabic_mini, tmp_path_factory) -> Path:
    """All 72 clips in shards of 16, made by four workers."""
    out = tmp_path_factory.mktemp("job") / "out"
    result = preprocess(arabic_mini, out, *SMALL_SHARDS, "--workers", 4)
    assert result.returncode == 0, result.stderr
    assert "72 distinct files, 72 uses of one already encoded" in result.stderr
    return out


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_the_data_set_is_complete(job: Path):
    dataset, index = open_dataset(job)
    assert (dataset.num_rows, dataset.num_samples, len(index)) == (72, 72, 72)
    assert [shard.num_samples for shard in dataset.shards] == [16, 16, 16, 16, 8]
    assert dataset.speakers == {f"spk_{speaker:02d}": 6 for speaker in range(12)}
    assert dataset.target_hours == pytest.approx(318 / 3600, rel=0.02)
    assert not (job / "encoded").exists()
    assert (index["mel_samples"] > 0).all()
    rows = [sample.facts.row for sample in SampleReader(job).read_all(index)]
    assert sorted(rows) == list(range(72))
    assert rows != sorted(rows), "samples are shuffled before shards are cut"


@pytest.mark.parametrize("layout", ["clone", "as_written"])
def test_index_lengths_equal_the_built_sequences(job: Path, tokenizer, layout):
    _, index = open_dataset(job)
    builder = SequenceBuilder(tokenizer, SequenceSection(layout=layout))
    built = [len(builder.training(sample)) for sample in SampleReader(job).read_all(index)]
    assert builder.lengths(index).tolist() == built


def test_stock_webdataset_reads_the_shards(job: Path):
    dataset, index = open_dataset(job)
    urls = sorted(str(path) for path in job.glob("shards/*/*.tar"))
    stream = WebDataset(urls, shardshuffle=False, empty_check=False).decode(decode_zst)
    samples = list(stream)  # pyright: ignore[reportArgumentType] - fluent class without annotations
    assert len(samples) == dataset.num_samples
    for sample, ours in zip(samples, SampleReader(job).read_all(index), strict=True):
        assert sample["__key__"] == ours.key
        assert {name for name in sample if not name.startswith("__")} == set(MEMBERS)
        np.testing.assert_array_equal(sample["ref.codes.npy"], ours.reference_codes)
        np.testing.assert_array_equal(sample["tgt.codes.npy"], ours.target_codes)
        np.testing.assert_array_equal(sample["ids.npy"], ours.text_ids)
        np.testing.assert_array_equal(sample["ref.mel.npy.zst"], ours.reference_mel())
        assert sample["json"]["id"] == ours.facts.id


def test_raw_members_equal_webdatasets(job: Path):
    _, index = open_dataset(job)
    urls = sorted(str(path) for path in job.glob("shards/*/*.tar"))
    for raw, row in zip(WebDataset(urls, shardshuffle=False, empty_check=False), index, strict=True):
        ours = SampleReader(job).read_raw(row)
        assert ours == {name: value for name, value in raw.items() if name in (*MEMBERS, "__key__")}
        assert dict(pack_sample(SampleReader(job).read(row))) == {name: ours[name] for name in MEMBERS}


def test_one_worker_gives_the_same_bytes(preprocess, arabic_mini, job, tmp_path):
    result = preprocess(arabic_mini, tmp_path / "out", *SMALL_SHARDS, "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "out") == tree(job)


def start(data: Path, out: Path, tiny_dir: Path, repository: Path) -> subprocess.Popen:
    arguments = [
        "preprocess",
        str(data),
        str(out),
        "--config",
        str(tiny_dir / "pipeline.toml"),
        *SMALL_SHARDS,
        "--workers",
        "2",
    ]
    code = f"import sys; sys.argv = {arguments!r}; from preprocess.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", code], cwd=repository, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    names = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in text.split()}
    return [child for child, name in names.items() if b"spawn_main" in name]


@pytest.mark.slow
def test_a_job_killed_at_random_moments_ends_with_the_same_bytes(
    preprocess, arabic_mini, job, tiny_dir, repository, tmp_path
):
    """Twice right after a shard was committed, then at moments drawn with a seed, wherever the job then stands."""
    out = tmp_path / "out"
    moments = np.random.default_rng(0)
    for num_done, delay_s in ((1, 0.0), (3, 0.0), (0, moments.uniform(1, 4)), (0, moments.uniform(3, 7))):
        process = start(arabic_mini, out, tiny_dir, repository)
        wait_for(lambda wanted=num_done: len(list(out.glob("shards/*/*.done.json"))) >= wanted)
        time.sleep(delay_s)
        workers = children(process.pid) if process.poll() is None else []
        process.kill()
        process.wait()
        wait_for(lambda pids=workers: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    result = preprocess(arabic_mini, out, *SMALL_SHARDS)
    assert result.returncode == 0, result.stderr
    assert tree(out) == tree(job)


@pytest.mark.slow
def test_workers_killed_at_random_moments_cost_nothing(arabic_mini, job, tiny_dir, repository, tmp_path):
    out = tmp_path / "out"
    process = start(arabic_mini, out, tiny_dir, repository)
    wait_for(lambda: len(children(process.pid)) == 2 and (out / "encoded").exists())
    moments = np.random.default_rng(1)
    for number in range(2):
        workers = children(process.pid)
        if workers:
            os.kill(workers[number % len(workers)], signal.SIGKILL)
        time.sleep(moments.uniform(0.2, 1.5))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert tree(out) == tree(job)


def test_a_finished_job_is_recognised(preprocess, arabic_mini, job):
    before = tree(job)
    result = preprocess(arabic_mini, job, *SMALL_SHARDS)
    assert result.returncode == 0, result.stderr
    assert "nothing: all shards were there already" in result.stderr
    assert tree(job) == before


def test_another_job_on_the_same_out_is_refused(preprocess, arabic_mini, job, tmp_path):
    result = preprocess(arabic_mini, job, *SMALL_SHARDS, "--set", "preprocess.seed=7")
    assert result.returncode == 1
    assert "holds another job: preprocess.seed was 0, is 7; give another OUT, or --new-job" in result.stderr
    shorter = tmp_path / "list.json"
    shorter.write_text(json.dumps(json.loads(arabic_mini.read_text())[:5]))
    result = preprocess(shorter, job, *SMALL_SHARDS)
    assert result.returncode == 1
    assert "holds another job: input was" in result.stderr


def test_new_job_starts_over(preprocess, arabic_mini, tmp_path):
    for options in (["--limit", 3], ["--limit", 2, "--new-job"]):
        result = preprocess(arabic_mini, tmp_path / "out", *options)
        assert result.returncode == 0, result.stderr
    assert open_dataset(tmp_path / "out")[0].num_samples == 2


@pytest.fixture
def rows(arabic_mini) -> list:
    return json.loads(arabic_mini.read_text())[:20]


def test_bad_rows_are_quarantined_with_their_reason(preprocess, rows, tmp_path):
    rows[3]["messages"][1]["content"][1]["audio_url"] = "nowhere/clip.wav"
    (tmp_path / "text.wav").write_text("not audio")
    rows[5]["messages"][2]["content"][1]["audio_url"] = str(tmp_path / "text.wav")
    del rows[7]["messages"][2]["content"][1]
    rows[9]["messages"] = "none"
    rows[11]["messages"][1]["content"][1]["audio_url"] = rows[11]["messages"][2]["content"][1]["audio_url"]
    data = tmp_path / "list.json"
    data.write_text(json.dumps(rows))
    result = preprocess(data, tmp_path / "out", "--set", "preprocess.max_reject_fraction=0.3")
    assert result.returncode == 0, result.stderr
    dataset, _ = open_dataset(tmp_path / "out")
    assert dataset.num_samples == 15
    assert dataset.warnings == {}
    assert dataset.rejects == dict.fromkeys(
        ["audio_count", "audio_missing", "audio_unreadable", "reference_is_target", "row_invalid"], 1
    )
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["row"], reject["reason"]) for reject in rejects] == [
        (3, "audio_missing"),
        (5, "audio_unreadable"),
        (7, "audio_count"),
        (9, "row_invalid"),
        (11, "reference_is_target"),
    ]
    assert set(rejects[0]) == {"row", "id", "stage", "reason", "detail", "path"}
    assert rejects[0]["path"] == "nowhere/clip.wav"
    again = preprocess(data, tmp_path / "again", "--set", "preprocess.max_reject_fraction=0.1")
    assert again.returncode == 1
    assert "error: 5 of 20 rows rejected, more than preprocess.max_reject_fraction = 0.1" in again.stderr
    assert "first: row 3 nowhere/clip.wav: no such file" in again.stderr
    assert not (tmp_path / "again" / "dataset.json").exists()


def test_text_is_kept_as_written_and_said_stripped(preprocess, rows, tmp_path):
    row = copy.deepcopy(rows[0])
    row["messages"][2]["content"][0]["text"] = "  نص له فراغات في أوله وفي آخره كما كتب\n"
    row["dialect"] = "gulf"
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    made = preprocess(tmp_path / "list.jsonl", tmp_path / "out")
    assert made.returncode == 0
    assert re.search(r"^dialects +gulf 1$", made.stderr, re.MULTILINE)
    dataset, index = open_dataset(tmp_path / "out")
    assert dataset.dialects == {"gulf": 1}
    assert summary_facts(dataset, index)["dialects"] == {"gulf": 1}
    assert "Samples per dialect" in speakers_part(dataset)
    facts = SampleReader(tmp_path / "out").read(index[0]).facts
    assert facts.texts[facts.target_text] == "نص له فراغات في أوله وفي آخره كما كتب"
    assert "  نص له فراغات في أوله وفي آخره كما كتب\n" in facts.texts
    assert facts.extra == {"dialect": "gulf"}
    assert facts.warnings == ["instruction_text_differs"]


def test_a_control_token_of_the_tokenizer_is_no_text(preprocess, rows, tiny_dir, tmp_path):
    """A tokenizer that normalizes what it reads makes control tokens of letters that look like nothing of the kind."""
    model = shutil.copytree(tiny_dir / "model", tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": "<|eot_id|>"}
    tokenizer["added_tokens"] = [{**token, "normalized": True} for token in tokenizer["added_tokens"]]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows[1]["messages"][2]["content"][0]["text"] += " ~"
    (tmp_path / "list.json").write_text(json.dumps(rows[:2]))
    settings = ("--set", f"model.base={model}", "--set", "preprocess.max_reject_fraction=0.5", "--workers", 1)
    result = preprocess(tmp_path / "list.json", tmp_path / "out", *settings)
    assert result.returncode == 0, result.stderr
    assert open_dataset(tmp_path / "out")[0].rejects == {"text_control_token": 1}
    assert "token 128009" in (tmp_path / "out" / "rejects.jsonl").read_text()


def test_without_mels(preprocess, arabic_mini, tmp_path):
    result = preprocess(arabic_mini, tmp_path / "out", "--limit", 2, "--set", "features.whisper=none")
    assert result.returncode == 0, result.stderr
    dataset, index = open_dataset(tmp_path / "out")
    assert dataset.fingerprints.mel is None
    assert (index["mel_samples"] == 0).all()
    assert SampleReader(tmp_path / "out").read(index[0]).reference_mel() is None


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere.json", "OUT"], 1, "error: nowhere.json: no such file; give a ChatML list"),
        (["tests", "OUT"], 1, "error: tests: a folder; give the ChatML list"),
        (["EMPTY", "OUT"], 1, "the list is empty"),
        (["BROKEN", "OUT"], 1, "line 1: the list ends without"),
        (["SILENT", "OUT"], 1, "error: no usable row in"),
        (["LIST", "tests"], 1, "error: tests: not empty ("),
        (["LIST", "LIST"], 1, "is a file; OUT must be a folder"),
        (["LIST", "OUT", "--set", "preprocess.sede=1"], 1, "unknown key preprocess.sede; did you mean 'seed'?"),
        (["LIST", "OUT", "--set", "preprocess.seed=x", "--set", "features.whisper=big"], 1, "features.whisper = 'big'"),
        (["LIST", "OUT", "--set", "model.base=nowhere"], 1, "model.base = 'nowhere': no such folder"),
        (["LIST", "OUT", "--workers", "0"], 2, "--workers"),
        (["LIST", "OUT", "--engine", "ray", "--device", "cuda"], 2, "--device cuda needs --engine local"),
        (["LIST", "OUT", "--set", "preprocess.codec_precision=fp16"], 1, "one of 'fp32', 'bf16'"),
        (["LIST"], 2, "Missing argument 'OUT'"),
    ],
)
def test_mistakes_give_one_clear_line(preprocess, arabic_mini, rows, tmp_path, arguments, status, message):
    silent = copy.deepcopy(rows[:2])
    for row in silent:
        row["messages"][1]["content"][1]["audio_url"] = "nowhere.wav"
    contents = {"EMPTY": "[]", "BROKEN": f"[{json.dumps(rows[0])}, oops", "SILENT": json.dumps(silent)}
    names = {"LIST": str(arabic_mini), "OUT": str(tmp_path / "out")}
    for name, text in contents.items():
        (tmp_path / f"{name}.json").write_text(text)
        names[name] = str(tmp_path / f"{name}.json")
    result = preprocess(*[names.get(argument, argument) for argument in arguments])
    assert result.returncode == status, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_damage_is_found_and_named(job: Path, run_command, tmp_path):
    def verify(out: Path) -> tuple[int, str]:
        result = run_command("inspect-shards", "verify", out)
        assert "Traceback" not in result.stderr
        return result.returncode, result.stderr

    assert verify(job) == (0, "5 shards, 72 samples: sound\n")
    tar = Path("shards/000/shard-000002.tar")
    size = (job / tar).stat().st_size
    _, index = open_dataset(job)
    fifth = index[index["shard"] == 2][5]
    inside = int(fifth["offset"]) + 2048

    def damaged(name: str, change) -> Path:
        copy_of_job = shutil.copytree(job, tmp_path / name)
        (copy_of_job / tar).chmod(0o644)
        change(copy_of_job / tar)
        return copy_of_job

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[inside] ^= 1
        path.write_bytes(data)

    def zero_tail(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2))

    status, text = verify(damaged("flipped", flip))
    assert status == 1
    assert "shard-000002.tar: sha256" in text
    assert "sample 5 of 16" in text
    assert "sample 4 of 16" not in text
    with pytest.raises(Exception, match="checksum differs"):
        SampleReader(tmp_path / "flipped").read(fifth)
    status, text = verify(damaged("truncated", lambda path: path.write_bytes(path.read_bytes()[: size // 2])))
    assert status == 1
    assert f"{size // 2} bytes, the marker says {size}" in text
    assert "sample 15 of 16" in text
    status, text = verify(damaged("zeroed", zero_tail))
    assert status == 1
    assert "sample 15 of 16" in text
    status, text = verify(damaged("unmarked", lambda path: path.with_suffix(".done.json").unlink()))
    assert status == 1
    assert "no done marker" in text
    assert "shard-000002.done.json" in text


def test_inspect_summary_list_and_show(job: Path, run_command):
    summary = run_command("inspect-shards", "summary", job, "--json")
    facts = json.loads(summary.stdout)
    assert facts["samples"] == "72 of 72 rows, in 5 shards"
    listed = run_command("inspect-shards", "list", job).stdout.splitlines()
    assert len(listed) == 72
    key, name = listed[20].split()[:2]
    for wanted in (key, name):
        shown = run_command("inspect-shards", "show", job, wanted)
        assert shown.returncode == 0
        assert f"key {key}   id {name}" in shown.stdout
        assert "codebook 7:" in shown.stdout
    absent = run_command("inspect-shards", "show", job, "nobody")
    assert absent.returncode == 1
    assert "no sample 'nobody'" in absent.stderr
    assert run_command("inspect-shards", "summary", "nowhere").returncode == 1
