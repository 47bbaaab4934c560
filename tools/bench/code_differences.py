"""What `bench codec` measures: how many codes of a codec change with precision, batching and device, on one's own clips.

In: a codec folder, and a folder of clips or a ChatML list. Out: by codebook the share of codes that differ from those of
float32 on one CPU core, clip by clip, which are stage one's own; and speeds. Every way encodes the same waves: clips are sorted
by length and each eight are cut to their shortest, which gives batches of equal length; the price is a little of the longer
ones. Each way runs in a process of its own. A CPU is timed in processor seconds, a GPU in seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.npy_file import parsing
from shards.sequence import SAMPLE_RATE
from shards.terminal import print_json, print_line, print_table
from tools.bench.sides import run_side

BATCH = 8  # clips of one length
REFERENCE = "float32 on the CPU, clip by clip"


@dataclass(frozen=True)
class Way:
    """One way to encode; `name` is what a person reads."""

    name: str
    device: str
    precision: str
    batched: bool


CPU_WAYS = (
    Way(REFERENCE, "cpu", "fp32", False),
    Way("float32 on the CPU, in batches", "cpu", "fp32", True),
    Way("bfloat16 on the CPU, clip by clip", "cpu", "bf16", False),
)
CUDA_WAYS = (
    Way("float32 on the GPU, clip by clip", "cuda", "fp32", False),
    Way("float32 on the GPU, in batches", "cuda", "fp32", True),
    Way("bfloat16 on the GPU, in batches", "cuda", "bf16", True),
)


@dataclass(frozen=True)
class Settings:
    codec: str  # a folder, or "full" or "tiny": random weights of this size
    clips: Path
    num_clips: int
    device: str
    threads: int


def bench(settings: Settings, out: Path) -> dict[str, Any]:
    """Encode in every way, print the table, write the JSON file. Raises PipelineError."""
    from preprocess.codec_server import cuda_devices
    from preprocess.workers import MALLOC_VARIABLES
    from shards.writer import write_json

    ways = CPU_WAYS
    if settings.device == "cuda":
        cuda_devices()
        ways += CUDA_WAYS
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        codec = codec_folder(settings.codec, work)
        batches = read_batches(settings.clips, settings.num_clips)
        np.savez(work / "waves.npz", *batches)
        told: dict[str, dict[str, Any]] = {}
        for number, way in enumerate(ways):
            sent = {
                "way": way.__dict__,
                "codec": str(codec),
                "waves": name,
                "place": number,
                "threads": settings.threads,
            }
            told[way.name] = run_side(
                "tools.bench.code_differences", way.name, sent, settings.threads, MALLOC_VARIABLES
            )
        codes = [read_codes(work / f"codes-{number}.npz") for number in range(len(ways))]
    figures: dict[str, Any] = {
        "settings": {**settings.__dict__, "clips": str(settings.clips)},
        "audio_s": sum(batch.size for batch in batches) / SAMPLE_RATE,
        "num_codes": codes[0].size,
        "num_distinct_codes": len(np.unique(codes[0])),
        "ways": {
            way.name: {**told[way.name], **differences(found, codes[0])} for way, found in zip(ways, codes, strict=True)
        },
    }
    write_json(out, figures)
    print_figures(figures, out)
    return figures


def codec_folder(codec: str, work: Path) -> Path:
    """Raises PipelineError where `codec` is neither a size nor a codec's folder."""
    from shards.artifacts import resolve
    from shards.encoders.codec import codec_layout
    from tools.bench.preprocess import write_full_codec
    from tools.tiny.codec import write_codec

    if codec == "full":
        write_full_codec(work / "codec")
    elif codec == "tiny":
        write_codec(work / "codec", seed=0)
    else:
        folder = resolve(codec, "", "--codec").resolve()
        codec_layout(folder)
        return folder
    return work / "codec"


def read_batches(source: Path, num_clips: int) -> list[np.ndarray]:
    """Waves of equal length [n, S] float32, S a multiple of 960, n at most BATCH. Raises DataError without a usable clip."""
    from shards.encoders.codec import HOP
    from shards.errors import DataError
    from tools.tiny.clips import read_clips

    clips = read_clips(source, num_frames=1 << 40, most=num_clips)
    if clips.skipped:
        print_line(f"skipped: {len(clips.skipped)} clips, the first: {clips.skipped[0]}")
    waves = sorted((wave for wave in clips.waves if len(wave) >= HOP), key=len)
    if not waves:
        raise DataError(f"{source}: no clip of a frame (40 ms) or more")
    groups = [waves[start : start + BATCH] for start in range(0, len(waves), BATCH)]
    return [np.stack([wave[: len(group[0]) // HOP * HOP] for wave in group]) for group in groups]


def differences(found: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """Both [8, T] over all clips: the share of codes that differ, in all and by codebook."""
    differs = found != expected
    return {"share": float(differs.mean()), "share_by_codebook": [float(book.mean()) for book in differs]}


def read_codes(path: Path) -> np.ndarray:
    """[8, T] uint16 of all clips in order."""
    return np.concatenate([clip for clips in read_arrays(path) for clip in clips], axis=1)


def read_arrays(path: Path) -> list[np.ndarray]:
    """The arrays of an .npz file, in the order in which they were written."""
    with parsing, np.load(path, allow_pickle=False) as file:
        return [file[name] for name in file.files]


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """One way in this process; its codes go to a file."""
    import torch

    from shards.encoders.codec import load_codec

    torch.set_num_threads(settings["threads"])
    way, work = Way(**settings["way"]), Path(settings["waves"])
    codec = load_codec(Path(settings["codec"]), way.device, way.precision)  # pyright: ignore[reportArgumentType]
    clock = time.process_time if way.device == "cpu" else time.monotonic
    batches = read_arrays(work / "waves.npz")
    codec.encode(batches[0][0])
    codes: list[np.ndarray] = []
    started = clock()
    for batch in batches:
        parts = [batch] if way.batched else [wave[None] for wave in batch]
        codes.append(np.concatenate([codec.encode_batch(part) for part in parts]))
    elapsed_s = clock() - started
    np.savez(work / f"codes-{settings['place']}.npz", *codes)
    return {"audio_s_per_s": sum(batch.size for batch in batches) / SAMPLE_RATE / elapsed_s}


def print_figures(figures: dict[str, Any], out: Path) -> None:
    rows = []
    for name, found in figures["ways"].items():
        books = " ".join(f"{share:.1%}" for share in found["share_by_codebook"])
        shares = ("compared with", "") if name == REFERENCE else (f"{found['share']:.2%}", books)
        rows.append((name, *shares, f"{found['audio_s_per_s']:.2f}"))
    title = f"bench codec: {figures['num_codes']} codes of {figures['audio_s']:.0f} s, {figures['num_distinct_codes']} different"
    headings = ("encoded", "codes that differ", "by codebook", "audio-s per s")
    print_table(rows, headings=headings, title=title, to_stdout=True)
    if figures["settings"]["codec"] in ("full", "tiny"):
        print_line(
            "random weights: how many codes differ says little of a trained codec; name yours with --codec FOLDER"
        )
    print_line(f"written to {out}")


if __name__ == "__main__":
    print_json(measure(json.loads(sys.argv[2])))
