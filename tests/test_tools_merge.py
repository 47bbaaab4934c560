"""`checkpoints merge`: which checkpoint of a run, and in numbers what merging did to its update."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file
from short_run import run_with_checkpoints
from train_process import Started, environment, train_command
from warm_start import WarmProcess

from shards.errors import CheckpointError
from shards.writer import write_json
from tools.checkpoints.cli import main
from tools.checkpoints.merge import choose_checkpoint, find_checkpoint, merge_checkpoint
from tools.checkpoints.merge_proof import Rounding, check_logits
from train.model.weights import load_model
from train.run_folder import checkpoint_folders
from train.run_folder.checkpoint_folders import complete_checkpoints, damage, digests, mark_best, remove_old


@pytest.fixture(scope="module")
def finished(tmp_path_factory, short_data, tiny_dir) -> Path:
    """A run of six steps at a high rate, with checkpoints of steps 2, 4 and 6, and nothing held out."""
    run = tmp_path_factory.mktemp("finished") / "run"
    high_rate = ("learning_rate=1e-2", "warmup_steps=0")
    return run_with_checkpoints(run, short_data, tiny_dir, "keep_checkpoints=3", *high_rate)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def judge(run: Path, losses: dict[int, float]) -> None:
    """As if held-out data had judged the checkpoints."""
    for step, loss in losses.items():
        folder = run / "checkpoints" / f"checkpoint-{step}"
        write_json(folder / "metrics.json", {"eval/audio_loss": loss})
        write_json(folder / "COMPLETE", digests(folder))
        mark_best(run, folder, {"eval/audio_loss": loss})


def test_the_newest_where_nothing_was_held_out(run):
    folder, why = choose_checkpoint(run)
    assert (folder.name, why) == ("checkpoint-6", "newest of the run")
    with pytest.raises(CheckpointError, match=r"no best checkpoint: nothing was held out .*--which newest"):
        choose_checkpoint(run, "best")


def test_the_best_where_held_out_data_have_judged(run):
    judge(run, {2: 4.0, 4: 3.25, 6: 3.5})
    for which in ("auto", "best"):
        folder, why = choose_checkpoint(run, which)
        assert (folder.resolve().name, why) == ("checkpoint-4", "best of the run: held-out audio loss 3.2500")
    assert choose_checkpoint(run, "newest")[0].name == "checkpoint-6"
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")  # the link leads nowhere
    assert choose_checkpoint(run)[0].name == "checkpoint-6"


def test_a_step_or_a_folder_by_name(run):
    assert choose_checkpoint(run, "2")[0].name == "checkpoint-2"
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; there are 2, 4, 6"):
        choose_checkpoint(run, "3")
    folder = run / "checkpoints" / "checkpoint-4"
    assert choose_checkpoint(folder) == (folder, "named")
    with pytest.raises(CheckpointError, match="is one checkpoint"):
        choose_checkpoint(folder, "best")


def test_the_proof_stands_in_the_folder(run, tmp_path):
    done = CliRunner().invoke(main, ["merge", str(run), str(tmp_path / "merged"), "--which", "4"])
    assert done.exit_code == 0, done.output
    proof = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert (proof["step"], proof["chosen"], proof["dtype"]) == (4, "named by its step", "float32")
    assert proof["adapter_changes_logits"] > 1e-3
    assert proof["merged_differs"] < 1e-3
    assert {"self_attn.q_proj", "audio_mlp.up_proj", "audio_lm_head"} <= set(proof["groups"])
    assert all(abs(group["kept"] - 1) < 1e-3 for group in proof["groups"].values())
    assert proof["greedy_frames"] == proof["greedy_frames_equal"] > 0
    assert proof["likeliest_frames_equal"] == 50
    assert "audio_tokenizer_id" in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert "merged step 4 (named by its step)" in done.stderr
    assert "warning" not in done.stderr


def test_an_update_that_rounding_loses_is_a_warning(run, tmp_path):
    """A small update of a base in bf16: most weights stay where they were, and some move by far too much."""
    folder = run / "checkpoints" / "checkpoint-6"
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    small = {name: tensor * (1e-4 if "lora_B" in name else 1) for name, tensor in tensors.items()}
    save_file(small, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "COMPLETE", digests(folder))
    proof = merge_checkpoint(run, tmp_path / "merged", which="6", dtype="bfloat16")
    assert proof.least_kept[1] < 0.9
    assert all(group.unmoved > 0.9 for group in proof.groups.values())
    done = CliRunner().invoke(main, ["merge", str(run), str(tmp_path / "again"), "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert "merge with --dtype float32" in done.stderr
    whole = merge_checkpoint(run, tmp_path / "exact", which="6", dtype="float32")
    assert whole.least_kept[1] > 0.9


def test_rounding_is_measured_by_its_definition():
    torch.manual_seed(0)
    before, update = torch.randn(40, 30), 1e-3 * torch.randn(40, 30)
    rounding = Rounding()
    written = (before + update).bfloat16()
    for rows in (slice(0, 10), slice(10, 40)):  # layers of one group add up
        rounding.add("group", before[rows], (before + update)[rows], written[rows])
    (found,) = rounding.groups().values()
    update = (before + update) - before
    assert found.kept == pytest.approx(float((written.float() - before).norm() / update.norm()), rel=1e-5)
    assert found.unmoved == pytest.approx(float(((written.float() == before) & (update != 0)).float().mean()))


def test_a_merged_model_that_says_something_else_is_refused():
    base = torch.randn(100)
    adapted = base + 0.1 * torch.randn(100)
    changes, differs = check_logits(base, adapted, adapted.clone(), torch.float32)
    assert (changes > 0.01, differs) == (True, 0.0)
    with pytest.raises(CheckpointError, match=r"not base \+ adapter: .*100\.0%"):
        check_logits(base, adapted, base, torch.float32)  # merging gave the base back
    with pytest.raises(CheckpointError, match="not finite"):
        check_logits(base, adapted, adapted * float("nan"), torch.bfloat16)
    assert check_logits(base, base, base, torch.float32) == (0.0, 0.0)  # an untrained adapter


# --- beside a run, and cut short -----------------------------------------------------------------------------------


def test_a_best_that_moves_on_is_read_as_it_was(run):
    (run / "best").symlink_to("checkpoints/checkpoint-4")
    folder, why = choose_checkpoint(run / "best")
    assert (folder, why) == (run / "checkpoints" / "checkpoint-4", "named")
    assert find_checkpoint(run / "best") == folder


def test_a_live_run_is_read_and_said_to_be_live(short_data, tiny_dir, repository, tmp_path):
    """It writes and removes checkpoints all the time: none is ever listed as damaged."""
    run = tmp_path / "run"
    quick = ["train.save_every=1", "train.keep_checkpoints=1", "train.max_steps=100000", "train.packs_per_step=1"]
    live = Started(train_command(short_data, run, tiny_dir, 1, *quick), repository)
    try:
        live.wait_for("saved ")
        steps: set[int] = set()
        while len(steps) < 3:  # it goes on meanwhile
            assert live.process.poll() is None
            done = CliRunner().invoke(main, ["list", str(run), "--json"])
            if "no complete checkpoint" not in done.stderr:
                assert done.exit_code == 0, done.output
                assert re.search(r"note: \S+: is still being written \(host \S+, pid \d+, .*train", done.stderr)
                steps.update(row["step"] for row in json.loads(done.stdout).values())
            time.sleep(0.02)
        merged = CliRunner().invoke(main, ["merge", str(run), str(tmp_path / "merged")])
        assert "is still being written" in merged.stderr
        assert merged.exit_code == 0 or "removed while it was read" in merged.stderr, merged.output
        assert (merged.exit_code == 0) == (tmp_path / "merged").exists()
    finally:
        live.kill_all()


def test_a_checkpoint_that_goes_away_is_one_line(run, tmp_path, monkeypatch):
    def removed(chosen, dtype):
        shutil.rmtree(chosen.folder)
        raise CheckpointError("no such file")

    monkeypatch.setattr("tools.checkpoints.merge.merged_and_proven", removed)
    done = CliRunner().invoke(main, ["merge", str(run), str(tmp_path / "merged")])
    assert done.exit_code == 1
    assert "checkpoint-6: removed while it was read: a run keeps its newest" in done.stderr


def test_a_removed_checkpoint_loses_its_name_first(run, monkeypatch):
    names = []
    monkeypatch.setattr(checkpoint_folders.shutil, "rmtree", lambda path: names.append(path.name))
    remove_old(run, keep=2)
    assert names == [".checkpoint-2.removed"]
    assert [folder.name for folder in complete_checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]
    monkeypatch.undo()
    remove_old(run, keep=2)  # a run that was killed there goes on
    assert not (run / "checkpoints" / ".checkpoint-2.removed").exists()


def killed_while_writing(name: str, given: list, out: Path) -> Path | None:
    """Start the command and kill it when the first file is there; None where it had ended before that."""
    partial = out.with_name(f".{out.name}.tmp")
    process = WarmProcess("checkpoints", [name, *given, out], environment(REPOSITORY))
    while process.poll() is None and not (partial.is_dir() and any(partial.iterdir())):
        time.sleep(0.001)
    process.kill()
    return out if process.wait() == -signal.SIGKILL else None


@pytest.mark.parametrize("name", ["merge", "average", "quantize"])
def test_a_killed_writer_leaves_nothing_that_looks_whole(run, model_dir, run_command, name, tmp_path):
    """SIGKILL while OUT is written; the same command again writes it, and nothing of the first is left."""
    if name == "quantize":
        pytest.importorskip("torchao", reason="pip install -c constraints.txt -e '.[quantize]'")
    given = {
        "merge": [run],
        "quantize": [model_dir, "--int8"],
        "average": [run / "checkpoints" / "checkpoint-2", run / "checkpoints" / "checkpoint-6"],
    }[name]
    killed = (killed_while_writing(name, given, tmp_path / f"out-{attempt}") for attempt in range(5))
    out = next(filter(None, killed))  # an average is written in a tenth of a second, which a busy machine may miss
    assert not out.exists()
    again = run_command("checkpoints", name, *given, out)
    assert again.returncode == 0, again.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".out")) == []
    if name == "average":
        assert damage(out) == []
    else:
        load_model(out, torch.float32)


@pytest.mark.parametrize("name", ["merge", "average", "quantize", "convert"])
def test_an_out_that_cannot_be_is_refused_before_the_work(run, model_dir, name, tmp_path, monkeypatch):
    """/proc refuses every user, also the root that tests may run as."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for module in ("tools.checkpoints.merge.merged_and_proven", "tools.checkpoints.average.read_update"):
        monkeypatch.setattr(module, None)
    monkeypatch.setattr("tools.checkpoints.model_folder.load_model", None)
    given = {
        "merge": [run],
        "quantize": [model_dir, "--int8"],
        "average": [run / "checkpoints" / "checkpoint-2", run / "checkpoints" / "checkpoint-6"],
        "convert": [model_dir],
    }[name]
    for out, words in [
        ("/proc/out", "not written: "),
        (tmp_path / "file" / "x", "not written: "),
        (tmp_path / "file", "is a file; give a folder"),
        (tmp_path / "full", "exists and is not empty; give another folder"),
        ("/proc", "a disk is mounted here"),
    ]:
        done = CliRunner().invoke(main, [name, *map(str, given), str(out)])
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1), (out, done.output)
        assert words in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"file", "full", "run"}


