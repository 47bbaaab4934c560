"""`checkpoints compare` and `average`: by the algebra of the updates, and the winner by the criterion that is stated."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from shards.config import read_config
from shards.errors import CheckpointError
from shards.writer import write_json
from tools.checkpoints.average import average_checkpoints, mean_factors
from tools.checkpoints.cli import main
from tools.checkpoints.compare import choose
from tools.checkpoints.compare import compare as compared
from tools.checkpoints.merge import merge_checkpoint
from tools.checkpoints.updates import Factors, read_update
from tools.checkpoints.validate import validate_checkpoint
from train.config import TrainConfig
from train.loop import RunOptions, train
from train.run_folder.checkpoint_folders import digests

ADAPTER = "adapter/adapter_model.safetensors"
QUICK = ["batch_tokens=700", "packs_per_step=2", "max_steps=4", "save_every=2", "eval_every=2", "log_every=1"]
QUICK += ["num_workers=0", "listening_samples=0", "validation_fraction=0.3", "warmup_steps=0", "learning_rate=1e-2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, short_data, tiny_dir) -> Path:
    """Four steps with held-out speakers: checkpoints of steps 2 and 4."""
    config = read_config(TrainConfig, tiny_dir / "pipeline.toml", [f"train.{word}" for word in QUICK] + ["lora.rank=4"])
    run = tmp_path_factory.mktemp("compared") / "run"
    train(config, short_data, run, RunOptions())
    return run


def steps(run: Path) -> tuple[Path, Path]:
    return run / "checkpoints" / "checkpoint-2", run / "checkpoints" / "checkpoint-4"


def edited(folder: Path, out: Path, edit) -> Path:
    """A copy with other tensors, sealed as if it had been written so."""
    shutil.copytree(folder, out)
    tensors = load_file(out / ADAPTER)
    edit(tensors)
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})
    write_json(out / "COMPLETE", digests(out))
    return out


def dense(folder: Path) -> dict[str, torch.Tensor]:
    return {name: part.scale * part.up @ part.down for name, part in read_update(folder).factors.items()}


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(word) for word in arguments])


# --- compare ---------------------------------------------------------------------------------------------------------


def test_norms_and_distances_are_those_of_the_whole_matrices(finished):
    found = compared([finished])
    two, four = (dense(folder) for folder in steps(finished))
    assert [entry.name for entry in found.entries] == ["checkpoint-2", "checkpoint-4"]
    queries = torch.stack([four[name] for name in four if name.endswith("q_proj")])
    assert found.entries[1].norms["self_attn.q_proj"] == pytest.approx(float(queries.norm()), rel=1e-9)
    apart = torch.cat([(two[name] - four[name]).flatten() for name in two])
    norms = [float(torch.cat([part.flatten() for part in whole.values()]).norm()) for whole in (two, four)]
    (distance,) = found.distances
    assert distance.relative == pytest.approx(float(apart.norm()) / (sum(norms) / 2), rel=1e-6)
    assert 0 < distance.cosine < 1


def test_a_run_is_compared_by_table_page_and_json(finished, tmp_path):
    done = invoke("compare", finished, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert re.search(r"take: checkpoint-[24] \(lowest held-out audio loss; ties to the earlier step\)", done.stdout)
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "codebook_7" in page
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["'(]?\s*(?:https?:)?//""", page), "a request"
    assert "default-src 'none'" in page
    facts = json.loads(invoke("compare", *steps(finished), "--json").stdout)
    assert facts["winner"] in ("checkpoint-2", "checkpoint-4")
    assert {f"eval/codebook_{k}" for k in range(8)} <= set(facts["entries"][0]["held_out"])
    assert facts["curves"]["run"][0][0] == 2.0


def judged(tmp_path: Path, finished: Path, losses: tuple[float | None, float | None]) -> list[Path]:
    folders = []
    for folder, loss in zip(steps(finished), losses, strict=True):
        copied = shutil.copytree(folder, tmp_path / folder.name)
        write_json(copied / "metrics.json", {"eval/audio_loss": loss} if loss is not None else {})
        write_json(copied / "COMPLETE", digests(copied))
        folders.append(copied)
    return folders


