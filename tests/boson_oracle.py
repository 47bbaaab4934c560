"""Writes what the boson environment is held against: codecs, waves, and what the native environment makes of them.

Run in the native environment by `make test-boson`. Written into OUT:
    codec/              boson's layout; the released sizes, because boson's own class fixes them, but two layers of HuBERT
    tiny/               what `tiny` writes
    NAME.wave.npy       waves [S] float32, S a multiple of 960, NAME in WAVES
    codec.NAME.npy, codec.NAME.decoded.npy, tiny.NAME.npy, tiny.NAME.decoded.npy    codes [8, T], decoded waves [S]
    end-to-end/         shards/, run/, merged/ and codes.npy of the real commands with `tiny`'s model
All weights are random and calibrated as `tiny`'s are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from boson_layout import boson_state

from preprocess.audio import AudioLimits, decode
from shards.encoders.codec import load_codec, native_config
from tools.tiny.cli import write_tiny
from tools.tiny.codec import RATIOS, calibrated_codec

DATA = Path(__file__).parent / "data" / "arabic-mini"
SPEECH = DATA / "spk_03_06.flac"
WAVES = ("speech", "short", "long")
BOSON_CONFIG: dict[str, Any] = {
    "n_filters": 32,
    "D": 256,
    "codebook_dim": 64,
    "target_bandwidths": [0.5, 1, 1.5, 2, 4],
    "ratios": RATIOS,
    "sample_rate": 24000,
    "bins": 1024,
    "n_q": 8,
    "semantic_techer": "hubert_base_general",
    "semantic_config": {"num_hidden_layers": 2},
}
END_TO_END = {
    "preprocess": ("preprocess.cli", "{list} {out}/shards --limit 4 --set preprocess.samples_per_shard=3"),
    "train": ("train.cli", "{out}/shards {out}/run --set train.max_steps=4 --set train.log_every=1"),
    "checkpoints": ("tools.checkpoints.cli", "merge {out}/run {out}/merged"),
    "speak": (
        "tools.speak",
        "{out}/merged --reference {speech} --reference-text نص --text نص --greedy --max-seconds 2 "
        "--out {out}/speech.wav --codes {out}/codes.npy",
    ),
}


def run_end_to_end(out: Path, config: Path) -> None:
    """From ChatML to speech by the four commands, in this environment, everything into `out`."""
    repository = Path(__file__).parent.parent
    places = {"out": out, "list": DATA / "chatml.json", "speech": SPEECH}
    for name, (module, arguments) in END_TO_END.items():
        given = [part.format_map(places) for part in arguments.split()]
        given += [] if name == "checkpoints" else ["--config", str(config)]
        code = f"import sys; sys.argv = {[name, *given]!r}; from {module} import main; main()"
        env = {**os.environ, "PYTHONPATH": str(repository)}
        done = subprocess.run([sys.executable, "-c", code], cwd=repository, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{name} {given}: {done.stderr}"


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    write_tiny(out / "tiny")
    run_end_to_end(out / "end-to-end", out / "tiny" / "pipeline.toml")
    (out / "codec").mkdir(parents=True, exist_ok=True)
    (out / "codec" / "config.json").write_text(json.dumps(BOSON_CONFIG))
    torch.save(boson_state(calibrated_codec(native_config(BOSON_CONFIG), seed=0)), out / "codec" / "model.pth")

    speech = decode(SPEECH.read_bytes(), AudioLimits()).wave
    cuts = {"speech": speech[: 960 * 120], "short": speech[24000 : 24000 + 960 * 20], "long": np.tile(speech, 2)}
    waves = {name: cuts[name][: len(cuts[name]) // 960 * 960] for name in WAVES}
    for kind, folder in {"codec": out / "codec", "tiny": out / "tiny" / "codec"}.items():
        codec = load_codec(folder)
        assert type(codec._model).__name__ == "HiggsAudioV2TokenizerModel", "this is for the native environment"
        for name, wave in waves.items():
            codes = codec.encode(wave)
            np.save(out / f"{name}.wave.npy", wave)
            np.save(out / f"{kind}.{name}.npy", codes)
            np.save(out / f"{kind}.{name}.decoded.npy", codec.decode(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
