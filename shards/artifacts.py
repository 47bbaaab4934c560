"""Where models come from and how they are named: folders or pinned hub repositories, and their fingerprints.

A fingerprint is the sha256 of what decides a result: tokenizer.json for token ids; config, weights and the resampler for
codec codes. It names files, not mathematics, so the same codec stored in another layout counts as another codec; the price of
a check that never needs to run the model.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from tokenizers import Tokenizer

from shards.errors import CheckpointError, ConfigError
from shards.manifest import BF16_MARK, Precision
from shards.printable import first_line

# Whisper large-v3's features (openai/whisper-large-v3 preprocessor_config.json): 128 mels, 16 kHz, 25 ms windows, 10 ms
# hop, 30 s. The model wants exactly these whatever the checkpoint folder holds, so they are constants, not a download.
WHISPER_FEATURES = {"feature_size": 128, "sampling_rate": 16000, "hop_length": 160, "chunk_length": 30, "n_fft": 400}
# Other formats of the same weights in hub repositories: Whisper large-v3 alone has 20 GB of them.
NOT_NEEDED = ("*.msgpack", "*.h5", "*.onnx*", "*.fp32*", "pytorch_model*")
SAMPLED_BYTES = 4096  # of a tensor
MAX_HEADER_BYTES = 100 << 20  # what the safetensors library reads at most
RESAMPLER = "soxr HQ"  # how stage one brings audio to 24 and 16 kHz
MEL_FORMAT = "float16, ceil(n/160)+2 frames, floor, zstd"


def resolve(name: str, revision: str, key: str) -> Path:
    """A folder for a path or a hub id. `key` is the configuration key named in errors. Raises ConfigError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ConfigError(f"{key} = {name!r}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, ignore_patterns=list(NOT_NEEDED)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key} = {name!r}: no such folder here, and the hub did not give revision {revision or 'main'!r}: "
            f"{first_line}; connect, download it once, or name a local folder"
        ) from None


def load_tokenizer(model_dir: Path) -> Tokenizer:
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; model.base must be a Higgs Audio v2 folder with its tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no other kind for a file that is none
        raise CheckpointError(f"{path}: not a tokenizer: {first_line(error)}; download it again") from None


def tokenizer_fingerprint(model_dir: Path) -> str:
    return _sha256_of_files((model_dir / "tokenizer.json",))


def codec_fingerprint(codec_dir: Path, precision: Precision = "fp32") -> str:
    """What decides codes; without the mark of bfloat16, what decides their sound (`shards.manifest.decoder_of`)."""
    weights = sorted(p for p in codec_dir.iterdir() if p.suffix in (".safetensors", ".pth", ".bin"))
    config = codec_dir / "config.json"
    if not weights or not config.is_file():
        raise ConfigError(f"{codec_dir}: no codec here: expected config.json and model.safetensors or model.pth")
    digest = hashlib.sha256(f"{_sha256_of_files((config, *weights))} {RESAMPLER}".encode()).hexdigest()
    return digest + (BF16_MARK if precision == "bf16" else "")


def whisper_fingerprint(whisper_dir: Path) -> str:
    weights = sorted(whisper_dir.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{whisper_dir}: no Whisper checkpoint here: expected config.json and safetensors")
    return _sha256_of_files((whisper_dir / "config.json", *weights))


def weights_fingerprint(model_dir: Path) -> str:
    """Which weights a model folder holds, by the header of each safetensors file and the first 4 kB of every tensor.

    Reading all of a 3B model would take ten seconds of every start. The price: a tensor that differs further on only
    passes, which no training, merging or conversion leaves behind. Raises CheckpointError for a damaged header.
    """
    digest = hashlib.sha256()
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            try:
                size = int.from_bytes(file.read(8), "little")  # the format's own layout
                header = file.read(min(size, MAX_HEADER_BYTES))
                offsets = [facts["data_offsets"] for name, facts in json.loads(header).items() if name[:2] != "__"]
                digest.update(path.name.encode() + b"\0" + header)
                num_bytes = max((end for _, end in offsets), default=0)
                for begin in sorted(begin for begin, _ in offsets):
                    file.seek(8 + len(header) + begin)
                    digest.update(file.read(SAMPLED_BYTES))
                found = path.stat().st_size - 8 - len(header)
            except (
                ValueError,
                LookupError,
                AttributeError,
                TypeError,
                OverflowError,
                RecursionError,
                OSError,
            ) as error:
                raise CheckpointError(
                    f"{path}: not a safetensors file: {first_line(error)}; download it again"
                ) from None
            if found != num_bytes:
                raise CheckpointError(
                    f"{path}: has {found} bytes of weights, its header says {num_bytes}: cut off; download it again"
                )
    return digest.hexdigest()


def mel_fingerprint() -> str:
    recipe = json.dumps({**WHISPER_FEATURES, "format": MEL_FORMAT, "resampler": RESAMPLER}, sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()


@functools.cache
def _sha256_of_files(paths: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0")
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
