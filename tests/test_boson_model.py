"""Our model against boson's HiggsAudioModel on the same tiny random weights, through boson's own collator.

Logits, summed losses and every gradient, for codes and for whisper+codes, one sample and several, one reference and
several; greedy codes; adapters and exports. boson's class gives no loss, so its unshifted labels are shifted here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("boson_multimodal", reason="boson's environment: make test-boson")

from boson_inputs import as_written_row, clone_row, collate, dataset_sample, our_sequence
from boson_multimodal.model.higgs_audio import HiggsAudioModel

from shards.config import RELEASED_SYSTEM_PROMPT, FeaturesSection, SequenceSection
from shards.delay_pattern import undelay
from shards.encoders.whisper_tower import WhisperSizes
from shards.mel import rebuild_mel
from shards.sequence import AUDIO_OUT, Sequence, SequenceBuilder, WhisperClip
from tools.checkpoints.model_folder import (
    convert_adapter,
    convert_model,
    merged_state,
    own_conditioning,
    write_model_folder,
)
from tools.tiny.cli import tiny_config, write_model, write_tokenizer
from train.config import LoraSection
from train.model.batch import pack
from train.model.conditioning import decide_conditioning
from train.model.generate import generate
from train.model.lora import add_lora, lora_parameters, save_adapter
from train.model.weights import boson_name, load_model

ORACLE = Path(__file__).parent.parent / "out" / "boson-oracle"
RELATIVE = 1e-5  # fp32, other order of summation
SIZES = [(7, 9), (1, 1), (23, 4), (5, 30)]  # frames of reference and target


def close(ours: Tensor, theirs: Tensor, relative: float = RELATIVE) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * max(theirs.abs().max().item(), 1e-6))


@pytest.fixture(scope="module", params=["codes", "whisper+codes"])
def conditioning(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(conditioning, tmp_path_factory) -> tuple[Path, Path]:
    """The same random model in the native and in boson's layout, with a Whisper tower or without."""
    out = tmp_path_factory.mktemp("layouts")
    whisper = WhisperSizes(width=32, num_layers=3, num_heads=4, inner=64) if conditioning != "codes" else None
    native, older = out / "native", out / "boson"
    native.mkdir()
    write_model(native, dataclasses.replace(tiny_config(64, 3), whisper=whisper), seed=1)
    write_tokenizer(native)
    convert_model(native, older, "boson")
    return native, older


@pytest.fixture(scope="module")
def ours(folders):
    return load_model(folders[0], torch.float32, conditioning=own_conditioning(folders[0]))


