"""What `bench preprocess` measures of the codec: the encoder as the workers run it against the model as it is published.

In: a codec folder. Out: audio seconds per core second of one thread at several lengths, the share of codes that differ, peak
memory, the rate of each part, and this core's float32 product rate, which bounds them all. Each side runs in a process of its
own, with the memory settings its users have: ours with those that stage one gives its workers, the plain one with none. Sides
take turns, so that a change of the machine's speed meets both. Operations are counted in the plain model, timed in both.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.terminal import print_json

if TYPE_CHECKING:
    from shards.encoders.codec import Codec

LENGTHS_S = (2.0, 4.0, 8.0, 15.0, 30.0)
SIDES = ("ours", "plain")
PARTS_S = 4.0  # of audio, by which parts are timed
PARTS_REPEATS = 3
FLOP_PER_AUDIO_S = 31.97e9  # of the released sizes without attention, by torch.utils.flop_counter
ATTENTION_FLOP = 92.16e6  # more for each second of the clip: 4 * 50^2 positions a second squared * 768 * 12 layers


def bench_codec(folder: Path, rounds: int, lengths_s: tuple[float, ...] = LENGTHS_S) -> dict[str, Any]:
    """Every side `rounds` times in turn; medians by length."""
    from preprocess.workers import MALLOC_VARIABLES
    from tools.bench.sides import run_side

    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    settings = {"folder": str(folder.resolve()), "lengths_s": lengths_s}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            environment = MALLOC_VARIABLES if side == "ours" else {}
            results[side].append(run_side("tools.bench.codec", side, settings, threads=1, environment=environment))
    rates = {
        side: [
            float(np.median([result["rates"][place] for result in results[side]])) for place in range(len(lengths_s))
        ]
        for side in SIDES
    }
    ours, plain = (np.concatenate([np.ravel(codes) for codes in results[side][0]["codes"]]) for side in SIDES)
    return {
        "lengths_s": list(lengths_s),
        "audio_s_per_core_s": rates,
        "gain": [ours / plain for ours, plain in zip(rates["ours"], rates["plain"], strict=True)],
        "num_codes": len(ours),
        "num_codes_that_differ": int((ours != plain).sum()),
        "num_distinct_codes": len(np.unique(ours)),
        "parts": rates_of_parts(results),
        "peak_mb": {side: max(result["peak_mb"] for result in results[side]) for side in SIDES},
        "product_gflops": float(np.median([result["product_gflops"] for result in results["ours"]])),
        "all_rounds": {side: [result["rates"] for result in results[side]] for side in SIDES},
    }


def rates_of_parts(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each part: GFLOP and milliseconds (of both sides, medians) for a second of audio, GFLOP/s of ours."""
    rows = []
    for name, flop in results["plain"][0]["flop_of_parts"].items():
        ms = {side: float(np.median([one["ms_of_parts"][name] for one in results[side]])) for side in SIDES}
        gflop = flop / 1e9 / PARTS_S
        rows.append({"part": name, "gflop": gflop, "ms": ms, "gflops": 1e3 * gflop / ms["ours"]})
    return rows


def measure(side: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One side in this process: audio seconds per second of processor time, once per length after one warm-up."""
    import torch

    from shards.encoders.codec import load_codec
    from shards.sequence import SAMPLE_RATE

    torch.set_num_threads(1)
    folder = Path(settings["folder"])
    codec: Codec = load_codec(folder) if side == "ours" else plain_codec(folder)
    rates, codes = [], []
    for place, length_s in enumerate(settings["lengths_s"]):
        wave = speech_of(length_s, seed=place)
        codec.encode(wave)
        started = time.process_time()
        codes.append(codec.encode(wave).tolist())
        rates.append(len(wave) / SAMPLE_RATE / (time.process_time() - started))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    parts = calls_of_parts(codec, speech_of(PARTS_S, seed=0))
    return {
        "rates": rates,
        "codes": codes,
        "peak_mb": peak_mb,
        "ms_of_parts": {name: processor_ms(call) / PARTS_S for name, call in parts.items()},
        "flop_of_parts": {name: counted_flop(call) for name, call in parts.items()} if side == "plain" else {},
        "product_gflops": product_gflops(),
    }


def calls_of_parts(codec: Codec, wave: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Each part of the encoder, called with what it is given while `wave` [S] is encoded; parts do not overlap."""
    model: Any = codec._model
    hubert = model.semantic_model
    modules = {
        "HuBERT, convolutions": hubert.feature_extractor,
        "HuBERT, transformer": hubert.encoder,
        "semantic encoder": model.encoder_semantic,
    }
    modules |= {f"acoustic block {place}": block for place, block in enumerate(model.acoustic_encoder.block)}
    calls: dict[str, Callable[[], Any]] = {}

    def note(name: str) -> Any:
        def hook(module: Any, given: Any, named: Any) -> None:
            calls[name] = lambda: module.forward(*given, **named)

        return hook

    hooks = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in modules.items()]
    codec.encode(wave)
    for hook in hooks:
        hook.remove()
    return calls


def processor_ms(call: Callable[[], Any]) -> float:
    """The least of some, after one to warm up."""
    import torch

    took = []
    with torch.inference_mode():
        for _ in range(1 + PARTS_REPEATS):
            started = time.process_time()
            call()
            took.append(1e3 * (time.process_time() - started))
    return min(took[1:])


def flop_per_audio_s(clip_s: float) -> float:
    """Of the whole encoder at the released sizes."""
    return FLOP_PER_AUDIO_S + ATTENTION_FLOP * clip_s


def counted_flop(call: Callable[[], Any]) -> int:
    """With attention as two products: the CPU's kernel for both would not be counted (torch 2.11)."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def plain_codec(folder: Path) -> Any:
    """The codec without the changes for a CPU."""
    from shards.encoders import codec_on_cpu
    from shards.encoders.codec import load_codec

    codec_on_cpu.quicken = lambda *_, **__: None  # pyright: ignore
    return load_codec(folder)


def speech_of(length_s: float, seed: int) -> np.ndarray:
    """A wave [S] float32 that changes as speech does, so that codes are of many kinds."""
    import torch

    from shards.sequence import SAMPLE_RATE
    from tools.tiny.codec import speech_like

    wave = speech_like(torch.Generator().manual_seed(seed))[0, 0].numpy()
    return np.resize(wave, int(length_s * SAMPLE_RATE))


def product_gflops(size: int = 1024, repeats: int = 20) -> float:
    """float32 products of this core by oneDNN, which encodes the convolutions: GFLOP/s."""
    import torch

    rows, weight = torch.randn(size, size).to_mkldnn(), torch.randn(size, size).to_mkldnn()
    product = torch._C._nn.mkldnn_linear  # pyright: ignore
    product(rows, weight, None)
    started = time.process_time()
    for _ in range(repeats):
        product(rows, weight, None)
    return 2 * size**3 * repeats / (time.process_time() - started) / 1e9


if __name__ == "__main__":
    print_json(measure(sys.argv[1], json.loads(sys.argv[2])))
