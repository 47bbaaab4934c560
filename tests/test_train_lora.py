"""LoRA modes: which modules, how many weights, and every kind loads with plain peft on the transformers class."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft.tuners.lora import Linear
from safetensors.torch import load_file

from shards.config import SequenceSection
from shards.errors import ConfigError
from shards.sequence import SequenceBuilder
from tools.checkpoints.model_folder import merged_state
from train.config import LoraSection
from train.model.batch import pack
from train.model.lora import MODES, AddingLinear, add_lora, load_adapter, lora_parameters, save_adapter, trainable_table
from train.model.weights import load_model

LAYERS, HIDDEN, INNER, HEAD = 4, 128, 256, 8 * 1026
OUT = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 128, "gate_proj": 256, "up_proj": 256, "down_proj": 128}
IN = {"down_proj": INNER}


def with_lora(model_dir, section: LoraSection, scale: float = 0.0):
    model = load_model(model_dir, torch.float32)
    config = add_lora(model, section, str(model_dir), seed=3)
    generator = torch.Generator().manual_seed(4)
    for _, parameter in lora_parameters(model):
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model, config


@pytest.mark.parametrize("text_head", [False, True])
@pytest.mark.parametrize("mode", sorted(MODES))
def test_modes_adapt_what_they_say(model_dir, mode, text_head):
    rank = 8
    model, _ = with_lora(model_dir, LoraSection(mode=mode, rank=rank, alpha=8, text_head=text_head))
    expected = {}
    for target in MODES[mode]:
        leaf = target.split(".")[-1]
        if target == "audio_lm_head":
            expected[target] = (1, rank * (HIDDEN + HEAD))
        else:
            expected[target] = (LAYERS, LAYERS * rank * (IN.get(leaf, HIDDEN) + OUT[leaf]))
    if text_head:
        expected["text_lm_head"] = (1, rank * (HIDDEN + 128256))
    assert trainable_table(model) == expected
    assert all(parameter.dtype == torch.float32 for _, parameter in lora_parameters(model))


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"use_rslora": True}, {"use_dora": True}])
def test_the_update_is_added_as_peft_adds_it(model_dir, options):
    """Values and gradients of every adapted layer, by our way of adding and by peft's; and without the adapter."""
    model, _ = with_lora(model_dir, LoraSection(rank=4, alpha=12, **options), scale=0.05)
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(layers) == 4 * 10 + 1
    assert {type(layer) for layer in layers} == {AddingLinear}

    def results(layer: Linear, x: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(1)  # of dropout
        x = x.clone().requires_grad_()
        out = layer(x)
        wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        return [out, *torch.autograd.grad(out, wanted, torch.linspace(-1, 1, out.numel()).view_as(out))]

    for layer in layers:
        base = layer.get_base_layer()
        assert isinstance(base, torch.nn.Linear)
        x = torch.randn(7, base.in_features, generator=torch.Generator().manual_seed(base.in_features))
        ours = results(layer, x)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), base(x))
        layer.enable_adapters(True)
        layer.requires_grad_(True).base_layer.requires_grad_(False)
        layer.__class__ = Linear  # pyright: ignore
        for found, expected in zip(ours, results(layer, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        assert (ours[0] - base(x)).abs().max() > 1e-2, "an adapter without effect would prove nothing"


def test_fp32_lora_on_a_bf16_base_is_added_in_fp32_by_peft(model_dir):
    model = load_model(model_dir, torch.bfloat16)
    add_lora(model, LoraSection(rank=4), "base", seed=0)
    layer = model.audio_lm_head
    assert isinstance(layer, AddingLinear)
    layer.get_parameter("lora_B.default.weight").data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = layer(x)
    layer.__class__ = Linear  # pyright: ignore
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, layer(x))


def test_modes_are_the_agreed_ones():
    attention = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    audio = {f"audio_mlp.{part}_proj" for part in ("gate", "up", "down")}
    text = {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert set(MODES["comprehensive"]) == attention | audio | text | {"audio_lm_head"}
    assert set(MODES["audio_focused"]) == audio | {"self_attn.q_proj", "self_attn.v_proj", "audio_lm_head"}
    assert set(MODES["attention_only"]) == attention


def test_a_target_that_matches_nothing_names_the_near_ones(model_dir):
    model = load_model(model_dir, torch.float32)
    with pytest.raises(ConfigError) as caught:
        add_lora(model, LoraSection(mode="custom", targets=["k_pro", "audio_head.projector.linear"]), "b", 0)
    first, second = str(caught.value).splitlines()
    assert "'k_pro' matches no linear layer; near: self_attn.k_proj" in first
    assert "'audio_head.projector.linear' matches no linear layer" in second
    with pytest.raises(ConfigError, match=r"needs lora\.targets"):
        add_lora(model, LoraSection(mode="custom"), "b", 0)


@pytest.mark.parametrize(
    "section",
    [
        LoraSection(rank=4, alpha=8),
        LoraSection(mode="audio_focused", rank=4, alpha=8, use_rslora=True),
        LoraSection(mode="attention_only", rank=4, alpha=8, use_dora=True),
        LoraSection(mode="custom", targets=["audio_mlp.down_proj", "audio_lm_head"], rank=2, alpha=3, text_head=True),
    ],
    ids=["lora", "rslora", "dora", "custom"],
)
def test_every_kind_loads_in_peft_merges_and_converts(
    model_dir, tokenizer, make_sample, tmp_path, section, run_command
):
    """Equal logits: ours with the adapter, plain peft on the transformers class, merged, and merged there and back."""
    transformers = pytest.importorskip("transformers", minversion="5.3", reason="the native class came with 5.3")
    from peft import PeftModel

    model, config = with_lora(model_dir, section, scale=0.05)
    save_adapter(tmp_path / "adapter", dict(lora_parameters(model)), config)
    sequence = SequenceBuilder(tokenizer, SequenceSection()).training(make_sample(9, 6, 10))
    batch = pack([sequence], [0], ["k"])
    inputs = {
        "input_ids": torch.from_numpy(sequence.token_ids.astype(np.int64))[None],
        "audio_input_ids": torch.from_numpy(sequence.codes.T.astype(np.int64))[None],
        "audio_input_ids_mask": torch.ones((1, sequence.codes.shape[1]), dtype=torch.bool),
    }
    is_audio = torch.from_numpy(sequence.token_ids == 128016)
    native = transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(
        model_dir, use_text_head=True, dtype=torch.float32
    )
    again = load_model(model_dir, torch.float32)
    load_adapter(again, tmp_path / "adapter")
    model.fuse_lora(True)  # and neither plain peft nor our own layers one by one see it
    merged = load_model(model_dir, torch.float32)
    with torch.no_grad():
        without = native(**inputs).logits[0, is_audio]
        expected = model.audio_lm_head(model.hidden(batch)[len(batch.text_ids) :])
        assert (expected - without).abs().max() > 1e-2, "an adapter without effect would prove nothing"
        scale = expected.abs().max().item()

        def equal(logits, relative=1e-5):
            torch.testing.assert_close(logits, expected, rtol=0, atol=relative * scale)

        equal(again.audio_lm_head(again.hidden(batch)[len(batch.text_ids) :]))
        equal(PeftModel.from_pretrained(native, str(tmp_path / "adapter"))(**inputs).logits[0, is_audio])
        merged.load_state_dict(merged_state(again))
        # Merging rounds base + delta once per weight: a little more than pure summation order.
        equal(merged.audio_lm_head(merged.hidden(batch)[len(batch.text_ids) :]), 3e-5)


def test_convert_there_and_back_keeps_every_byte(model_dir, run_command, tmp_path):
    def convert(source, out, layout):
        result = run_command("checkpoints", "convert", source, out, "--layout", layout)
        assert result.returncode == 0, result.stderr
        assert f"61 tensors in the {layout} layout" in result.stderr

    convert(model_dir, tmp_path / "boson", "boson")
    convert(tmp_path / "boson", tmp_path / "native", "native")
    before, after = (load_file(folder / "model.safetensors") for folder in (model_dir, tmp_path / "native"))
    older = load_file(tmp_path / "boson" / "model.safetensors")
    assert before.keys() == after.keys()
    assert "audio_decoder_proj.text_lm_head.weight" in older
    assert not before.keys() & older.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    settings = [json.loads((folder / "config.json").read_text()) for folder in (model_dir, tmp_path / "native")]
    assert settings[0] == settings[1]
    assert (tmp_path / "boson" / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()

    for source, out, message in [
        (model_dir, tmp_path / "native", "exists and is not empty"),
        (tmp_path / "absent", tmp_path / "new", "neither config.json nor adapter_config.json"),
    ]:
        result = run_command("checkpoints", "convert", source, out)
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr
