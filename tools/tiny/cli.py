"""`tiny OUT`: a small model and codec of the true architecture, for the demo and the tests, without any download.

Writes OUT/model (native layout: config, safetensors, tokenizer, Whisper feature extractor), OUT/codec, and
OUT/pipeline.toml that points at them. Same seed and clips, same bytes. The special token ids, codebooks and frame rates
are the released ones; only the sizes are small. The model is random: what it says is nonsense until it is trained.

The codec is fitted to the first 41 s of the sample speech, or of --fit: these clips can be heard (below 6 kHz), other
voices are heard only roughly (tools/tiny/fitted_codec.py). Tests that do not listen take the random codec of `write_tiny`,
which is smaller and encodes faster.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shards.terminal import explained, print_line
from shards.writer import write_bytes

if TYPE_CHECKING:
    from tools.tiny.clips import Clips
    from train.model.config import ModelConfig

NUM_TEXT_TOKENS = 128000

# Special tokens of the released tokenizer by offset from 128000; the others are reserved.
NAMED_SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    2: "<|reserved_special_token_0|>",
    3: "<|reserved_special_token_1|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|reserved_special_token_2|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
    11: "<|audio_bos|>",
    12: "<|audio_eos|>",
    13: "<|audio_out_bos|>",
    14: "<|reserved_special_token_6|>",
    15: "<|AUDIO|>",
    16: "<|AUDIO_OUT|>",
    17: "<|recipient|>",
    18: "<|scene_desc_start|>",
    19: "<|scene_desc_end|>",
    20: "<|generation_instruction_start|>",
    21: "<|generation_instruction_end|>",
    22: "<SE>",
    23: "</SE>",
    24: "<SE_s>",
    25: "</SE_s>",
    26: "<SE_e>",
    27: "</SE_e>",
}

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SAMPLE_SPEECH = REPOSITORY / "tests" / "data" / "arabic-mini" / "chatml.json"

PIPELINE_TOML = """\
# Made by `tiny`: the tiny model and codec of this folder, and settings with which it learns eight clips by heart in about
# two minutes on two cores.
# The pipeline.toml at the top of the project is the one to copy for real work; it explains every key.
[model]
base = {model}
revision = ""
codec = {codec}
codec_revision = ""

[preprocess]
samples_per_shard = 32

[lora]
rank = 64
alpha = 64

