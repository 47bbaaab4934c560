"""`checkpoints merge`: which checkpoint of a run, and in numbers what merging did to its update."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from short_run import run_with_checkpoints

from shards.errors import CheckpointError
from shards.writer import write_json
from tools.checkpoints.cli import main
from tools.checkpoints.merge import choose_checkpoint, merge_checkpoint
from tools.checkpoints.merge_proof import Rounding, check_logits
from train.run_folder.checkpoint_folders import digests, mark_best


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
