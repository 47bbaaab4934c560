"""Several ranks on gloo: the same losses, norms and adapters for any number of ranks, and any of the step's options.

Real processes by the real `train --gpus N` on CPU. Packs are made by the plan, so a global batch is the same for all: here of
two data sets mixed by temperature, with a reference drawn for each sample and some of their texts left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mixed_sets import with_clips, write_columns
from safetensors.torch import load_file
from train_process import (
    STEPS,
    TRAIN,
    Started,
    arguments_of,
    environment,
    history,
    run_train,
    same_history,
    train_command,
)
from warm_start import WarmProcess

from shards.config import SequenceSection
from shards.sequence import SequenceBuilder
from tools.checkpoints.merge import merge_checkpoint
from train.launch import allocator_settings, first_host, slurm_ranks
from train.run_folder.checkpoint_folders import damage

MIX = ["train.data_temperature=0.5", "train.speaker_temperature=0.5"]
MIX += ["train.reference=same_speaker", "sequence.reference_text_dropout=0.3", "train.validation_fraction=0.3"]


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory, make_dataset, make_sample) -> list[Path]:
    """A large and a small one, in which every clip has a hash of its own."""
    place, rng = tmp_path_factory.mktemp("data-sets"), np.random.default_rng(0)
    folders = []
    for name, size, speakers in (("large", 32, 4), ("small", 8, 2)):
        samples = []
        for seed in range(size):
            speaker = f"{name}-{seed % speakers}"
            sample = make_sample(seed + 100 * speakers, *rng.integers(3, 30, 2).tolist(), speaker=speaker)
            samples.append(with_clips(sample, f"{name} {seed} reference", f"{name} {seed} target"))
        folders.append(write_columns(make_dataset(place / name, samples), samples))
    return folders


@pytest.fixture(scope="module")
def command_of(data_sets, tiny_dir):
    """A function (run, gpus, settings...) -> the real command as a list."""

    def command(run: Path, gpus: int, *settings: str) -> list[str]:
        words = train_command(data_sets[0], run, tiny_dir, gpus, *MIX, *settings)
        words.insert(words.index(str(data_sets[0])) + 1, str(data_sets[1]))
        return [*words, "--skip-preflight"]

    return command


@pytest.fixture(scope="module")
def train_run(command_of, tmp_path_factory, repository):
    """A function (name, gpus, settings...) -> run folder, after the real command."""

    def start(name: str, gpus: int, *settings: str, run: Path | None = None) -> Path:
        folder = run or tmp_path_factory.mktemp("runs") / name
        result = run_train(command_of(folder, gpus, *settings), repository)
        assert result.returncode == 0, result.stderr
        return folder

    return start


def of_data_sets(run: Path) -> list[dict[str, float]]:
    """Metrics of single data sets, of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.count("/") == 2} for line in lines]


def same_metrics_of_data_sets(found: Path, expected: Path) -> None:
    """Counts exactly, losses as closely as those of whole steps."""
    one, other = of_data_sets(expected), of_data_sets(found)
    assert [line.keys() for line in one] == [line.keys() for line in other]
    names = {"metrics/samples/small", "metrics/hours/large", "loss/audio_loss/large", "eval/audio_loss/large"}
    assert names <= one[-1].keys()
    for line, same in zip(one, other, strict=True):
        for name, value in line.items():
            exactly = name.startswith("metrics/")
            assert same[name] == (value if exactly else pytest.approx(value, abs=1e-5)), name


def adapter(run: Path) -> dict:
    return load_file(run / "checkpoints" / f"checkpoint-{STEPS}" / "adapter" / "adapter_model.safetensors")


def same_adapter(found: Path, expected: Path, strays: int = 0) -> None:
    """Every weight within 1e-6, but for at most so many `strays` of all, which stay within a tenth of one step of 1e-3."""
    one, other = adapter(expected), adapter(found)
    assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
    apart = {name: (one[name] - other[name]).abs() for name in one}
    beyond = {name: int((~(far <= 1e-6)).sum()) for name, far in apart.items()}  # NaN is beyond everything
    assert sum(beyond.values()) <= strays, {name: (count, apart[name].max()) for name, count in beyond.items() if count}
    assert all(bool(far.max() < 1e-4) for far in apart.values()), beyond


