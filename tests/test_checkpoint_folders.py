"""Checkpoint folders as people leave them (renamed, copied, marked, forged), and held-out losses that judge nothing."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from short_run import losses, run_with_checkpoints

from shards.config import SequenceSection
from shards.errors import CheckpointError, PipelineError
from shards.sequence import SequenceBuilder
from shards.writer import write_json
from tools.checkpoints.merge import find_checkpoint, merge_checkpoint
from train.config import LossSection
from train.data.source import HeldOut
from train.data.stages import FILLER, LoadedPack
from train.evaluation.curve_monitor import CurveMonitor
from train.evaluation.held_out import Evaluation
from train.loop import RunOptions, train
from train.model.batch import pack
from train.model.lora import read_adapter_config
from train.model.weights import load_model
from train.run_folder.checkpoint_folders import (
    best_checkpoint,
    complete_checkpoints,
    digests,
    mark_best,
    own_checkpoints,
    read_step,
    remove_old,
)
from train.run_folder.metrics import held_out_history
from train.world import ALONE


@pytest.fixture(scope="module")
def finished(tmp_path_factory, short_data, tiny_dir) -> Path:
    """A run of six steps with its checkpoints of steps 4 and 6."""
    run = tmp_path_factory.mktemp("finished") / "run"
    return run_with_checkpoints(run, short_data, tiny_dir, "keep_checkpoints=2")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


# --- names ----------------------------------------------------------------------------------------------------------


def test_folders_of_any_name_are_listed_resumed_and_left_alone(run, short_data, short_config, run_command):
    folders = run / "checkpoints"
    shutil.copytree(folders / "checkpoint-4", folders / "checkpoint-100.bak")
    shutil.copytree(folders / "checkpoint-4", folders / "checkpoint-abc")
    (folders / "checkpoint-6").rename(folders / "checkpoint-900")  # a number that is not its step
    (folders / "notes.txt").write_text("the good one is 4")
    (folders / "checkpoint-5").write_text("a file")
    (folders / "checkpoint-7").mkdir()
    (folders / "link").symlink_to(folders / "checkpoint-4")
    listed = run_command("checkpoints", "list", run)
    assert listed.returncode == 0, listed.stderr
    assert [line.split("  ")[1] for line in listed.stdout.splitlines()] == ["step 4"] * 4 + ["step 6"]
    assert find_checkpoint(run).name == "checkpoint-900"
    kept = names(run)
    longer = short_config("train.max_steps=8", "train.keep_checkpoints=1")
    last = train(longer, short_data, run, RunOptions())
    assert last == folders / "checkpoint-8"
    assert list(losses(run)) == list(range(1, 9)), "it went on from step 6"
    assert names(run) == (kept | {"checkpoint-8"}) - {"checkpoint-4"}, (
        "pruning removes what the run named, nothing else"
    )
    said = (run / "logs" / "training.log").read_text()
    assert "checkpoint-100.bak: step 4 under another name: left alone; --resume" in said


def test_a_checkpoint_is_merged_and_resumed_under_any_name(run, short_data, short_config, tmp_path):
    (run / "best").symlink_to("checkpoints/checkpoint-4")
    elsewhere = shutil.copytree(run / "checkpoints" / "checkpoint-6", tmp_path / "my voice")
    assert merge_checkpoint(run / "best", tmp_path / "merged-best").step == 4
    assert json.loads((tmp_path / "merged-best" / "higgs_voice.json").read_text())["step"] == 4
    assert merge_checkpoint(elsewhere, tmp_path / "merged").step == 6
    resume = RunOptions(resume=str(elsewhere))
    assert train(short_config("train.max_steps=7"), short_data, tmp_path / "other", resume)
    assert list(losses(tmp_path / "other")) == [7]


def test_a_run_does_not_begin_anew_beside_a_renamed_checkpoint(run, short_data, short_config):
    folders = run / "checkpoints"
    shutil.rmtree(folders / "checkpoint-4")
    (folders / "checkpoint-6").rename(folders / "good")
    with pytest.raises(
        CheckpointError, match=r"holds no sound checkpoint-NUMBER, but good: go on with --resume .*good"
    ):
        train(short_config(), short_data, run, RunOptions())
    assert list(losses(run)) == list(range(1, 7)), "nothing was cut"


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"[]",
        b'{"format":2}',
        b'{"format":2,"step":-1}',
        b'{"format":2,"step":"6"}',
        b'{"format":9,"step":6}',
        b"\xff",
    ],
)
def test_a_checkpoint_without_a_usable_step_is_one_line(run, state, run_command):
    newest = run / "checkpoints" / "checkpoint-6"
    (newest / "state" / "state.json").write_bytes(state)
    with pytest.raises(CheckpointError, match=r"state/state\.json"):
        read_step(newest)
    assert [folder.name for folder in complete_checkpoints(run)] == ["checkpoint-4"]
    assert [folder.name for folder in own_checkpoints(run)] == ["checkpoint-4"]
    if state == b"[]":
        listed = run_command("checkpoints", "list", run)
        assert listed.returncode == 0
        assert "state/state.json" in listed.stderr
        merged = run_command("checkpoints", "merge", newest, run / "out")
        assert merged.returncode == 1
        assert merged.stderr.count("\n") == 1


# --- checkpoints are data -------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self):
        return os.system, (self._command,)


def forged(folder: Path, name: str, proof: Path) -> None:
    """A pickle that would run a command, and COMPLETE as its maker would write it."""
    (folder / name).write_bytes(pickle.dumps(Payload(f"touch {proof}")))
    write_json(folder / "COMPLETE", digests(folder))


@pytest.mark.parametrize(
    "name",
    ["state/.metadata", "state/tensors.safetensors", "state/state.json", "state/__0_0.distcp", "identity.json",
     "config.toml", "adapter/adapter_model.bin", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"],
)  # fmt: skip
def test_a_forged_pickle_in_a_checkpoint_is_never_run(run, short_data, short_config, tmp_path, name):
    folder, proof = run / "checkpoints" / "checkpoint-6", tmp_path / "proof"
    forged(folder, name, proof)
    harmless = {"state/__0_0.distcp", "adapter/adapter_model.bin"}  # nobody opens them
    used_by_resume = name.startswith(("state/", "identity")) and name not in harmless
    if used_by_resume:
        with pytest.raises(PipelineError):
            train(short_config("train.max_steps=7"), short_data, run, RunOptions(resume=str(folder)))
    if name.startswith("adapter/adapter_") or name == "config.toml":
        if name in harmless:
            merge_checkpoint(folder, tmp_path / "merged")
        else:
            with pytest.raises(PipelineError):
                merge_checkpoint(folder, tmp_path / "merged")
    assert not proof.exists()
    pickle.loads((folder / name).read_bytes())
    assert proof.exists(), "the forgery works where it is unpickled"


def test_state_of_an_older_version_is_refused_and_not_begun_anew(run, short_data, short_config):
    for folder in own_checkpoints(run):
        shutil.rmtree(folder / "state")
        (folder / "state").mkdir()
        (folder / "state" / ".metadata").write_bytes(pickle.dumps({}))
        write_json(folder / "COMPLETE", digests(folder))
    with pytest.raises(CheckpointError, match=r"checkpoint-\d: its state is a pickle of an older version.*train anew"):
        train(short_config(), short_data, run, RunOptions())
    assert list(losses(run)) == list(range(1, 7)), "nothing was cut"


def test_state_that_does_not_fit_is_refused_tensor_by_tensor(run, short_data, short_config):
    folder = run / "checkpoints" / "checkpoint-6"
    path = folder / "state" / "tensors.safetensors"
    tensors = load_file(path)
    first, second, third = sorted(tensors)[:3]
    del tensors[first]
    tensors[second] = tensors[second][..., None]
    tensors[third] = tensors[third].half()
    tensors["optimizer/__class__/evil"] = torch.zeros(1)
    save_file(tensors, path)
    write_json(folder / "COMPLETE", digests(folder))
    with pytest.raises(CheckpointError, match=r"does not fit the run: .*missing") as caught:
        train(short_config("train.max_steps=7"), short_data, run, RunOptions())
    for name in (first, second, third, "unexpected optimizer/__class__/evil"):
        assert name in str(caught.value)


def test_nothing_here_unpickles_what_comes_from_outside(repository):
    """`torch.load` only with weights_only; pickle only between the processes of one Ray job."""
    found = []
    for path in sorted(
        path for stage in ("preprocess", "shards", "tools", "train") for path in (repository / stage).rglob("*.py")
    ):
        where = str(path.relative_to(repository))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [f"{where}: import {name.name}" for name in node.names if name.name.split(".")[0] in UNSAFE]
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE:
                found.append(f"{where}: from {node.module}")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load" and given.get("weights_only") != "True":
                found.append(f"{where}: {ast.unparse(node)}")
            if given.get("allow_pickle") == "True" or called in ("dcp.load", "eval", "exec", "torch.hub.load"):
                found.append(f"{where}: {ast.unparse(node)}")
    assert [line for line in found if line != "preprocess/ray_engine.py: import pickle"] == []


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


# --- held-out losses ------------------------------------------------------------------------------------------------


def run_with_losses(run: Path, **by_step: object) -> None:
    for name, loss in by_step.items():
        folder = run / "checkpoints" / name.replace("_", "-")
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_bytes(msgspec.json.encode({"eval/audio_loss": loss}))
        mark_best(run, folder, {"eval/audio_loss": loss})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf"), None])
def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path, loss):
    run = tmp_path / "run"
    run_with_losses(run, checkpoint_2=loss)
    assert best_checkpoint(run) is None
    run_with_losses(run, checkpoint_4=3.0, checkpoint_6=loss)
    assert best_checkpoint(run) == run / "checkpoints" / "checkpoint-4"
    (run / "best").unlink()
    (run / "best").symlink_to("checkpoints/checkpoint-6")  # as an earlier version left it
    run_with_losses(run, checkpoint_8=3.5)
    assert best_checkpoint(run) == run / "checkpoints" / "checkpoint-8"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_held_out_loss_that_is_not_finite_is_no_evaluation(model_dir, tokenizer, make_sample, caplog, value):
    """One of two packs; the same weights give sound losses on the other."""
    model = load_model(model_dir, torch.float32)
    builder = SequenceBuilder(tokenizer, SequenceSection())
    sound, bad = (pack([builder.training(make_sample(seed))], [seed], [f"key-{seed}"]) for seed in (1, 2))
    logging.getLogger("train").propagate = True

    def evaluated(*batches) -> dict[str, float]:
        held_out = HeldOut(lambda: iter([LoadedPack(batch, 0) for batch in batches]), max_bad_fraction=1.0)
        return Evaluation(held_out, ALONE).losses(model, LossSection())

    assert evaluated(sound, bad)["eval/audio_loss"] > 0
    forward = type(model).forward

    def poisoned(self, batch, *given, **named):
        sums = forward(self, batch, *given, **named)
        return sums._replace(audio=sums.audio + value) if batch.keys == ["key-2"] else sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", poisoned)
        values = evaluated(sound, bad)
    assert values == {"eval/samples": 2, "eval/bad_samples": 0}
    assert "the loss is not finite, in 1 packs: samples key-2 (rank 0)" in caplog.text
    empty = pack([FILLER], [0], [])
    assert set(evaluated(empty)) == {"eval/samples", "eval/bad_samples"}
    assert "no target was read: not counted as an evaluation" in caplog.text


def test_old_lines_that_are_not_finite_do_not_stop_a_run_early(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "eval/audio_loss": NaN}\n{"step": 2, "eval/audio_loss": 3.0}\n{"step": 3, "eval/audio_loss": Infinity}\n'
        '{"step": 4, "eval/audio_loss": null}\n{"step": 5}\n'
    )
    assert held_out_history(tmp_path, 9) == [3.0]
    monitor = CurveMonitor([3.0], patience=1)
    logged = {"epoch": 1, "loss/audio_loss": 3.0, "metrics/data_wait_fraction": 0.0}
    monitor.check(2, {**logged, "eval/audio_loss": float("nan")})
    assert not monitor.should_stop_early


@pytest.mark.parametrize(
    "changed",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "proof"},
        {"target_modules": "(a+)+$"},
        {"exclude_modules": "(a+)+$"},
        {"peft_type": "PROMPT_TUNING"},
        {"r": "16"},
        {"loftq_config": {"loftq_bits": 4}},
        {"trainable_token_indices": [1, 2]},
    ],
)
def test_adapter_settings_of_another_kind_are_refused_by_name(run, changed):
    path = run / "checkpoints" / "checkpoint-6" / "adapter" / "adapter_config.json"
    assert read_adapter_config(path).r == 4
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(CheckpointError, match=next(iter(changed))):
        read_adapter_config(path)


def test_the_newest_by_step_and_the_best_are_kept(tmp_path):
    for name, step in (("checkpoint-10", 10), ("checkpoint-9", 9), ("checkpoint-30", 30), ("checkpoint-100", 100)):
        write_json(tmp_path / "checkpoints" / name / "state" / "state.json", {"format": 2, "step": step})
        write_json(tmp_path / "checkpoints" / name / "COMPLETE", {})
    shutil.copytree(tmp_path / "checkpoints" / "checkpoint-9", tmp_path / "checkpoints" / "mine")
    mark_best(tmp_path, tmp_path / "checkpoints" / "checkpoint-9", {"eval/audio_loss": 1.0})
    remove_old(tmp_path, keep=4)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5, "nothing is older than the newest four"
    remove_old(tmp_path, keep=2)
    left = {folder.name for folder in (tmp_path / "checkpoints").iterdir()}
    assert left == {"checkpoint-9", "checkpoint-30", "checkpoint-100", "mine"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_best_that_is_no_link_is_left_alone_and_ends_nothing(tmp_path, kind, caplog):
    """A copy of RUN without links has a folder there; a link cannot take its place."""
    for step, loss in ((2, 3.0), (4, 2.0)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        write_json(folder / "metrics.json", {"eval/audio_loss": loss})
    best = tmp_path / "best"
    if kind == "folder":
        shutil.copytree(tmp_path / "checkpoints" / "checkpoint-2", best)
    else:
        best.write_text("mine")
    mark_best(tmp_path, tmp_path / "checkpoints" / "checkpoint-4", {"eval/audio_loss": 2.0})
    assert not best.is_symlink()
    assert "best: no link but somebody's own: left alone; the best checkpoint is checkpoint-4" in caplog.text
    assert best_checkpoint(tmp_path) == (best if kind == "folder" else None)


@pytest.mark.parametrize("target", ["best", "nowhere", "."])
def test_a_best_that_leads_nowhere_is_replaced(tmp_path, target):
    (tmp_path / "best").symlink_to(target)
    folder = tmp_path / "checkpoints" / "checkpoint-2"
    folder.mkdir(parents=True)
    mark_best(tmp_path, folder, {"eval/audio_loss": 2.0})
    assert best_checkpoint(tmp_path) == folder
