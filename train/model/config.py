"""The model's sizes: config.json of either layout in, and out again.

The native layout has no Whisper tower; where a model has one, `audio_encoder_config` is added under boson's name. The
transformers class ignores it, and says so about the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.encoders.whisper_tower import NUM_MELS, WhisperSizes, read_whisper_sizes
from shards.errors import CheckpointError
from shards.json_file import count_of, number_of, part_of, read_json_object

ROPE_TYPES = ("llama3", "linear", "default")
MAX_LAYERS = 1000
MAX_HEADS = 1 << 12


@dataclass(frozen=True)
class ModelConfig:
    """The sizes that matter, from the config.json of either layout. Defaults are the released model's."""

    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_layers: int = 28
    num_heads: int = 24
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 128256
    num_codebooks: int = 8
    codebook_vocab: int = 1026  # 1024 codes, BOS, EOS
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_factor: float = 32.0
    rope_low_freq_factor: float = 0.125
    rope_high_freq_factor: float = 0.5
    rope_original_length: int = 1024
    rope_type: str = "llama3"
    whisper: WhisperSizes | None = None  # of the Whisper tower, where the checkpoint has one
    is_random: bool = False  # written by `tiny`: weights were never trained


def read_model_config(folder: Path) -> ModelConfig:
    """Sizes from config.json. Raises CheckpointError when it is not a Higgs Audio v2 model."""
    path = folder / "config.json"
    config = read_json_object(path, "a model's config")
    kind = config.get("model_type")
    if kind == "higgs_audio_v2":
        return _from_native(config, path, read_whisper_sizes(folder))
    if kind == "higgs_audio":
        return _from_boson(config, path, read_whisper_sizes(folder))
    raise CheckpointError(
        f"{path}: model_type is {kind!r}; expected higgs_audio_v2 or, in the older layout, higgs_audio"
    )


def native_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of the native layout. `random_weights` is ours: it marks a model that was never trained."""
    return {
        "architectures": ["HiggsAudioV2ForConditionalGeneration"],
        "model_type": "higgs_audio_v2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": config.rope_theta, **_rope_scaling(config)},
        "num_codebooks": config.num_codebooks,
        "codebook_size": config.codebook_vocab,
        "audio_token_id": 128016,
        "audio_bos_token_id": 128013,
        "audio_delay_token_id": 128014,
        "audio_stream_bos_id": 1024,
        "audio_stream_eos_id": 1025,
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "pad_token_id": 128001,
        "random_weights": config.is_random,
        **({"audio_encoder_config": _encoder_config(config.whisper)} if config.whisper else {}),
    }


def boson_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of the older layout, which boson's `HiggsAudioModel` reads; fixed values as in the released one."""
    has_tower = config.whisper is not None
    return {
        "architectures": ["HiggsAudioModel"],
        "model_type": "higgs_audio",
        "text_config": {
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.rms_norm_eps,
            "max_position_embeddings": 131072,
            "rope_theta": config.rope_theta,
            # Frequencies equal the released ones, whose low and high factor and length are all eight times as large.
            "rope_scaling": None if config.rope_type == "default" else _rope_scaling(config),
        },
        "audio_adapter_type": "dual_ffn_fast_forward",
        "audio_dual_ffn_layers": list(range(config.num_layers)),
        "audio_num_codebooks": config.num_codebooks,
        "audio_codebook_size": config.codebook_vocab - 2,  # without the markers
        "audio_stream_bos_id": 1024,
        "audio_stream_eos_id": 1025,
        "audio_in_token_idx": 128015,
        "audio_out_token_idx": 128016,
        "audio_out_bos_token_id": 128013,
        "audio_eos_token_id": 128012,
        "encode_audio_in_tokens": True,
        "use_delay_pattern": True,
        "encode_whisper_embed": has_tower,
        "skip_audio_tower": not has_tower,
        **({"audio_encoder_config": _encoder_config(config.whisper)} if config.whisper else {}),
        "pad_token_id": 128001,
        "random_weights": config.is_random,
    }


def _rope_scaling(config: ModelConfig) -> dict[str, Any]:
    if config.rope_type == "default":
        return {"rope_type": "default"}
    if config.rope_type == "linear":
        return {"rope_type": "linear", "factor": config.rope_factor}
    return {
        "rope_type": config.rope_type,
        "factor": config.rope_factor,
        "low_freq_factor": config.rope_low_freq_factor,
        "high_freq_factor": config.rope_high_freq_factor,
        "original_max_position_embeddings": config.rope_original_length,
    }