@pytest.fixture(scope="module")
def theirs(folders):
    model, loading = HiggsAudioModel.from_pretrained(folders[1], torch_dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def boson_tokenizer(folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[1])
    return tokenizer


@dataclasses.dataclass
class Pair:
    """One sample, as ours and as boson's."""

    sequence: Sequence
    dataset_sample: object
    mels: list[np.ndarray]  # [128, 3000], one per reference


@pytest.fixture(scope="module")
def pairs(conditioning, boson_tokenizer, make_sample, tokenizer) -> list[Pair]:
    """Four samples as written; the last one has three references."""
    made = []
    for seed, (reference_frames, target_frames) in enumerate(SIZES):
        sample = make_sample(seed, reference_frames, target_frames)
        row = as_written_row(sample)
        codes, waves = [sample.reference_codes, sample.target_codes], [wave_of(reference_frames, seed), wave_of(1, 9)]
        if seed == 3:
            extra = [make_sample(30 + i, 3 + 8 * i, 1).reference_codes for i in range(2)]
            row["messages"][1]["content"] += [{"type": "audio", "audio_url": "more.wav"}] * 2
            codes = [codes[0], *extra, codes[1]]
            waves = [waves[0], wave_of(3, 31), wave_of(11, 32), waves[1]]
        theirs = dataset_sample(row, boson_tokenizer, codes, waves)
        references = waves[:-1] if conditioning != "codes" else []  # the last audio is the target
        mels = [mel_of(wave) for wave in references]
        clips = [WhisperClip(len(wave), mel=mel) for wave, mel in zip(references, mels, strict=True)]
        sequence = our_sequence(theirs, clips)  # pyright: ignore[reportArgumentType]
        if seed != 3 and conditioning == "codes":  # the builder itself says the same
            built = SequenceBuilder(tokenizer, SequenceSection(layout="as_written")).training(sample)
            np.testing.assert_array_equal(built.token_ids, sequence.token_ids)
        made.append(Pair(sequence, theirs, mels))
    return made


def wave_of(num_frames: int, seed: int) -> np.ndarray:
    """[n] at 16 kHz, of about as many codec frames, never a whole number of mel frames."""
    num_samples = max(6400, num_frames * 640 + 37)
    return (np.random.default_rng(seed).standard_normal(num_samples) * 0.1).astype(np.float32)


def mel_of(wave: np.ndarray) -> np.ndarray:
    from preprocess.features import stored_mel

    frames, floor = stored_mel(wave)
    return rebuild_mel(frames, floor, len(wave))[0]


def boson_inputs(pairs: list[Pair], conditioning: str) -> dict[str, Tensor]:
    """The batch of a new collator on copies: it overwrites labels."""
    copies = [
        dataclasses.replace(pair.dataset_sample, label_ids=pair.dataset_sample.label_ids.clone())  # pyright: ignore
        for pair in pairs
    ]
    inputs = dataclasses.asdict(collate(copies, whisper=conditioning != "codes"))
    if conditioning != "codes":
        ours = torch.from_numpy(np.stack([mel for pair in pairs for mel in pair.mels]))
        close(ours, inputs["audio_features"])  # what shards rebuild is what its own extractor gives
        inputs["audio_features"] = ours
    return inputs


def boson_losses(output, label_audio_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Summed text loss, summed audio loss per codebook, each label shifted by one."""
    labels = output.expanded_labels
    text = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    audio = torch.stack(
        [F.cross_entropy(output.audio_logits[:-1, k], label_audio_ids[k, 1:], reduction="sum") for k in range(8)]
    )
    return text, audio


@pytest.mark.parametrize("members", [[0], [1], [3], [0, 1, 2], [3, 2, 1, 0]])
def test_logits_equal(ours, theirs, pairs, conditioning, members):
    chosen = [pairs[i] for i in members]
    sequences = [pair.sequence for pair in chosen]
    batch = pack(sequences, list(range(len(members))), ["k"] * len(members))
    with torch.no_grad():
        output = theirs(**boson_inputs(chosen, conditioning))
        hidden = ours.hidden(batch)
        num_text = len(batch.text_ids)
        is_real = output.attention_mask.bool()
        # Text positions in both: neither reference codes nor target codes. Whisper rows count: they take the text path.
        is_text = is_real & ~output.audio_out_mask & ~output.audio_in_discrete_codes_mask
        close(ours.text_lm_head(hidden[:num_text]), output.logits[is_text])
        spoken = np.concatenate([np.arange(s.codes.shape[1]) >= s.target_columns[0] for s in sequences])
        close(ours.audio_logits(hidden[num_text:])[torch.from_numpy(spoken)], output.audio_logits)
    assert int(is_real.sum()) == sum(len(sequence) for sequence in sequences)


@pytest.mark.parametrize("members", [[2], [0, 1, 2, 3]])
def test_loss_sums_and_all_gradients_equal(ours, theirs, pairs, conditioning, members):
    chosen = [pairs[i] for i in members]
    inputs = boson_inputs(chosen, conditioning)
    tower = {name for name, _ in ours.named_parameters() if name.startswith("audio_tower.")}  # frozen in ours
    ours.requires_grad_(True)
    for model in (ours, theirs):
        model.zero_grad()
    sums = ours(pack([pair.sequence for pair in chosen], list(range(len(chosen))), ["k"] * len(chosen)))
    (sums.text + sums.audio.sum()).backward()
    text, audio = boson_losses(theirs(**inputs), inputs["label_audio_ids"])
    (text + audio.sum()).backward()
    close(sums.text.detach(), text.detach())
    close(sums.audio.detach(), audio.detach())
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if name in tower:
            continue
        gradient = expected[boson_name(name)]
        assert gradient is not None, name
        assert gradient.abs().max() > 0, f"{name}: a zero gradient would prove nothing"
        close(parameter.grad, gradient)


def test_bf16_is_within_rounding(folders, pairs, conditioning):
    """Both in bf16 differ from fp32 by the same rounding: ours may not be further from boson's than that."""
    chosen = pairs[:3]
    wide = load_model(folders[0], torch.float32, conditioning=own_conditioning(folders[0]))
    ours = load_model(folders[0], torch.bfloat16, conditioning=own_conditioning(folders[0]))
    theirs = HiggsAudioModel.from_pretrained(folders[1], torch_dtype=torch.bfloat16).eval()
    batch = pack([pair.sequence for pair in chosen], [0, 1, 2], ["k"] * 3)
    spoken = torch.from_numpy(
        np.concatenate([np.arange(p.sequence.codes.shape[1]) >= p.sequence.target_columns[0] for p in chosen])
    )
    with torch.no_grad():
        logits = [model.audio_logits(model.hidden(batch)[len(batch.text_ids) :])[spoken] for model in (wide, ours)]
        boson = theirs(**boson_inputs(chosen, conditioning)).audio_logits
    rounding = (boson.float() - logits[0]).norm() / logits[0].norm()
    assert 0 < rounding < 0.1
    assert (logits[1].float() - logits[0]).norm() / logits[0].norm() < 1.5 * rounding
    assert (logits[1].float() - boson.float()).norm() / logits[0].norm() < 2 * rounding


def test_greedy_generation_equals_boson_with_cloning_context(
    ours, theirs, conditioning, make_sample, tokenizer, boson_tokenizer
):
    """The reference as an earlier assistant turn, cut before the target; boson uses Whisper only in user turns."""
    sample = make_sample(8, 20, 1)  # one this random model does not end early
    builder = SequenceBuilder(tokenizer, SequenceSection())
    prompt = builder.prompt(sample)
    row = clone_row(sample, RELEASED_SYSTEM_PROMPT)
    check_greedy(ours, theirs, prompt, row, [sample.reference_codes, sample.target_codes], boson_tokenizer, False)


def test_greedy_generation_equals_boson_as_written(ours, theirs, conditioning, make_sample, tokenizer, boson_tokenizer):
    from shards.sample import MelFacts, compress, write_npy

    sample = make_sample(6, 20, 1)
    wave = wave_of(20, 6)
    mel = mel_of(wave)
    frames = mel[:, : len(wave) // 160 + 3].astype(np.float16)
    sample = dataclasses.replace(
        sample,
        facts=msgspec.structs.replace(sample.facts, mel=MelFacts(len(wave), float(mel[0, -1]))),
        reference_mel_zst=compress(write_npy(frames)),
    )
    prompt = SequenceBuilder(tokenizer, SequenceSection(layout="as_written", conditioning=conditioning)).prompt(sample)
    codes = [sample.reference_codes, sample.target_codes]
    waves = [wave, wave_of(1, 9)]
    uses_whisper = conditioning != "codes"
    check_greedy(ours, theirs, prompt, as_written_row(sample), codes, boson_tokenizer, uses_whisper, waves)


def check_greedy(ours, theirs, prompt: Sequence, row, codes, boson_tokenizer, uses_whisper: bool, waves=None) -> None:
    """Both continue the same prompt greedily; the prompt is boson's row cut right behind the last `<|audio_out_bos|>`."""
    max_frames = 25
    whole = dataset_sample(row, boson_tokenizer, codes, waves)
    cut = int((whole.input_ids == AUDIO_OUT).nonzero()[-1])
    before = codes[:-1]
    start = sum(part.shape[1] for part in before)
    sample = dataclasses.replace(
        whole,
        input_ids=whole.input_ids[:cut],
        label_ids=whole.label_ids[:cut],
        audio_ids_concat=whole.audio_ids_concat[:, :start],
        audio_ids_start=whole.audio_ids_start[:-1],
        audio_waveforms_start=whole.audio_waveforms_start[:-1],
        audio_waveforms_concat=whole.audio_waveforms_concat[: len(waves[0])] if waves else torch.zeros(0),
        audio_sample_rate=whole.audio_sample_rate[:-1],
    )
    batch = collate([sample], whisper=uses_whisper)
    num_ids = int(batch.attention_mask.sum())
    inputs = {
        "input_ids": batch.input_ids[:, :num_ids],
        "attention_mask": batch.attention_mask[:, :num_ids],
        "audio_in_ids": batch.audio_in_ids,
        "audio_in_ids_start": batch.audio_in_ids_start,
        "audio_out_ids": batch.audio_out_ids,
        "audio_out_ids_start": batch.audio_out_ids_start,
    }
    if theirs.config.encode_whisper_embed:  # the tower is asked even where no clip has Whisper rows
        features = (
            torch.from_numpy(np.stack([clip.mel for clip in prompt.whisper_clips if clip.mel is not None]))
            if uses_whisper
            else torch.zeros(0, 128, 3000)
        )
        inputs["audio_features"] = features
        inputs["audio_feature_attention_mask"] = (
            batch.audio_feature_attention_mask if uses_whisper else torch.zeros(0, 3000, dtype=torch.long)
        )
    torch.manual_seed(0)
    output = theirs.generate(
        **inputs, max_new_tokens=max_frames + 9, use_cache=True, do_sample=False, tokenizer=boson_tokenizer
    )
    columns = output[1][0].numpy() if isinstance(output, tuple) else output.audio_sequences[0].numpy()
    speech = generate(ours, prompt, max_frames)
    expected = undelay(columns)
    num_frames = min(expected.shape[1], speech.codes.shape[1])
    assert num_frames >= max_frames - 1, "the random model must not stop early, or little is compared"
    np.testing.assert_array_equal(speech.codes[:, :num_frames], expected[:, :num_frames])


# --- adapters and exports -------------------------------------------------------------------------------------------


def adapted(folder: Path, section: LoraSection):
    """Our model with an adapter whose every tensor matters."""
    conditioning = own_conditioning(folder)
    model = load_model(folder, torch.float32, conditioning=conditioning)
    config = add_lora(model, section, str(folder), seed=3, conditioning=conditioning)
    generator = torch.Generator().manual_seed(4)
    for _, parameter in lora_parameters(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, config


@pytest.mark.parametrize(
    "section",
    [LoraSection(rank=4, alpha=8, text_head=True), LoraSection(mode="audio_focused", rank=4, use_rslora=True)],
    ids=["comprehensive", "audio_focused"],
)
def test_adapter_merged_model_and_export_equal_on_boson(folders, pairs, conditioning, tmp_path, section):
    from peft import PeftModel

    chosen = pairs[:2]
    batch = pack([pair.sequence for pair in chosen], [0, 1], ["k"] * 2)
    spoken = torch.from_numpy(
        np.concatenate([np.arange(p.sequence.codes.shape[1]) >= p.sequence.target_columns[0] for p in chosen])
    )
    model, config = adapted(folders[0], section)
    with torch.no_grad():
        expected = model.audio_logits(model.hidden(batch)[len(batch.text_ids) :])[spoken]
        plain = HiggsAudioModel.from_pretrained(folders[1]).eval()
        assert not torch.allclose(plain(**boson_inputs(chosen, conditioning)).audio_logits, expected, atol=1e-2)

    save_adapter(tmp_path / "native", dict(lora_parameters(model)), config)
    convert_adapter(tmp_path / "native", tmp_path / "adapter", "boson")
    with_adapter = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    write_model_folder(tmp_path / "merged", merged_state(model), model.config, "boson", tokenizer_dir=folders[0])
    merged = HiggsAudioModel.from_pretrained(tmp_path / "merged").eval()
    convert_model(tmp_path / "merged", tmp_path / "back", "native")
    back = load_model(tmp_path / "back", torch.float32, conditioning=own_conditioning(tmp_path / "back"))
    with torch.no_grad():
        close(with_adapter(**boson_inputs(chosen, conditioning)).audio_logits, expected)
        # Merging rounds base + delta once per weight: a little more than pure summation order.
        close(merged(**boson_inputs(chosen, conditioning)).audio_logits, expected, 3e-5)
        close(back.audio_logits(back.hidden(batch)[len(batch.text_ids) :])[spoken], expected, 3e-5)


def test_projection_that_starts_at_zero_loads_on_boson(tmp_path, whisper, pairs, conditioning):
    """A base without a tower: Whisper's encoder, and a projection trained whole, saved as peft's modules_to_save."""
    if conditioning == "codes":
        pytest.skip("about Whisper rows only")
    from peft import PeftModel

    base = tmp_path / "base"
    base.mkdir()
    write_model(base, tiny_config(64, 3), seed=1)
    write_tokenizer(base)
    features = FeaturesSection(whisper_model=str(whisper), whisper_revision="")
    decided = decide_conditioning(SequenceSection(conditioning="whisper+codes"), features, base)
    model = load_model(base, torch.float32, conditioning=decided)
    write_model_folder(tmp_path / "whole", dict(model.named_parameters()), model.config, "boson", tokenizer_dir=base)
    config = add_lora(model, LoraSection(rank=4, alpha=8), str(base), seed=3, conditioning=decided)
    assert model.audio_encoder_proj is not None
    assert not model.audio_encoder_proj.linear.weight.any()
    for _, parameter in lora_parameters(model):
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    save_adapter(tmp_path / "native", dict(lora_parameters(model)), config)
    convert_adapter(tmp_path / "native", tmp_path / "adapter", "boson")
    theirs = HiggsAudioModel.from_pretrained(tmp_path / "whole").eval()
    with_adapter = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    batch = pack([pairs[0].sequence], [0], ["k"])
    spoken = torch.from_numpy(np.arange(pairs[0].sequence.codes.shape[1]) >= pairs[0].sequence.target_columns[0])
    with torch.no_grad():
        expected = model.audio_logits(model.hidden(batch)[len(batch.text_ids) :])[spoken]
        close(with_adapter(**boson_inputs(pairs[:1], conditioning)).audio_logits, expected)


# Of boson's own imports and calls, not of ours.
@pytest.mark.filterwarnings("ignore:'(aifc|audioop|sunau)' is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`do_sample` is set to `False`:UserWarning")
def test_bosons_serve_engine_loads_the_export_and_generates(folders, conditioning, monkeypatch):
    """Its own engine, codec included. It builds its collator without reference codes in user turns, so the reference is an
    earlier assistant turn: the layout `clone` trains."""
    if conditioning != "codes":
        pytest.skip("the engine fetches a Whisper processor from the hub")
    if not (ORACLE / "codec" / "model.pth").is_file():
        pytest.skip("no codec of boson's sizes here: make test-boson writes it")
    from boson_multimodal.audio_processing import higgs_audio_tokenizer
    from boson_multimodal.data_types import AudioContent, ChatMLSample, Message
    from boson_multimodal.serve import serve_engine
    from transformers import HubertConfig, HubertModel

    monkeypatch.setattr(
        higgs_audio_tokenizer,
        "AutoModel",
        SimpleNamespace(
            from_pretrained=lambda *_, **__: HubertModel(HubertConfig(mask_time_prob=0.0, num_hidden_layers=2))
        ),
    )
    config = json.loads((ORACLE / "codec" / "config.json").read_text())
    config.pop("semantic_config", None)  # ours, for sizes boson takes from the hub's HuBERT

    def load_codec(*_: object, **__: object):
        codec = higgs_audio_tokenizer.HiggsAudioTokenizer(**config, device="cpu")
        codec.load_state_dict(torch.load(ORACLE / "codec" / "model.pth", weights_only=True))
        return codec.eval()

    monkeypatch.setattr(serve_engine, "load_higgs_audio_tokenizer", load_codec)
    engine = serve_engine.HiggsAudioServeEngine(str(folders[1]), "codec", device="cpu", kv_cache_lengths=[1024])
    reference = Path(__file__).parent / "data" / "arabic-mini" / "spk_03_06.flac"
    messages = [
        Message(role="system", content=RELEASED_SYSTEM_PROMPT),
        Message(role="user", content="صباح الخير"),
        Message(role="assistant", content=AudioContent(audio_url=str(reference))),
        Message(role="user", content="كيف حالك"),
    ]
    response = engine.generate(
        ChatMLSample(messages=messages), max_new_tokens=40, temperature=0.0, force_audio_gen=True, ras_win_len=None
    )
    assert response.generated_audio_tokens.shape[0] == 8
    assert response.generated_audio_tokens.shape[1] > 10
    assert response.audio is not None
    assert len(response.audio) % 960 == 0