@pytest.fixture(scope="module")
def alone(train_run) -> Path:
    return train_run("alone", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "settings"),
    [
        (2, []),
        (4, ["train.shard_base=true"]),
        (2, ["train.activation_checkpointing=full", "train.fused_lora=off"]),
        (2, ["train.shard_base=true", "train.activation_checkpointing=full", "train.compile=aot_eager"]),
    ],
    ids=[
        "two",
        "four-shard-base",
        "two-recompute-unfused",
        "two-shard-base-recompute-compiled",
    ],
)
def test_ranks_accumulation_and_options_do_not_change_a_step(alone, train_run, gpus, settings, tmp_path):
    """Four packs make a step: one rank accumulates four, two ranks two each, four ranks one each."""
    run = train_run("run", gpus, *settings)
    same_history(run, history(alone))
    same_metrics_of_data_sets(run, alone)
    # Layer by layer and compiled each sum has another order, on AMD processors another library's. AdamW divides by the root of
    # tiny second moments, so a weight whose gradient is near nothing goes where rounding says: one of all was 1.2e-5 apart after
    # five steps of 1e-3 (AVX-512). One pack counted 1 % less in one step moves hundreds beyond 1e-6.
    sums_otherwise = {"train.fused_lora=off", "train.compile=aot_eager"} & set(settings)
    same_adapter(run, alone, strays=2 if sums_otherwise else 0)
    assert len(adapter(run)) == 2 * (4 * 10 + 1)  # ten linear layers in each of four, and the audio head
    if (gpus, settings) == (2, []):  # what two ranks wrote is merged as what one has written
        merge_checkpoint(run, tmp_path / "of-two")
        merge_checkpoint(alone, tmp_path / "of-one")
        two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("of-two", "of-one"))
        assert two.keys() == one.keys()
        for name in one:
            np.testing.assert_allclose(two[name].numpy(), one[name].numpy(), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("gpus", [1, 2])
def test_gradient_accumulation_steps_counts_packs_per_gpu(command_of, repository, tmp_path, gpus):
    run = tmp_path / "run"
    command = [
        *command_of(run, gpus, "train.packs_per_step=1", "train.max_steps=1"),
        "--gradient-accumulation-steps",
        "3",
    ]
    done = run_train(command, repository)
    assert done.returncode == 0, done.stderr
    assert f"packs_per_step = {3 * gpus}\n" in (run / "config.toml").read_text()


@pytest.fixture(scope="module")
def equal_samples(tmp_path_factory, make_dataset, make_sample, tokenizer) -> tuple[Path, int]:
    """Sixteen samples of one length, so that any number of packs can hold exactly all of them; and that length.

    Their targets are of different lengths, so that packs and ranks have unequal numbers of things to learn.
    """
    rng = np.random.default_rng(2)
    samples = []
    for target_frames in rng.integers(4, 17, 16).tolist():
        sample = make_sample(0, 20 - target_frames, target_frames)  # of one seed, so of the same texts
        codes = rng.integers(0, 1024, (8, 20)).astype(np.uint16)
        reference, target = codes[:, target_frames:], codes[:, :target_frames]
        samples.append(dataclasses.replace(sample, reference_codes=reference, target_codes=target))
    builder = SequenceBuilder(tokenizer, SequenceSection())
    (length,) = {len(builder.training(sample)) for sample in samples}
    return make_dataset(tmp_path_factory.mktemp("equal"), samples), length


@pytest.fixture(scope="module")
def run_of_packs(equal_samples, tiny_dir, repository, tmp_path_factory):
    """A function (ranks, packs per rank) -> a run of five steps of the same sixteen samples."""
    dataset, length = equal_samples

    def start(ranks: int, packs: int) -> Path:
        run = tmp_path_factory.mktemp("packs") / f"{ranks}-ranks-{packs}-packs"
        settings = [f"train.packs_per_step={ranks * packs}", f"train.batch_tokens={16 // (ranks * packs) * length}"]
        settings += ["loss.contrastive_loss_weight=0"]  # its negatives are those of a pack, by design
        # The default rate: at ten times that, the sign-like first steps of AdamW take single weights whose gradient is near
        # nothing 3e-6 apart, by the order of summation alone.
        settings += ["train.learning_rate=1e-4"]
        command = train_command(dataset, run, tiny_dir, ranks, *settings)
        assert run_train([*command, "--skip-preflight"], repository).returncode == 0
        plan = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert plan["metrics/filler_packs"] == 0, "a pack without samples would say nothing about accumulation"
        return run

    return start


@pytest.fixture(scope="module")
def one_pack(run_of_packs) -> Path:
    return run_of_packs(1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "packs"), [(1, 4), (2, 1), (2, 4), (4, 2)])
def test_a_step_is_the_same_however_its_samples_are_accumulated(one_pack, run_of_packs, ranks, packs):
    """Sixteen samples as one pack, and as up to eight packs on one, two and four ranks."""
    run = run_of_packs(ranks, packs)
    same_history(run, history(one_pack))
    same_adapter(run, one_pack)