@pytest.mark.parametrize("lost", ["adapter/adapter_model.safetensors", "identity.json"])
def test_a_sealed_checkpoint_without_a_part_is_none(run, tmp_path, lost):
    """COMPLETE says that all is there, because it was written anew after the part was lost."""
    folder, out = run / "checkpoints" / "checkpoint-6", tmp_path / "out.md"
    (folder / lost).unlink()
    write_json(folder / "COMPLETE", digests(folder))
    for command in (
        ["card", folder, out],
        ["merge", folder, out],
        ["compare", run],
        ["average", folder, run / "checkpoints" / "checkpoint-4", out],
        ["list", run],
    ):
        done = CliRunner().invoke(main, [str(word) for word in command])
        assert done.exit_code == 1, command
        assert f"COMPLETE does not name {lost}, which is missing" in done.stderr, command
        assert not out.exists()


def test_what_is_no_checkpoint_is_said_to_be_that(run, model_dir, tmp_path):
    done = CliRunner().invoke(main, ["merge", str(model_dir), str(tmp_path / "out")])
    assert (done.exit_code, "is a model's folder, finished already" in done.stderr) == (1, True)
    adapter = run / "checkpoints" / "checkpoint-6" / "adapter"
    assert CliRunner().invoke(main, ["convert", str(adapter), str(tmp_path / "sound")]).exit_code == 0
    (adapter / "adapter_config.json").write_text("[]")
    done = CliRunner().invoke(main, ["convert", str(adapter), str(tmp_path / "out")])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.output
    assert not (tmp_path / "out").exists()
