"""preprocess.codec_precision: float32 is what it always was; bfloat16 gives other codes, under a name that tells them apart."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from preprocess.audio import AudioLimits, decode, read_bytes
from preprocess.config import PreprocessConfig, deciding_keys
from preprocess.join import join_dataset
from preprocess.plan import Request, identify_job, plan_job
from preprocess.report import Progress
from preprocess.shard_task import ShardTask, TaskResult, TaskSetup
from shards.artifacts import RESAMPLER, codec_fingerprint, mel_fingerprint, tokenizer_fingerprint
from shards.config import read_config
from shards.encoders import codec_on_cpu
from shards.encoders.codec import Codec, load_codec
from shards.encoders.codec_precision import full_float32, lacks_bf16
from shards.errors import CheckpointError, DataError
from shards.manifest import Fingerprints, decoder_of, open_dataset, short_name
from shards.reader import SampleReader
from tools.inspect_shards.cli import main as inspect_shards

BF16 = "preprocess.codec_precision=bf16"


@pytest.fixture(scope="module")
def wave() -> np.ndarray:
    from tools.tiny.codec import speech_like

    return speech_like(torch.Generator().manual_seed(3))[0, 0, : 4 * 24000].numpy()


def config_of(tiny_dir: Path, *overrides: str) -> PreprocessConfig:
    return read_config(PreprocessConfig, tiny_dir / "pipeline.toml", ["preprocess.samples_per_shard=2", *overrides])


def fingerprints(tiny_dir: Path, config: PreprocessConfig) -> Fingerprints:
    codec = codec_fingerprint(tiny_dir / "codec", config.preprocess.codec_precision)
    return Fingerprints(codec, tokenizer_fingerprint(tiny_dir / "model"), mel_fingerprint())


def start(tiny_dir: Path, data: Path, out: Path, config: PreprocessConfig) -> tuple[Request, ShardTask]:
    request = Request(data, out, limit=2)
    plan_job(request, config, identify_job(request, config, fingerprints(tiny_dir, config)))
    return request, ShardTask(TaskSetup(config, str(out), str(tiny_dir / "model"), str(tiny_dir / "codec")))


@pytest.fixture(scope="module")
def bf16_job(tiny_dir, arabic_mini, repository, tmp_path_factory) -> tuple[Path, TaskResult]:
    out = tmp_path_factory.mktemp("bf16") / "out"
    os.chdir(repository)  # the list's audio paths are relative to it
    config = config_of(tiny_dir, BF16)
    request, task = start(tiny_dir, arabic_mini, out, config)
    result = task.run(0, {}, lambda _: None)
    job = plan_job(request, config, identify_job(request, config, fingerprints(tiny_dir, config)))
    join_dataset(out, job)
    return out, result


def test_float32_leaves_every_name_as_it_was(tiny_dir):
    """Data sets and jobs made before there was the key are the same as today's."""
    keys = deciding_keys(config_of(tiny_dir))["preprocess"]
    assert set(keys) == {  # pyright: ignore[reportArgumentType]
        *("seed", "samples_per_shard", "max_reject_fraction", "min_duration_s", "max_duration_s", "max_clipped_share")
    }
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        digest.update(name.encode() + b"\0" + (tiny_dir / "codec" / name).read_bytes())
    expected = hashlib.sha256(f"{digest.hexdigest()} {RESAMPLER}".encode()).hexdigest()
    assert codec_fingerprint(tiny_dir / "codec") == expected
    assert codec_fingerprint(tiny_dir / "codec", "bf16") == expected + "-bf16"
    assert deciding_keys(config_of(tiny_dir, BF16))["preprocess"]["codec_precision"] == "bf16"  # pyright: ignore
    assert decoder_of(expected + "-bf16") == decoder_of(expected) == expected
    assert short_name(expected + "-bf16") == expected[:16] + "-bf16"


def test_bf16_moves_a_few_codes_and_no_sound(tiny_dir, wave):
    exact, rounded = load_codec(tiny_dir / "codec"), load_codec(tiny_dir / "codec", precision="bf16")
    codes, other = exact.encode(wave), rounded.encode(wave)
    assert other.dtype == np.uint16
    assert other.shape == codes.shape
    assert 0 < (codes != other).mean() < 0.5, "rounded to 8 bits, but the same sound"
    np.testing.assert_array_equal(rounded.encode(wave), other)
    np.testing.assert_array_equal(rounded.decode(codes), exact.decode(codes))