def test_a_link_among_checkpoints_is_compared_once(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    (run / "checkpoints" / "mine").symlink_to("checkpoint-2")
    assert [entry.name for entry in compared([run]).entries] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("part", ["base", "codec"])
def test_other_files_are_said_and_bases_have_no_distance(finished, tmp_path, part):
    folders = judged(tmp_path, finished, (4.0, 3.0))
    identity = json.loads((folders[1] / "identity.json").read_text())
    was = identity["model"][part][:16]
    identity["model"][part] = "0" * 64
    write_json(folders[1] / "identity.json", identity)
    write_json(folders[1] / "COMPLETE", digests(folders[1]))
    done = invoke("compare", *folders, "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    note = f"trained on different files as {part}: checkpoint-2 {was}, checkpoint-4 0000000000000000"
    assert note in done.stderr
    assert note in (tmp_path / "page.html").read_text()
    assert ("cosine" in done.stdout) == (part != "base")
    assert ("take: none" in done.stdout) == (part == "codec"), "losses of other codes are not comparable"


@pytest.mark.parametrize(
    ("losses", "winner"),
    [((4.0, 3.0), "checkpoint-4"), ((3.0, 3.0), "checkpoint-2"), ((3.0, None), None), ((3.0, float("nan")), None)],
)
def test_the_lowest_loss_wins_and_ties_go_to_the_earlier(finished, tmp_path, losses, winner):
    folders = judged(tmp_path, finished, losses)
    assert compared(folders).winner == compared(folders[::-1]).winner == winner


def test_an_evaluation_counts_for_more_than_a_loss(finished, tmp_path):
    folders = judged(tmp_path, finished, (4.0, 3.0))

    def evaluation(folder: Path, name: str, cer: float, items: int = 5) -> Path:
        tuned = {"name": "tuned", "kind": "tuned", "weights": "", "adapter": str(folder / "adapter")}
        scores = {"cer": {"strict": {"corpus": cer}}, "failures": {"share": 0.0}, "similarity": {}}
        results = {
            "data": {"kind": "list", "source": "x", "items": items, "speakers": 2},
            "models": {"asr": {"name": "small"}}, "systems": [tuned], "scores": {"tuned": scores}, "comparisons": [],
        }  # fmt: skip
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "results.json", results)
        return tmp_path / name

    both = [evaluation(folders[0], "first", 0.1), evaluation(folders[1], "second", 0.2)]
    found = compared(folders, both)
    assert (found.winner, found.criterion.startswith("lowest cer strict of 5 items by small")) == ("checkpoint-2", True)
    other = evaluation(folders[1], "third", 0.05, items=9)  # of other data: not comparable
    assert compared(folders, [both[0], other]).winner == "checkpoint-4"
    assert choose(found.entries)[0] is not None


def test_other_held_out_data_are_not_compared(finished, tmp_path):
    one, other = judged(tmp_path, finished, (3.0, 2.0))
    identity = json.loads((other / "identity.json").read_text())
    write_json(other / "identity.json", {**identity, "validation_digest": "f" * 64})
    write_json(other / "COMPLETE", digests(other))
    found = compared([one, other])
    assert found.winner is None
    assert "held-out losses are of different data" in found.notes[0]


def test_what_cannot_be_compared_is_one_line(finished, tmp_path):
    two, four = steps(finished)
    copied = shutil.copytree(four, tmp_path / "copied")
    (copied / ADAPTER).write_bytes(b"nothing")
    assert invoke("compare").exit_code == 2
    for paths, text in [
        ((tmp_path,), "no complete checkpoint here"),
        ((two,), "nothing to be compared with"),
        ((two, two), "named twice"),
        ((two, copied), "damaged: adapter/adapter_model.safetensors is not what was written"),
    ]:
        done = invoke("compare", *paths)
        assert (done.exit_code, text in done.stderr) == (1, True), done.output
    write_json(copied / "COMPLETE", digests(copied))
    done = invoke("compare", two, copied)
    assert (done.exit_code, "adapter_model.safetensors: not readable" in done.stderr) == (1, True)


# --- average ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outs", "ins"), [(40, 30), (6, 30), (40, 6), (3, 3)])
def test_the_cut_is_the_nearest_of_its_rank(outs, ins):
    torch.manual_seed(0)
    parts = [Factors(torch.randn(4, ins).double(), torch.randn(outs, 4).double(), scale) for scale in (2.0, 0.5, 1.0)]
    mean = sum(part.scale * part.up @ part.down for part in parts) / 3
    down, up, values = mean_factors(parts, 4)
    assert (down.shape, up.shape) == ((4, ins), (outs, 4))
    u, s, v = torch.linalg.svd(mean, full_matrices=False)
    assert torch.allclose(up @ down, u[:, :4] * s[:4] @ v[:4])
    assert torch.allclose(values[: len(s)], s[: len(values)], atol=1e-9)


def test_the_error_is_what_the_cut_lost(finished, tmp_path):
    two, four = steps(finished)
    report = average_checkpoints([two, four], tmp_path / "mean")
    parts, cut = (dense(two), dense(four)), dense(tmp_path / "mean")
    mean = torch.cat([((parts[0][name] + parts[1][name]) / 2).flatten() for name in cut])
    written = torch.cat([cut[name].flatten() for name in cut])
    assert report.error == pytest.approx(float((written - mean).norm() / mean.norm()), rel=1e-3)
    assert 0 < report.error < 0.5
    assert json.loads((tmp_path / "mean" / "average.json").read_text())["sources"][1]["step"] == 4


def test_the_average_of_copies_is_the_thing_itself(finished, tmp_path):
    """Also where A and B of a copy are other matrices with the same product: the mean of the factors would be wrong."""
    _, four = steps(finished)

    def turned(tensors):
        for name in list(tensors):
            tensors[name] = -tensors[name]

    other = edited(four, tmp_path / "turned", turned)
    report = average_checkpoints([four, other], tmp_path / "mean")
    assert report.error < 1e-6
    assert report.shrinks_to == pytest.approx(1)
    wanted, found = dense(four), dense(tmp_path / "mean")
    assert all(torch.allclose(wanted[name], found[name], atol=1e-6) for name in wanted)


def test_an_average_is_a_checkpoint(finished, tmp_path):
    done = invoke("average", *steps(finished), tmp_path / "mean", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rank"] == 4
    findings = validate_checkpoint(tmp_path / "mean")
    assert [finding for finding in findings if not finding.passed] == []
    assert any("an average has no optimizer's state" in finding.detail for finding in findings)
    proof = merge_checkpoint(tmp_path / "mean", tmp_path / "merged")
    assert proof.adapter_changes_logits > 0


def test_what_has_no_average_is_refused(finished, tmp_path):
    two, four = steps(finished)
    out = tmp_path / "out"
    assert invoke("average", two, out).exit_code == 2
    with pytest.raises(CheckpointError, match="give two or more"):
        average_checkpoints([two], out)

    def spoiled(name: str, edit) -> Path:
        return edited(four, tmp_path / name, edit)

    nan = spoiled("nan", lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    lost = spoiled("lost", lambda tensors: tensors.pop(next(name for name in tensors if "lora_B" in name)))
    orphan = spoiled("orphan", lambda tensors: tensors.pop(next(name for name in tensors if "lora_A" in name)))
    fewer = spoiled("fewer", lambda tensors: [tensors.pop(name) for name in list(tensors) if "q_proj" in name])
    ranked = shutil.copytree(four, tmp_path / "ranked")
    dora = shutil.copytree(four, tmp_path / "dora")
    config = json.loads((dora / "adapter" / "adapter_config.json").read_text())
    write_json(dora / "adapter" / "adapter_config.json", {**config, "use_dora": True})
    write_json(ranked / "adapter" / "adapter_config.json", {**config, "r": 2})
    write_json(ranked / "COMPLETE", digests(ranked))
    write_json(dora / "COMPLETE", digests(dora))
    other = shutil.copytree(four, tmp_path / "other")
    identity = json.loads((other / "identity.json").read_text())
    write_json(other / "identity.json", {**identity, "model": {**identity["model"], "base": "0" * 64}})
    write_json(other / "COMPLETE", digests(other))
    torn = shutil.copytree(four, tmp_path / "torn")
    (torn / ADAPTER).write_bytes((torn / ADAPTER).read_bytes()[:-1])
    for folder, text in [
        (nan, "not finite"),
        (lost, "has no B of its rank"),
        (ranked, "adapter_config.json says 2"),
        (orphan, "has no A; give a sound checkpoint"),
        (fewer, "do not change the same modules"),
        (dora, "trained with DoRA"),
        (other, "were trained on other models: base"),
        (torn, "damaged"),
    ]:
        done = invoke("average", two, folder, out)
        assert (done.exit_code, text in done.stderr) == (1, True), done.output
        assert not out.exists()


def test_an_average_has_a_card_that_may_be_edited(finished, tmp_path):
    """With the data of its sources, without losses of one of them; merged, it still says what it is."""
    assert invoke("average", *steps(finished), tmp_path / "mean").exit_code == 0
    text = (tmp_path / "mean" / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert (metadata["pipeline_tag"], metadata["language"], metadata["license"]) == ("text-to-speech", ["ar"], "other")
    assert "An average: the updates of" in text
    assert "cut back to rank 4" in text
    assert "| digest |" in text
    assert "at this step" not in text
    assert str(tmp_path) not in text
    (tmp_path / "mean" / "README.md").write_text(text + "edited\n")
    assert [finding for finding in validate_checkpoint(tmp_path / "mean") if not finding.passed] == []
    merge_checkpoint(tmp_path / "mean", tmp_path / "merged")
    assert "An average: the updates of" in (tmp_path / "merged" / "README.md").read_text()
    (tmp_path / "mean" / "average.json").write_text('{"sources": [{}]}')
    done = invoke("card", tmp_path / "mean", tmp_path / "card.md")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)


def test_runs_of_one_name_keep_their_curves(finished, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(finished, tmp_path / name / "run", symlinks=True)
    found = compared([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert sorted(found.curves) == ["a/run", "b/run"]
    assert len({entry.name for entry in found.entries}) == 2