@pytest.mark.slow
def test_a_mistake_that_all_ranks_see_is_printed_once(command_of, repository, tmp_path):
    process = Started(command_of(tmp_path / "run", 2, "train.batch_tokens=50"), repository)
    status, messages = process.end(limit_s=60)
    assert status == 1
    assert "Traceback" not in messages
    lines = [line for line in messages.splitlines() if "error" in line]
    assert lines[0].startswith("error: train.batch_tokens = 50: no sample fits")
    assert lines[1] == "error: rank 0 failed first (exit status 1); the others were ended"
    assert len(lines) == 2


@pytest.mark.slow
def test_a_loss_not_finite_ends_all_ranks_keeps_the_checkpoint(command_of, repository, tmp_path):
    run = tmp_path / "run"
    harmful = ["train.learning_rate=1e30", "train.warmup_steps=0", "train.save_every=1"]
    process = Started(command_of(run, 2, *harmful), repository)
    status, messages = process.end(limit_s=120)
    assert status == 1
    assert "error: step 2: loss nan, gradient norm nan: not finite, stopped before the update; samples 0" in messages
    assert "Traceback" not in messages
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert damage(run / "checkpoints" / "checkpoint-1") == []


@pytest.mark.slow
def test_a_file_named_train_in_this_folder_is_not_run_instead(command_of, repository, tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train')")
    command = [*command_of(tmp_path / "run", 2), "--dry-run"]
    command[2] = f"import sys; sys.path[:] = [p for p in sys.path if p not in ('', {str(tmp_path)!r})]; {command[2]}"
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(repository),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "the wrong train" not in done.stderr
    assert "2 ranks on cpu" in done.stderr


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x1)",
    "SLURM_STEP_NODELIST": "localhost",
}


