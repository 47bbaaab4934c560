"""`checkpoints quantize`: smaller by what was said, loaded as what was measured, and refused where it would be a lie."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from shards.errors import CheckpointError, PipelineError
from tools.checkpoints import quantize as module
from tools.checkpoints.cli import main
from tools.checkpoints.model_folder import convert_model
from tools.checkpoints.quantize_effect import Outputs, Samples, compared
from tools.checkpoints.quantized_card import own_card
from tools.inference import HiggsAudioInference
from train.model.probe import probe_logits
from train.model.quantized import QuantizedLinear, packed, unpacked
from train.model.weights import load_model, stored_dtype

pytest.importorskip("torchao", reason="pip install -c constraints.txt -e '.[quantize]'")


def run(*arguments: object):
    return CliRunner().invoke(main, [str(word) for word in ("quantize", *arguments)])


@pytest.fixture(scope="module")
def eight(tmp_path_factory, model_dir, short_data, tiny_dir) -> Path:
    """The tiny model in 8 bits, measured on two samples."""
    out = tmp_path_factory.mktemp("eight") / "q8"
    data = ("--data", short_data, "--samples", 2, "--config", tiny_dir / "pipeline.toml")
    done = run(model_dir, out, "--int8", *data, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((out / "quantize.json").read_text())
    return out


def test_only_the_decoders_linears_are_in_few_bits(eight, model_dir):
    whole, few = load_file(model_dir / "model.safetensors"), load_file(eight / "model.safetensors")
    replaced = {name.removesuffix(".qdata") for name in few if name.endswith(".qdata")}
    assert len(replaced) == 4 * 10
    assert all(name.startswith("model.layers.") and "norm" not in name for name in replaced)
    kept = whole.keys() & few.keys()
    assert {f"{name}.weight" for name in replaced} == whole.keys() - kept
    assert all(torch.equal(whole[name], few[name]) for name in kept)
    assert {"audio_lm_head.weight", "text_lm_head.weight", "model.embed_tokens.weight"} <= kept


def test_it_is_smaller_by_what_the_report_says(eight, model_dir):
    report = json.loads((eight / "quantize.json").read_text())
    assert report["bytes_after"] == sum(t.nbytes for t in load_file(eight / "model.safetensors").values())
    assert report["bytes_before"] == sum(t.nbytes for t in load_file(model_dir / "model.safetensors").values())
    assert report["linears_bytes_before"] / report["linears_bytes_after"] > 3.8
    assert min(report["snr_db"].values()) > 40
    effect = report["effect"]
    assert effect["samples"] == 2
    assert abs(effect["audio_loss_difference"]) < 0.01
    assert 0 < effect["logits_kl"] < 0.01
    assert effect["audio_loss_difference"] == pytest.approx(
        effect["quantized"]["audio_loss"] - effect["whole"]["audio_loss"]
    )
    for model in ("whole", "quantized"):
        ran_on = effect[model]["greedy_not_ended"] + effect[model]["sampled_not_ended"]
        assert effect[model]["not_ended_rate"] == ran_on / 4
    assert 0 <= effect["same_greedy_frames"] <= 1


def test_what_is_published_names_no_path(eight, model_dir, short_data):
    report = json.loads((eight / "quantize.json").read_text())
    assert report["source"] == model_dir.name
    assert report["effect"]["source"].endswith(f" of {short_data.name}")
    assert "/" not in (report["source"] + report["effect"]["source"])


def test_frames_agree_up_to_the_end_and_with_it():
    """Two models that both end at once say the same, and one that goes on where the other ends does not."""
    samples: Any = Samples([], None, "x")  # pyright: ignore[reportArgumentType] - nothing is built
    codes, logits, targets = np.ones((8, 3), np.uint16), torch.zeros(2, 8, 1026), torch.zeros(2, 8, dtype=torch.long)

    def said(num_frames: int, ended: bool) -> Outputs:
        return Outputs(samples, [logits], [targets], [codes[:, :num_frames]], [ended], [ended])

    def agreement(one: Outputs, other: Outputs) -> float:
        return compared(one, other).same_greedy_frames

    assert agreement(said(0, True), said(0, True)) == 1.0
    assert agreement(said(3, True), said(3, True)) == 1.0
    assert agreement(said(3, True), said(3, False)) == 0.75
    assert agreement(said(2, True), said(3, True)) == 0.5


def test_its_logits_are_those_of_its_weights_made_whole(eight):
    few = load_model(eight, torch.float32).eval()
    logits = probe_logits(few)
    for name, layer in list(few.named_modules()):
        if isinstance(layer, QuantizedLinear):
            whole = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            whole.weight = torch.nn.Parameter(layer.dequantized())
            few.set_submodule(name, whole)
    assert torch.allclose(logits, probe_logits(few), atol=1e-3)


def test_4_bits_are_behind_a_warning_with_figures(model_dir, short_data, tiny_dir, tmp_path):
    done = run(model_dir, tmp_path / "bare", "--int4")
    assert "not measured: loss, agreement and ends of speech" in done.stderr
    data = ("--data", short_data, "--samples", 2, "--config", tiny_dir / "pipeline.toml")
    done = run(model_dir, tmp_path / "q4", "--int4", *data)
    assert done.exit_code == 0, done.output
    assert "warning: 4 bits change what is said: SNR down to " in done.stderr
    assert re.search(r"another likeliest code in [\d.]+%, \d+% of speech does not end \(whole: \d+%\)", done.stderr)
    report = json.loads((tmp_path / "q4" / "quantize.json").read_text())
    assert report["linears_bytes_before"] / report["linears_bytes_after"] > 6  # fp32 -> 4 bits and a scale for 32
    assert 15 < min(report["snr_db"].values()) < 30
    assert torch.isfinite(probe_logits(load_model(tmp_path / "q4", torch.bfloat16))).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits_speak_the_same_for_the_same_seed(bits, model_dir, eight, tiny_dir, tmp_path):
    """As `speak` and `serve` load them, whole and by parts, with a sampled and a greedy request."""
    folder = eight
    if bits == 4:
        folder = tmp_path / "q4"
        assert run(model_dir, folder, "--int4").exit_code == 0
    wave = tmp_path / "voice.wav"
    soundfile.write(wave, np.random.default_rng(0).normal(0, 0.1, 24000), 24000)
    voice = HiggsAudioInference(str(folder), codec=str(tiny_dir / "codec"), device="cpu", torch_dtype="float32")
    asked = {
        "reference_audio": str(wave),
        "target_text": "مرحبا بكم",
        "reference_text": "صباح الخير",
        "max_seconds": 1.0,
    }
    first, second = (voice.generate_speech(**asked, seed=3) for _ in range(2))
    assert np.array_equal(first.codes, second.codes)
    assert 0 < len(first.waveform) <= 24000
    assert np.isfinite(first.waveform).all()


def test_a_quantized_folder_has_a_card(model_dir, eight, tmp_path):
    """Of a base: what is known. Of a merged one: its card, without what does not hold any more."""
    metadata = yaml.safe_load((eight / "README.md").read_text().split("---")[1])
    assert metadata["tags"] == ["text-to-speech", "higgs-audio-v2", "8-bit", "torchao"]
    assert "base_model" not in metadata
    merged = shutil.copytree(model_dir, tmp_path / "merged")
    (merged / "higgs_voice.json").write_text("{}")
    (merged / "curves.svg").write_text("<svg/>")
    head = 'license: "other"\nlanguage: ["ar"]\nlibrary_name: "transformers"\npipeline_tag: "text-to-speech"\n'
    head += 'tags: ["lora"]\nbase_model: "a/b"\nbase_model_relation: "finetune"\nmodel-index: [{"name": "x", "results": []}]\n'
    (merged / "README.md").write_text(f"---\n{head}---\n\n# Title\n\n## Data\n\n7 hours ![x](curves.svg)\n")
    assert run(merged, tmp_path / "q8", "--int8").exit_code == 0
    text = (tmp_path / "q8" / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata == {
        "license": "other", "language": ["ar"], "pipeline_tag": "text-to-speech", "tags": ["lora", "8-bit", "torchao"],
        "base_model": "a/b", "base_model_relation": "quantized",
    }  # fmt: skip
    assert "7 hours" in text
    assert "# Title" not in text
    assert "| numbers chosen by | torchao" in text
    assert (tmp_path / "q8" / "curves.svg").is_file()
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    "card", ["", "no front matter", "---\n: : [\n---\n# T\n\nx\n", "---\n- a\n---\n# T\n\nx\n", b"\xff\xfe"]
)
def test_a_card_that_people_broke_is_made_anew(model_dir, tmp_path, card):
    (tmp_path / "higgs_voice.json").write_text("{}")
    (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert own_card(tmp_path) == ({}, "")


def test_the_older_layout_is_quantized_too(model_dir, eight, tmp_path):
    convert_model(model_dir, tmp_path / "boson", "boson")
    assert run(tmp_path / "boson", tmp_path / "q8", "--int8").exit_code == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (eight, tmp_path / "q8"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_packing_is_undone():
    whole = torch.randint(-8, 8, (5, 64), dtype=torch.int8)
    assert packed(whole).shape == (5, 32)
    assert torch.equal(unpacked(packed(whole)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_is_its_weight_times_its_rows(bits, dtype):
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    layer = module.quantized_layer(weight, bits, 32 if bits == 4 else 0)
    linear = QuantizedLinear(64, 48, bits, 32 if bits == 4 else 0)
    linear.qdata, linear.scale = layer.qdata, layer.scale
    for shape in [(3, 64), (2, 3, 64), (0, 64), (64,)]:
        x = torch.randn(shape).to(dtype)
        wanted = x.float() @ linear.dequantized().T
        assert linear(x).dtype == dtype
        assert torch.allclose(linear(x).float(), wanted, atol=1e-5 if dtype == torch.float32 else 0.3)


def test_what_cannot_be_quantized_is_one_line(model_dir, eight, tmp_path):
    out = tmp_path / "out"
    assert run(model_dir, out).exit_code == run(model_dir, out, "--int8", "--int4").exit_code == 2
    for model, text in [
        (eight, "its weights are quantized, so they cannot be quantized again"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "config.json: not readable as a model's config"),
    ]:
        done = run(model, out, "--int8")
        assert (done.exit_code, text in done.stderr) == (1, True), done.output
        assert "Traceback" not in done.stderr
    done = run(model_dir, eight, "--int8")
    assert (done.exit_code, "exists and is not empty" in done.stderr) == (1, True)
    done = run(model_dir, out, "--int8", "--data", model_dir)
    assert (done.exit_code, "neither a data set" in done.stderr) == (1, True)
    assert not out.exists()


def test_nothing_changed_is_refused(model_dir, tmp_path, monkeypatch):
    """As if torchao had left every layer as it is."""
    monkeypatch.setattr(module, "set_layer", lambda *_: None)
    done = run(model_dir, tmp_path / "out", "--int8")
    assert (done.exit_code, "nothing changed" in done.stderr) == (1, True)
    assert not (tmp_path / "out").exists()


def test_without_torchao_it_says_how_to_get_it(model_dir, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchao", None)
    done = run(model_dir, tmp_path / "out", "--int8")
    assert (done.exit_code, "'.[quantize]'" in done.stderr) == (1, True)


def test_few_bits_are_neither_trained_nor_converted(eight, short_config, short_data, tmp_path):
    from train.loop import RunOptions, train

    with pytest.raises(PipelineError, match="quantized, so they cannot be trained"):
        train(short_config(f"model.base={eight}"), short_data, tmp_path / "run", RunOptions())
    with pytest.raises(CheckpointError, match="cannot be written in another layout"):
        convert_model(eight, tmp_path / "boson", "boson")
    assert stored_dtype(eight) == torch.float32


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantized by 'bitsandbytes'"),
        ({"quant_method": "higgs_voice", "bits": 5, "group_size": 0, "modules": []}, "not readable"),
        ({"quant_method": "higgs_voice", "bits": 8, "group_size": 0, "modules": ["model.norm"]}, "names 'model.norm'"),
        ({"quant_method": "higgs_voice", "bits": 8, "group_size": -1, "modules": ["text_lm_head"]}, "group size -1"),
        ({"quant_method": "higgs_voice", "bits": 8, "group_size": 0, "modules": []}, "weights do not fit the model"),
        ("text", "not readable"),
        (None, "weights do not fit the model"),
    ],
)
def test_a_damaged_quantization_is_refused(eight, tmp_path, change, text):
    folder = shutil.copytree(eight, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": change}))
    with pytest.raises(CheckpointError, match=text):
        load_model(folder, torch.float32)


def test_a_tensor_of_other_bits_is_refused(eight, tmp_path):
    folder = shutil.copytree(eight, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".qdata"))
    tensors[name] = packed(tensors[name] >> 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"qdata has shape"):
        load_model(folder, torch.float32)
