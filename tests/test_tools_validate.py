"""`checkpoints validate`: passes on what `train` writes, fails with the reason on each kind of damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from shards.writer import write_json
from tools.checkpoints.cli import main
from tools.checkpoints.listing import Listed
from tools.checkpoints.validate import validate_checkpoint
from train.loop import RunOptions, train
from train.run_folder.checkpoint_folders import digests

ADAPTER, STATE = "adapter/adapter_model.safetensors", "state/tensors.safetensors"
CHECKS = ("files", "step", "metrics", "base", "adapter fits the base", "finite", "state equals adapter", "resumable")
CHECKS += ("every group acts", "adapter changes logits", "its own vote on labels")


@pytest.fixture(scope="module")
def sound(tmp_path_factory, short_data, tiny_dir) -> Path:
    """A checkpoint of two steps, with a base of its own to be damaged."""
    from shards.config import read_config
    from train.config import TrainConfig

    folder = tmp_path_factory.mktemp("sound")
    base = shutil.copytree(tiny_dir / "model", folder / "base")
    quick = ["batch_tokens=700", "packs_per_step=2", "max_steps=2", "log_every=1", "num_workers=0", "warmup_steps=0"]
    overrides = [f"train.{word}" for word in [*quick, "listening_samples=0"]] + ["lora.rank=4", f"model.base={base}"]
    last = train(
        read_config(TrainConfig, tiny_dir / "pipeline.toml", overrides), short_data, folder / "run", RunOptions()
    )
    assert last is not None
    return last


@pytest.fixture
def copied(sound, tmp_path) -> Path:
    """Renamed, too: a checkpoint is known by what is in it."""
    return shutil.copytree(sound, tmp_path / "my-voice")


def failed(folder: Path) -> dict[str, str]:
    findings = validate_checkpoint(folder)
    assert tuple(finding.check for finding in findings) == CHECKS
    return {finding.check: finding.detail for finding in findings if not finding.passed}


def change(folder: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], object], seal: bool = True) -> None:
    """Edit the tensors of a file; sealed, its COMPLETE says that it was written so."""
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    if seal:
        write_json(folder / "COMPLETE", digests(folder))


def test_what_train_writes_passes_every_check(sound, copied):
    assert failed(sound) == failed(copied) == {}


def test_a_changed_byte_is_named(copied):
    data = bytearray((copied / STATE).read_bytes())
    data[-1] ^= 1
    (copied / STATE).write_bytes(data)
    assert "tensors.safetensors is not what was written" in failed(copied)["files"]


@pytest.mark.parametrize("kept", [(), ("metrics.json",), ("adapter/adapter_config.json", "config.toml")])
def test_a_complete_that_names_too_little_proves_nothing(copied, kept):
    sealed = digests(copied)
    write_json(copied / "COMPLETE", {name: sealed[name] for name in kept})
    assert "COMPLETE does not name adapter/adapter_model.safetensors" in failed(copied)["files"]


def test_a_number_that_is_not_finite_is_named(copied):
    def spoil(tensors):
        name = next(name for name in tensors if "lora_B" in name)
        tensors[name][0, 0] = float("nan")

    change(copied, ADAPTER, spoil)
    found = failed(copied)
    assert "lora_B" in found["finite"]
    assert "lora_B" in found["state equals adapter"]
    assert "not finite" in found["adapter changes logits"]


def test_an_untrained_adapter_does_nothing(copied):
    def reset(tensors):
        for name, tensor in tensors.items():
            if "lora_B" in name and "optimizer/" not in name:
                tensor.zero_()

    change(copied, ADAPTER, reset)
    change(copied, STATE, reset)
    found = failed(copied)
    assert set(found) == {"every group acts", "adapter changes logits", "its own vote on labels"}
    assert "it does nothing" in found["adapter changes logits"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"eval/audio_loss": nan}'])
def test_metrics_that_nobody_can_read_are_named(copied, text):
    (copied / "metrics.json").write_text(text)
    write_json(copied / "COMPLETE", digests(copied))
    found = failed(copied)
    assert set(found) == {"metrics"}
    assert "metrics.json is not readable" in found["metrics"]


def test_one_group_that_learned_nothing_is_named(copied):
    def reset(tensors):
        for name, tensor in tensors.items():
            if "audio_mlp.up_proj.lora_B" in name and "optimizer/" not in name:
                tensor.zero_()

    change(copied, ADAPTER, reset)
    change(copied, STATE, reset)
    assert failed(copied) == {"every group acts": "still at its start, as untrained: audio_mlp.up_proj"}


def test_an_adapter_of_another_training_is_found(copied):
    change(copied, ADAPTER, lambda tensors: next(iter(tensors.values())).add_(0.5))
    assert set(failed(copied)) == {"state equals adapter"}


def test_a_lost_moment_cannot_be_resumed(copied):
    change(copied, STATE, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith("exp_avg_sq"))))
    found = failed(copied)
    assert set(found) == {"resumable"}
    assert "lacks exp_avg_sq of" in found["resumable"]


def test_a_missing_tensor_does_not_fit_the_base(copied):
    change(copied, ADAPTER, lambda tensors: tensors.pop(next(iter(tensors))))
    assert "missing base_model" in failed(copied)["adapter fits the base"]


def test_another_base_under_the_same_path_is_found(sound, copied, tmp_path):
    base = sound.parents[2] / "base"
    kept = shutil.copytree(base, tmp_path / "kept")
    try:
        weights = load_file(base / "model.safetensors")
        weights["model.layers.0.mlp.down_proj.weight"] += 0.01
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        found = failed(copied)
        assert set(found) == {"base"}
        assert "trained with" in found["base"]
    finally:
        shutil.rmtree(base)
        shutil.copytree(kept, base)


def test_a_lost_base_leaves_the_other_checks(sound, copied, tmp_path):
    base = sound.parents[2] / "base"
    base.rename(tmp_path / "elsewhere")
    try:
        found = failed(copied)
    finally:
        (tmp_path / "elsewhere").rename(base)
    assert set(found) == {"base", "adapter fits the base", "adapter changes logits", "its own vote on labels"}
    assert all("not checked: " in detail for detail in found.values())


def test_the_command_says_so_by_its_status(sound, copied):
    good = CliRunner().invoke(main, ["validate", str(sound.parents[1]), "--json"])
    assert good.exit_code == 0, good.output
    facts = json.loads(good.stdout)
    assert facts["checkpoint"] == str(sound)
    assert [check["passed"] for check in facts["checks"]] == [True] * len(CHECKS)

    (copied / "config.toml").unlink()
    bad = CliRunner().invoke(main, ["validate", str(copied)])
    assert bad.exit_code == 1
    assert "FAILED  files: config.toml is missing" in bad.stdout
    assert "checks failed" in bad.stderr
    nothing = CliRunner().invoke(main, ["validate", str(copied / "adapter")])
    assert nothing.exit_code == 1
    assert "no complete checkpoint here" in nothing.stderr


# --- the vote --------------------------------------------------------------------------------------------------------


def test_the_trained_model_votes_on_labels(sound, short_data, make_dataset, make_sample, tmp_path, monkeypatch):
    """A random base guesses everywhere, so it has no vote; shards of another codec are no ground for one."""
    vote = {finding.check: finding for finding in validate_checkpoint(sound, short_data)}["its own vote on labels"]
    assert vote.passed
    assert vote.detail.startswith("6 samples: mean loss of labels moved by columns -2: ")
    assert "no vote in 8 codebooks, in which it guesses" in vote.detail
    other = shutil.copytree(short_data, tmp_path / "other")
    facts = json.loads((other / "dataset.json").read_text())
    facts["fingerprints"]["codec"] = "0" * 64
    (other / "dataset.json").write_text(json.dumps(facts))
    failed = {finding.check: finding for finding in validate_checkpoint(sound, other)}["its own vote on labels"]
    assert not failed.passed
    assert "not checked" in failed.detail


def test_labels_that_fit_better_elsewhere_are_reported(sound, short_data, monkeypatch):
    import train.preflight as preflight

    def losses(model, batch, labels):
        return torch.full((8,), 1.0 if labels is wanted[-1] else 3.0)

    wanted: dict[int, torch.Tensor] = {}
    moved = preflight.moved_labels
    monkeypatch.setattr(preflight, "moved_labels", lambda batch: wanted.update(moved(batch)) or wanted)
    monkeypatch.setattr(preflight, "codebook_losses", losses)
    found = {finding.check: finding for finding in validate_checkpoint(sound, short_data)}
    assert "better elsewhere: codebook 0 by -1" in found["its own vote on labels"].detail
    assert not found["its own vote on labels"].passed


# --- a merged folder -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(sound, tmp_path_factory) -> Path:
    from tools.checkpoints.merge import merge_checkpoint

    out = tmp_path_factory.mktemp("merged") / "merged"
    proof = merge_checkpoint(sound, out)
    assert proof.greedy_frames_equal == proof.greedy_frames > 0
    return out


def failed_of_model(folder: Path) -> dict[str, str]:
    from tools.checkpoints.validate_model import validate_model

    return {finding.check: finding.detail for finding in validate_model(folder) if not finding.passed}


def test_a_merged_folder_is_validated_too(merged, sound):
    good = CliRunner().invoke(main, ["validate", str(merged), "--json"])
    assert good.exit_code == 0, good.output
    assert len(json.loads(good.stdout)["checks"]) == 6
    assert failed_of_model(sound.parents[2] / "base") == {}


def test_damage_of_a_merged_folder_is_reported(merged, sound, tmp_path):
    def copy(name: str) -> Path:
        return shutil.copytree(merged, tmp_path / name)

    def edit(folder: Path, change) -> Path:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    name = "model.layers.0.self_attn.q_proj.weight"
    found = failed_of_model(edit(copy("nan"), lambda tensors: tensors[name].fill_(float("nan"))))
    assert name in found["finite"]
    found = failed_of_model(edit(copy("lost"), lambda tensors: tensors.pop(name)))
    assert f"missing {name}" in found["weights fit the settings"]
    torn = copy("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-100])
    assert {"weights fit the settings", "finite"} <= set(failed_of_model(torn))
    untouched = copy("untouched")
    shutil.copy(sound.parents[2] / "base" / "model.safetensors", untouched)
    assert "merging did nothing" in failed_of_model(untouched)["differs from its base"]
    lost = copy("no-tokenizer")
    (lost / "tokenizer.json").unlink()
    assert set(failed_of_model(lost)) == {"tokenizer"}
    other = copy("other-codec")
    voice = json.loads((other / "higgs_voice.json").read_text())
    write_json(other / "higgs_voice.json", {**voice, "codec_fingerprint": "0" * 64})
    assert "trained with 0000000000000000" in failed_of_model(other)["codec"]
    bad = CliRunner().invoke(main, ["validate", str(other)])
    assert bad.exit_code == 1
    assert "1 of 6 checks failed" in bad.stderr


def test_list_says_which_is_complete_and_best(sound, tmp_path):
    run = shutil.copytree(sound.parents[1], tmp_path / "run", symlinks=True)
    good = CliRunner().invoke(main, ["list", str(run)])
    assert good.exit_code == 0, good.output
    assert "checkpoint-2  step 2  " in good.stdout
    assert " MB  complete" in good.stdout
    assert re.search(r"  training: audio \d+\.\d{4}, .*text \d+\.\d{4}", good.stdout)
    assert (
        "held out: audio 2.5000"
        in Listed(
            folder="x", step=1, num_bytes=1, is_best=False, faults=[], evaluations=[], metrics={"eval/audio_loss": 2.5}
        ).in_words()
    )
    (run / "best").symlink_to("checkpoints/checkpoint-2")
    (run / "checkpoints" / "checkpoint-2" / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    bad = CliRunner().invoke(main, ["list", str(run), "--json"])
    assert bad.exit_code == 1
    (row,) = json.loads(bad.stdout).values()
    assert (row["step"], row["is_best"], len(row["faults"])) == (2, True, 1)
    assert row["num_bytes"] > 1000
    assert CliRunner().invoke(main, ["list", str(tmp_path)]).exit_code == 1