@pytest.mark.slow
def test_tasks_of_a_slurm_step_join_each_other(alone, command_of, repository, tmp_path):
    """What `srun --ntasks 2 train SHARDS RUN` starts: two tasks that know each other by Slurm's variables only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])  # for the test: ports made from job numbers may be taken here
    processes = []
    for rank in "01":
        command = [part for part in command_of(tmp_path / "run", 0) if part not in ("--gpus", "0")]
        task = {**SLURM, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": port}
        env = {**environment(repository), **task}
        processes.append(WarmProcess("train", arguments_of(command), env))
    ended = [(process.communicate(timeout=240)[1], process.returncode) for process in processes]
    assert [status for _, status in ended] == [0, 0], ended
    assert "2 ranks on cpu" in ended[0][0]
    same_history(tmp_path / "run", history(alone))


def test_slurms_variables_become_torchs():
    task = {**SLURM, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    assert slurm_ranks(task) == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "24711",
    }
    assert slurm_ranks({**task, "RANK": "0", "WORLD_SIZE": "8"}) == {}, "torchrun inside a step"
    assert slurm_ranks({"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == {}, "a batch script"
    assert slurm_ranks({**task, "MASTER_ADDR": "10.0.0.1"}).get("MASTER_ADDR") is None, "what the user says stays"
    names = {"gpu[003-004,7],cpu1": "gpu003", "node1": "node1", "a,b": "a", "n[7,9]": "n7", "r[1-2]n": "r1n"}
    assert {nodes: first_host(nodes) for nodes in names} == names


def test_the_allocator_grows_its_blocks_unless_the_user_says(repository):
    assert allocator_settings({}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_settings({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}) == {}
    script = (
        "import os, sys, train.launch\n"
        "train.launch.is_worker = lambda: print(os.environ['PYTORCH_ALLOC_CONF'], 'torch' in sys.modules) or exit(0)\n"
        f"{TRAIN}"
    )
    arguments = ["RUN", "RUN", "--set", "train.loader=stream", "--set", "train.max_steps=1"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=repository)
    assert done.stdout == "expandable_segments:True False\n", done.stderr


# --- interruptions --------------------------------------------------------------------------------------------------

LAST = 10
LONG = [f"train.max_steps={LAST}", "train.save_every=2"]


@pytest.fixture(scope="module")
def uninterrupted_run(train_run) -> Path:
    return train_run("uninterrupted", 1, *LONG)


@pytest.fixture(scope="module")
def uninterrupted(uninterrupted_run) -> list[tuple[float, float]]:
    return history(uninterrupted_run)


@pytest.fixture
def start(command_of, repository):
    started: list[Started] = []

    def begin(run: Path, gpus: int, *settings: str) -> Started:
        started.append(Started(command_of(run, gpus, *settings), repository))
        return started[-1]

    yield begin
    for process in started:
        if process.process.poll() is None:
            process.kill_all()


@pytest.mark.slow
def test_killed_and_continued_with_other_numbers_of_ranks(start, train_run, uninterrupted_run, tmp_path):
    """kill -9 of everything at 2 ranks, then at 1 with LoRA layer by layer, then to the end with 4."""
    run = tmp_path / "run"
    for gpus, step, fused in ((2, random.randint(3, 4), "on"), (1, random.randint(5, 7), "off")):
        process = start(run, gpus, *LONG, f"train.fused_lora={fused}")
        process.wait_for(f"step {step}/{LAST}")
        process.kill_all()
    train_run("again", 4, *LONG, run=run)
    same_history(run, history(uninterrupted_run))
    same_metrics_of_data_sets(run, uninterrupted_run)


@pytest.mark.slow
def test_one_rank_killed_ends_the_others_and_the_run_continues(start, train_run, uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = start(run, 2, *LONG)
    process.wait_for(f"step {random.randint(2, 6)}/{LAST}")
    ranks = process.workers()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    status, messages = process.end(limit_s=90)
    assert status == 1
    assert "failed first (killed by signal 9); the others were ended" in messages
    assert "Traceback" not in messages
    train_run("again", 2, *LONG, run=run)
    same_history(run, uninterrupted)


SIGNALS = [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM), (2, signal.SIGUSR1), (2, signal.SIGINT)]


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "number"), SIGNALS)
def test_a_signal_saves_and_the_same_command_goes_on(start, train_run, uninterrupted, tmp_path, gpus, number):
    """At any step. A single process gets it with its loader processes, as from a terminal or Slurm; a launcher alone, which
    sends it to the ranks and their loader processes."""
    run, workers = tmp_path / "run", "train.num_workers=2"
    process = start(run, gpus, *LONG, workers)
    process.wait_for(f"step {random.randint(2, 6)}/{LAST}")
    if gpus == 1:
        os.killpg(process.process.pid, number)
    else:
        process.process.send_signal(number)
    status, messages = process.end(limit_s=60)
    assert status == 143, messages
    assert "stopped by a signal after step" in messages
    assert "the same command goes on" in messages
    assert "Traceback" not in messages
    assert messages.count("Ctrl-C: the pack is finished") == (number == signal.SIGINT)
    train_run("again", gpus, *LONG, workers, run=run)
    same_history(run, uninterrupted)


@pytest.mark.slow
def test_a_launcher_stopped_before_its_ranks_could_save_says_so(command_of, repository, tmp_path):
    """The last checkpoint meets a full disk: a script that starts the run again must not read a clean stop."""
    run = tmp_path / "run"
    process = Started(command_of(run, 2, *LONG, "train.save_every=99"), repository)
    process.wait_for(f"step 3/{LAST}")
    for rank in process.workers():
        resource.prlimit(rank, resource.RLIMIT_FSIZE, (20_000, 20_000))
    process.process.send_signal(signal.SIGTERM)
    status, messages = process.end(limit_s=60)
    assert status == 1, messages
    assert "not saved" in messages
    assert "error: stopped by SIGTERM, and nothing was saved then; what the ranks said above says why" in messages


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_skipped(train_run, command_of, uninterrupted, tmp_path, repository):
    run = train_run("run", 1, *LONG, "train.max_steps=6")
    newest = run / "checkpoints" / "checkpoint-6"
    state = newest / "state" / "tensors.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    process = Started(command_of(run, 1, *LONG), repository)
    messages = process.wait_for("resumed from")
    assert f"{newest}: skipped: state/{state.name} is not what was written" in messages
    assert "checkpoint-4" in messages.splitlines()[-1]
    status, _ = process.end(limit_s=120)
    assert status == 0
    # The schedule of a run planned for 6 steps is another one: only steps up to 4 are shared.
    assert len(history(run)) == len(uninterrupted)


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_and_training_goes_on(command_of, repository, tmp_path):
    """Files larger than 200 kB cannot be written from the third step on: a real fault of the operating system."""
    run = tmp_path / "run"
    limited = (
        "import resource, sys, train.run_folder.checkpoint as c; old = c.Checkpoints.save\n"
        "def save(self, step, *a):\n"
        "    limit = 200_000 if step in (4, 6) else resource.RLIM_INFINITY\n"
        "    self.finish(); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    return old(self, step, *a)\n"
        "c.Checkpoints.save = save\n"
    )
    command = command_of(run, 1, *LONG, "train.max_steps=8", "train.keep_checkpoints=9")
    command[2] = limited + command[2].replace("; ", "\n")
    process = Started(command, repository)
    status, messages = process.end(limit_s=120)
    assert status == 0, messages
    assert "checkpoint-4: not saved: " in messages
    assert "File too large" in messages, messages
    assert len(history(run)) == 8
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"checkpoint-2", "checkpoint-8"}