[train]
batch_tokens = 4096
packs_per_step = 1
max_steps = 130
learning_rate = 3e-3
save_every = 50
log_every = 10
num_workers = 1
"""


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=0, help="Same seed, same bytes.")
@click.option("--hidden-size", default=128, help="Model width; a multiple of 32.")
@click.option("--layers", default=4, help="Decoder layers.")
@click.option(
    "--fit",
    type=click.Path(path_type=Path),
    metavar="FOLDER|LIST",
    help="Clips that the codec shall give back: a folder, or a ChatML list.  [default: the sample speech]",
)
def main(out: Path, seed: int, hidden_size: int, layers: int, fit: Path | None) -> None:
    """Write a tiny random Higgs Audio v2 model into OUT, and a codec that gives back the clips it was fitted to."""
    if hidden_size < 32 or hidden_size % 32 or layers < 1:
        raise click.UsageError("--hidden-size must be a positive multiple of 32 and --layers at least 1")
    with explained():
        clips = clips_to_fit(fit)
        write_tiny(out, seed, hidden_size, layers, clips)
    for skipped in clips.skipped:
        print_line(f"skipped: {skipped}")
    print_line(f"{out}/codec: {fit_in_words(clips)}")
    print_line(f"{out}/model and {out}/pipeline.toml: random weights, for trying the pipeline")


def clips_to_fit(fit: Path | None) -> Clips:
    """The clips of --fit, or the sample speech. Raises DataError."""
    from shards.errors import DataError
    from tools.tiny.clips import read_clips
    from tools.tiny.fitted_codec import NUM_ENTRIES

    if fit:
        return read_clips(fit, NUM_ENTRIES)
    if not SAMPLE_SPEECH.is_file():
        raise DataError(f"{SAMPLE_SPEECH}: the sample speech is not here; name clips with --fit FOLDER or --fit LIST")
    return read_clips(SAMPLE_SPEECH, NUM_ENTRIES, base=REPOSITORY)


def fit_in_words(clips: Clips) -> str:
    """What the codec can and cannot: "gives back 9 clips and the start of spk_01_24.flac; ..."."""
    from shards.encoders.codec import HOP, pad_to_frames
    from tools.tiny.fitted_codec import NUM_ENTRIES

    num_frames = sum(len(pad_to_frames(wave)) // HOP for wave in clips.waves)
    whole = len(clips.paths) - (num_frames > NUM_ENTRIES)
    start = f" and the start of {clips.paths[-1].name}" if num_frames > NUM_ENTRIES else ""
    held = f"gives back {whole} clip{'s' * (whole != 1)}{start}, below 6 kHz"
    return f"{held}; other sounds only roughly ({clips.num_left} more clips not read, {len(clips.skipped)} skipped)"


def write_tiny(
    out: Path, seed: int = 0, hidden_size: int = 128, num_layers: int = 4, clips: Clips | None = None
) -> None:
    """Write the three things into `out`. The codec is fitted to `clips`; without them it is random."""
    from tools.tiny.codec import write_codec
    from tools.tiny.fitted_codec import write_fitted_codec

    config = tiny_config(hidden_size, num_layers)
    model_dir, codec_dir = out / "model", out / "codec"
    model_dir.mkdir(parents=True, exist_ok=True)
    write_model(model_dir, config, seed)
    write_tokenizer(model_dir)
    write_feature_extractor(model_dir)
    if clips:
        write_fitted_codec(codec_dir, seed, clips.waves)
    else:
        write_codec(codec_dir, seed)
    text = PIPELINE_TOML.format(model=json.dumps(str(model_dir)), codec=json.dumps(str(codec_dir)))
    write_bytes(out / "pipeline.toml", text.encode())


def tiny_config(hidden_size: int = 128, num_layers: int = 4) -> ModelConfig:
    """Sizes of the true proportions: grouped-query attention, a feed-forward network for each kind of token."""
    from train.model.config import ModelConfig

    return ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_layers=num_layers,
        num_heads=hidden_size // 16,
        num_key_value_heads=hidden_size // 32,
        head_dim=16,
        is_random=True,
    )


def write_model(folder: Path, config: ModelConfig, seed: int) -> None:
    """config.json and model.safetensors in the native layout, weights fp32.

    Matrices have the standard deviation 1 / sqrt(fan in), embeddings 1 and norms lie around 1, so that activations keep
    their size and every parameter matters.
    """
    import torch

    from shards.encoders.tensor_files import save_tensors
    from train.model.config import native_config
    from train.model.decoder import HiggsAudio

    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in HiggsAudio(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            state[name] = 1 + 0.1 * noise
        elif "embed" in name:
            state[name] = noise
        else:
            scale = 2.0 if name == "text_lm_head.weight" else 1.0  # a frozen head must be able to say one token surely
            state[name] = scale * noise / shape[1] ** 0.5
    save_tensors(state, folder / "model.safetensors")
    write_bytes(
        folder / "config.json", (json.dumps({**native_config(config), "dtype": "float32"}, indent=1) + "\n").encode()
    )


def write_tokenizer(folder: Path) -> None:
    """A stand-in for the licensed Llama 3 tokenizer: one token per UTF-8 byte, the released special ids.

    Entries between the bytes and the special tokens are fillers no text ever reaches.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_letters()
    vocab = {letters[byte]: byte for byte in range(256)}
    vocab |= {f"<filler_{i}>": i for i in range(256, NUM_TEXT_TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens()])
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    write_bytes(folder / "tokenizer_config.json", (json.dumps(config, indent=1) + "\n").encode())


def special_tokens() -> list[str]:
    """The 256 special tokens in id order from 128000."""
    return [NAMED_SPECIAL_TOKENS.get(i, f"<|reserved_special_token_{i - 8}|>") for i in range(256)]


def byte_letters() -> list[str]:
    """GPT-2's byte alphabet: printable bytes stand for themselves, the others take the letters from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_feature_extractor(folder: Path) -> None:
    """preprocessor_config.json of Whisper large-v3's features, as the released folder has it."""
    from shards.artifacts import WHISPER_FEATURES

    config = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        **WHISPER_FEATURES,
        "n_samples": WHISPER_FEATURES["chunk_length"] * WHISPER_FEATURES["sampling_rate"],
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
    write_bytes(folder / "preprocessor_config.json", (json.dumps(config, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