def _encoder_config(sizes: WhisperSizes) -> dict[str, Any]:
    return {
        "model_type": "higgs_audio_encoder",
        "num_mel_bins": NUM_MELS,
        "d_model": sizes.width,
        "encoder_layers": sizes.num_layers,
        "encoder_attention_heads": sizes.num_heads,
        "encoder_ffn_dim": sizes.inner,
    }


def _from_native(config: dict[str, Any], path: Path, whisper: WhisperSizes | None) -> ModelConfig:
    rope = _rope_of(config, "llama3", path)
    return ModelConfig(
        num_codebooks=count_of(config, "num_codebooks", path, 8),
        codebook_vocab=count_of(config, "codebook_size", path),
        whisper=whisper,
        is_random=config.get("random_weights") is True,
        **_llama_sizes(config, rope, path),
    )


def _from_boson(config: dict[str, Any], path: Path, whisper: WhisperSizes | None) -> ModelConfig:
    text = part_of(config, "text_config", path, is_needed=True)
    layers = list(range(count_of(text, "num_hidden_layers", path, most=MAX_LAYERS)))
    if config.get("audio_dual_ffn_layers", layers) != layers:
        raise CheckpointError(f"{path}: audio_dual_ffn_layers must name every layer, as in the released model")
    rope = _rope_of(text, "default", path)
    return ModelConfig(
        num_codebooks=count_of(config, "audio_num_codebooks", path),
        codebook_vocab=count_of(config, "audio_codebook_size", path) + 2,
        whisper=whisper,
        is_random=config.get("random_weights") is True,
        **_llama_sizes(text, rope, path),
    )


def _rope_of(config: dict[str, Any], unnamed: str, path: Path) -> dict[str, Any]:
    """Rotary settings under one name each, from where either version of transformers writes them.

    `unnamed`: the kind of a configuration without any. Raises CheckpointError for two that differ, and for numbers of no kind.
    """
    scaling, parameters = part_of(config, "rope_scaling", path), part_of(config, "rope_parameters", path)
    differing = [key for key in scaling.keys() & parameters.keys() if scaling[key] != parameters[key]]
    if differing:
        raise CheckpointError(f"{path}: rope_scaling and rope_parameters differ in {min(differing)}; leave one of them")
    rope = {"rope_theta": config.get("rope_theta"), **scaling, **parameters}
    kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]  # "type": an older spelling
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise CheckpointError(f"{path}: rope_type {kinds[0]!r} and type {kinds[1]!r} differ; leave one of them")
    if not kinds and "factor" in rope:
        raise CheckpointError(f"{path}: a rope factor without a rope_type; expected one of {', '.join(ROPE_TYPES)}")
    if kinds == ["linear"] and rope.get("factor") is None:
        raise CheckpointError(f"{path}: rope_type 'linear' without a factor; expected a number above 0")
    known = {key: value for key, value in rope.items() if value is not None and key != "type"}
    return {**known, "rope_type": kinds[0] if kinds else unnamed}


def _llama_sizes(config: dict[str, Any], rope: dict[str, Any], path: Path) -> dict[str, Any]:
    """Raises CheckpointError for sizes that no model has, or that do not fit each other."""
    rope_type = rope["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(f"{path}: rope_type {rope_type!r} is not known; expected one of {', '.join(ROPE_TYPES)}")
    heads = count_of(config, "num_attention_heads", path, most=MAX_HEADS)
    shared = count_of(config, "num_key_value_heads", path, heads, most=MAX_HEADS)
    hidden = count_of(config, "hidden_size", path)
    head_dim = count_of(config, "head_dim", path, max(1, hidden // heads))
    if heads % shared or head_dim % 2:
        raise CheckpointError(
            f"{path}: {heads} heads of {head_dim}, {shared} for keys; expected an even width, and a multiple of the keys'"
        )
    slow, fast = (number_of(rope, f"{end}_freq_factor", path, at) for end, at in (("low", 0.125), ("high", 0.5)))
    if rope_type == "llama3" and slow >= fast:
        raise CheckpointError(f"{path}: low_freq_factor {slow} must be below high_freq_factor {fast}")
    return {
        "hidden_size": hidden,
        "intermediate_size": count_of(config, "intermediate_size", path),
        "num_layers": count_of(config, "num_hidden_layers", path, most=MAX_LAYERS),
        "num_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": head_dim,
        "vocab_size": count_of(config, "vocab_size", path),
        "rms_norm_eps": number_of(config, "rms_norm_eps", path, 1e-5),
        "rope_theta": number_of(rope, "rope_theta", path, 500000.0),
        "rope_factor": number_of(rope, "factor", path, 32.0),
        "rope_low_freq_factor": slow,
        "rope_high_freq_factor": fast,
        "rope_original_length": number_of(rope, "original_max_position_embeddings", path, 1024),
        "rope_type": rope_type,
    }
