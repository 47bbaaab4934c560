"""`checkpoints card`: complete, without a path of the machine, and with the metadata that the hub reads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner

from shards.config import read_config
from shards.errors import CheckpointError, DataError
from shards.manifest import read_dataset
from shards.writer import write_json
from tools.checkpoints.card import card, gather
from tools.checkpoints.cli import main
from tools.checkpoints.curves import line_chart, read_curves
from tools.checkpoints.evaluations import evaluations_of, rows_of, weights_of
from tools.checkpoints.merge import merge_checkpoint
from train.config import TrainConfig
from train.data.data_sets import joint_digest
from train.loop import RunOptions, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory, short_data, tiny_dir) -> Path:
    """Four steps with held-out speakers, and the command that was typed for it."""
    quick = ["batch_tokens=700", "packs_per_step=2", "max_steps=4", "save_every=2", "eval_every=2", "log_every=1"]
    quick += ["num_workers=0", "listening_samples=0", "validation_fraction=0.3", "warmup_steps=0"]
    config = read_config(TrainConfig, tiny_dir / "pipeline.toml", [f"train.{word}" for word in quick] + ["lora.rank=4"])
    run = tmp_path_factory.mktemp("card") / "run"
    train(config, short_data, run, RunOptions())
    environment = json.loads((run / "environment.json").read_text())
    write_json(run / "environment.json", {**environment, "command": f"train {short_data} {run}"})
    return run


def evaluation(folder: Path, checkpoint: Path, cer: float = 0.125, **system: str) -> Path:
    """results.json as `evaluate` writes it, of the adapter of a checkpoint."""
    tuned = {"name": "tuned", "kind": "tuned", "model": "base", "adapter": "elsewhere/adapter"}
    scores = {"cer": {"strict": {"corpus": cer}}, "wer": {"strict": {"corpus": 0.25}}, "failures": {"share": 0.05}}
    scores["similarity"] = {"ovfl": {"to_reference": 0.75, "to_another_clip": None}}
    difference = {"first": "tuned", "second": "base", "metric": "cer", "difference": -0.02, "low": -0.03, "high": -0.01}
    results = {
        "data": {"kind": "data set", "source": "/home/somebody/secret-place/data", "items": 12, "speakers": 6},
        "models": {"similarity": [], "asr": {"name": "/home/somebody/whisper-small"}},
        "headline": "cer strict",
        "systems": [{**tuned, "weights": weights_of(checkpoint), **system}],
        "scores": {"tuned": scores},
        "comparisons": [{**difference, "words": "better"}],
    }
    folder.mkdir(parents=True)
    write_json(folder / "results.json", results)
    return folder


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_is_complete_and_names_no_path(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    evaluation(run / "evaluations" / "held-out", run / "checkpoints" / "checkpoint-4")
    done = CliRunner().invoke(main, ["card", str(run), str(tmp_path / "card.md"), "--which", "4", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["evaluations"] == 1
    text = (tmp_path / "card.md").read_text()
    for heading in ("Base", "Data", "Configuration", "Training", "Evaluation", "Speak", "Licence", "Consent"):
        assert len(text.split(f"## {heading}\n")[1].split("\n## ")[0].strip()) > 40, heading
    for words in ("6 of 6 rows", "whole speakers, 0.3", "| lora.rank | 4 |", "-0.0200 [-0.0300, -0.0100]: better"):
        assert words in text
    assert "12 items of 6 speakers; protocol cer strict; recognizer whisper-small." in text
    assert not re.search(r"(?<![:/\w])/(?:home|tmp|root|work|mnt|usr)/", text), "a path of the machine"
    assert str(tmp_path) not in text
    assert "[More Information Needed]" not in text
    picture = ElementTree.fromstring((tmp_path / "card.svg").read_text())
    assert picture.tag.endswith("svg")
    assert "](card.svg)" in text


def test_the_metadata_is_what_the_hub_reads(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    checkpoint = run / "checkpoints" / "checkpoint-4"
    evaluation(run / "evaluations" / "held-out", checkpoint)
    from huggingface_hub import ModelCard

    text = card(gather(checkpoint, "adapter"))
    values = front_matter(text)
    assert (values["license"], values["library_name"], values["pipeline_tag"]) == ("other", "peft", "text-to-speech")
    assert values["language"] == ["ar"]
    assert "base_model" not in values, "the base is a folder here"
    result = ModelCard(text).data.eval_results[0]  # pyright: ignore[reportAttributeAccessIssue]
    assert (result.metric_type, result.metric_value) == ("cer", 0.125)
    config = (checkpoint / "config.toml").read_text()
    (checkpoint / "config.toml").write_text(
        re.sub(r'^base = ".*"', 'base = "bosonai/higgs-audio-v2-generation-3B-base"', config, flags=re.M)
    )
    released = front_matter(card(gather(checkpoint, "merged")))
    assert released["base_model"] == "bosonai/higgs-audio-v2-generation-3B-base"
    assert released["license_link"].endswith("/LICENSE")
    assert released["library_name"] == "transformers"
    assert (
        "base_model:adapter:bosonai/higgs-audio-v2-generation-3B-base"
        in front_matter(card(gather(checkpoint, "adapter")))["tags"]
    )


def test_a_merged_folder_has_its_card(finished, tmp_path):
    merge_checkpoint(finished, tmp_path / "merged", which="4")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert front_matter(text)["library_name"] == "transformers"
    assert "speak THIS_FOLDER --reference" in text
    assert (tmp_path / "merged" / "curves.svg").is_file()


def test_data_sets_together_are_added_up_without_their_paths(finished, short_data, make_dataset, make_sample, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    checkpoint = run / "checkpoints" / "checkpoint-2"
    other = make_dataset(tmp_path / "secret-place", [make_sample(seed, 5, 9, "somebody") for seed in (21, 22)])
    config = (checkpoint / "config.toml").read_text()
    sources = f'data = [{{path = "{short_data}", weight = 3.0}}, {{path = "{other}"}}]'
    (checkpoint / "config.toml").write_text(re.sub(r"^data = \[\]$", sources, config, flags=re.M))
    identity = json.loads((checkpoint / "identity.json").read_text())
    digests = [read_dataset((folder / "dataset.json").read_bytes(), "").digest for folder in (short_data, other)]
    write_json(checkpoint / "identity.json", {**identity, "dataset_digest": joint_digest(digests)})
    text = card(gather(checkpoint, "adapter"))
    for row in ("data sets together | 2, weights 3.0, none", "samples | 8 of 8 rows", "speakers | 4"):
        assert f"| {row} |" in text
    assert str(tmp_path) not in text
    assert str(short_data) not in text
    shutil.rmtree(other)
    assert "hours, speakers | not known here" in card(gather(checkpoint, "adapter"))


def test_a_copied_checkpoint_says_what_it_does_not_know(finished, tmp_path):
    copied = shutil.copytree(finished / "checkpoints" / "checkpoint-2", tmp_path / "deep" / "er" / "my-voice")
    text = card(gather(copied, "adapter"))
    assert "not known here: the data set was not beside the run" in text
    assert "Not evaluated." in text
    assert "2 optimizer steps" in text
    assert "![" not in text


def test_damage_is_one_line(finished, tmp_path):
    out = str(tmp_path / "card.md")
    assert CliRunner().invoke(main, ["card", str(finished)]).exit_code == 2
    nothing = CliRunner().invoke(main, ["card", str(tmp_path), out])
    assert (nothing.exit_code, "no complete checkpoint here" in nothing.stderr) == (1, True)
    copied = shutil.copytree(finished / "checkpoints" / "checkpoint-2", tmp_path / "copied")
    (copied / "config.toml").write_text("model = 3")
    broken = CliRunner().invoke(main, ["card", str(copied), out])
    assert (broken.exit_code, "damaged: config.toml" in broken.stderr) == (1, True)
    elsewhere = CliRunner().invoke(main, ["card", str(finished), out, "--evaluation", str(tmp_path)])
    assert (elsewhere.exit_code, "results.json: not readable" in elsewhere.stderr) == (1, True)
    assert not Path(out).exists()
    (copied / "config.toml").unlink()
    with pytest.raises(CheckpointError, match=r"config.toml: not readable"):
        gather(copied, "adapter")


def test_rows_belong_to_what_spoke(finished, tmp_path):
    """By weights, wherever they lie now; by path where the base is not here; never of another checkpoint."""
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    two, four = (run / "checkpoints" / f"checkpoint-{step}" for step in (2, 4))
    named = [
        evaluation(tmp_path / "of-four", four),
        evaluation(tmp_path / "by-path", four, weights="", adapter=str(two / "adapter")),
        evaluation(tmp_path / "of-base", four, kind="base"),
    ]
    found = evaluations_of(run, named)
    assert [row.name for row in rows_of(four, found)] == ["of-four"]
    assert [row.name for row in rows_of(two, found)] == ["by-path"]
    merge_checkpoint(run, tmp_path / "merged", which="2")
    merged = evaluation(tmp_path / "of-merged", two, adapter="", model=str(tmp_path / "merged"))
    assert [row.name for row in rows_of(two, evaluations_of(None, [merged]))] == ["of-merged"]
    assert rows_of(four, evaluations_of(None, [merged])) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"systems": 1, "scores": {}, "data": {}}', "[" * 100000])
def test_results_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "evaluations" / "broken").mkdir(parents=True)
    (tmp_path / "evaluations" / "broken" / "results.json").write_text(text)
    assert evaluations_of(tmp_path, []) == []
    with pytest.raises(DataError, match=r"results\.json"):
        evaluations_of(None, [tmp_path / "evaluations" / "broken"])


def test_a_chart_leaves_out_what_is_not_finite(tmp_path):
    nan, inf = float("nan"), float("inf")
    text = line_chart("<&>", {"a": [(1, 2.0), (2, nan), (3, inf), (4, 3.0)], "none": [(1, nan)], "one": [(2, 2.5)]})
    drawn = ElementTree.fromstring(text)
    assert [len(line.attrib["points"].split()) for line in drawn.iter() if line.tag.endswith("polyline")] == [2, 1]
    assert line_chart("nothing", {"a": [], "b": [(1, nan)]}) == ""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 2.0}\n[1]\n{"step": 2, "x": null}\n{"step": 3, "x"')
    assert read_curves(tmp_path, ["x", "y"]) == {"x": [(1.0, 2.0)], "y": []}