def test_the_quantizer_reads_float32(tiny_dir, wave):
    codec = load_codec(tiny_dir / "codec", precision="bf16")
    model: Any = codec._model
    kinds: list[torch.dtype] = []
    for name in ("fc", "fc_prior"):
        if hasattr(model, name):
            getattr(model, name).register_forward_hook(lambda _, given, out: kinds.extend([given[0].dtype, out.dtype]))
    codec.encode(wave)
    assert kinds == [torch.float32, torch.float32]


def test_cuda_computes_in_full_float32_while_it_encodes(monkeypatch):
    """The switches are plain values that any machine has; cuDNN's stands on TF32 by default."""
    seen: list[tuple[Any, Any]] = []

    def encode(waves: torch.Tensor, return_dict: bool) -> torch.Tensor:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return torch.zeros(len(waves), 8, waves.shape[2] // 960, dtype=torch.long)

    model: Any = SimpleNamespace(encode=encode)
    model.eval = lambda: SimpleNamespace(to=lambda _: model)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Codec(model, "cpu").encode(np.zeros(960, np.float32))
    assert seen == [(False, False)]
    assert torch.backends.cudnn.allow_tf32
    with pytest.raises(ValueError, match="any"), full_float32():
        raise ValueError("any")
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("cpuinfo", "lacks"),
    [
        ("flags\t\t: fpu sse4_2 avx avx2 fma\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", False),
        ("processor\t: 0\n", False),
    ],
)
def test_a_processor_without_bfloat16_is_told_apart(cpuinfo, lacks, tmp_path):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert lacks_bf16(tmp_path / "cpuinfo") is lacks
    assert not lacks_bf16(tmp_path / "nothing")


def test_a_bf16_job_holds_the_codes_of_bf16(bf16_job, tiny_dir):
    out, _ = bf16_job
    record, index = open_dataset(out)
    assert record.fingerprints.codec == codec_fingerprint(tiny_dir / "codec") + "-bf16"
    assert record.config["preprocess"]["codec_precision"] == "bf16"
    codec = load_codec(tiny_dir / "codec", precision="bf16")
    for sample in SampleReader(out).read_all(index):
        audio = decode(read_bytes(sample.facts.target.path), AudioLimits())
        np.testing.assert_array_equal(sample.target_codes, codec.encode(audio.at(24000)))


def test_another_precision_on_the_same_out_is_refused(bf16_job, tiny_dir, arabic_mini):
    out, _ = bf16_job
    with pytest.raises(DataError, match=r"codec_precision"):
        start(tiny_dir, arabic_mini, out, config_of(tiny_dir))


def test_inspect_decodes_a_bf16_data_set_and_says_what_it_is(bf16_job, tiny_dir, tmp_path):
    out, _ = bf16_job
    options = ["--config", str(tiny_dir / "pipeline.toml")]
    done = CliRunner().invoke(inspect_shards, ["decode", str(out), "000000000000", str(tmp_path / "x.wav"), *options])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x.wav").stat().st_size > 1000
    done = CliRunner().invoke(inspect_shards, ["summary", str(out)])
    assert f"{codec_fingerprint(tiny_dir / 'codec')[:16]}-bf16" in done.output


def test_what_every_worker_says_of_its_codec_is_told_once(tiny_dir, arabic_mini, tmp_path, monkeypatch, capsys):
    def inexact(model, changes=None) -> None:
        setattr(model, "fc" if hasattr(model, "fc") else "fc_prior", torch.nn.Identity())

    monkeypatch.setattr(codec_on_cpu, "quicken", inexact)
    _, task = start(tiny_dir, arabic_mini, tmp_path / "out", config_of(tiny_dir))
    result = task.run(0, {}, lambda _: None)
    assert len(result.notes) == 1
    progress = Progress(2, 0, 2)
    progress.add(result)
    progress.add(result)
    assert capsys.readouterr().err.count("the plain one is used") == 1


def test_a_codec_of_another_sample_rate_is_refused(tiny_dir, tmp_path):
    """Its resampling to HuBERT's rate would build a kernel of gigabytes."""
    text = (tiny_dir / "codec" / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"sample_rate": 24000', '"sample_rate": 44101'))
    (tmp_path / "model.safetensors").symlink_to(tiny_dir / "codec" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: sample_rate is 44101; .* 24000"):
        load_codec(tmp_path)
