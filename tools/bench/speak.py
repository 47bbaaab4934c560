"""What `bench speak` measures: our generator against transformers' `generate`, and against the memory that feeds both.

In: a size. Out: columns a second from the same prompt with the same random weights, whose head never ends an audio, so that all
run to the end. Greedy codes of both must be equal, or there is no figure. The limit is what reading the weights of the audio
path once per column would take at this device's measured reading rate; a model that fits into a CPU's caches can beat it.
Every side runs in a process of its own; sides take turns.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.terminal import print_json, print_line, print_table
from tools.bench.sides import fill_randomly, model_config, run_side, synchronise, transformers_model

THEIRS = "transformers, greedy"
GRAPHS = "CUDA graphs"
GREEDY_SIDES = ("ours, greedy", THEIRS)
PROMPT = (60, 200, 40)  # text, reference and text rows before the target: about 300 positions
READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # of the tensor that is read to measure the reading rate


@dataclass(frozen=True)
class Settings:
    """`num_slots`: streams side by side of the last side."""

    size: str
    num_columns: int
    num_slots: int
    threads: int
    rounds: int
    device: str
    seed: int = 0


def sides_of(num_slots: int, device: str) -> tuple[str, ...]:
    sides = (*GREEDY_SIDES, "ours, sampled", f"ours, sampled, {num_slots} streams")
    return sides if device == "cpu" else (*sides, *(f"{side}, {GRAPHS}" for side in sides if side != THEIRS))


def bench(sizes: list[str], settings: Settings, out: Path) -> dict[str, Any]:
    """Measure every size and side `rounds` times in turn, print the tables, write the JSON file.

    Raises RuntimeError where greedy codes of the two implementations differ.
    """
    from shards.writer import write_json

    figures: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    figures["settings"] = asdict(settings)
    figures["sizes"] = {}
    for size in sizes:
        figures["sizes"][size] = measure_size(Settings(**{**asdict(settings), "size": size}))
        write_json(out, figures)  # after every size: a run that is cut short still has figures
        print_figures(size, figures)
    print_line(f"written to {out}")
    return figures


def measure_size(settings: Settings) -> dict[str, Any]:
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides_of(settings.num_slots, settings.device)}
    for number in range(settings.rounds):
        for side, results in rounds.items():
            print_line(f"{settings.size}, round {number + 1} of {settings.rounds}: {side}")
            results.append(run_side("tools.bench.speak", side, asdict(settings), settings.threads))
    codes = {side: rounds[side][0].pop("codes") for side in GREEDY_SIDES}
    for side in GREEDY_SIDES:
        for result in rounds[side][1:]:
            result.pop("codes")
    ours, theirs = (np.array(codes[side]) for side in GREEDY_SIDES)
    same = float((ours == theirs).mean()) if ours.shape == theirs.shape else 0.0
    if settings.device == "cpu" and same < 1.0:
        raise RuntimeError(
            f"bench speak, size {settings.size}: {1 - same:.1%} of the greedy codes differ from those of transformers' generate; "
            "expected none, so no figure was stored"
        )
    sides = {
        side: {name: float(np.median([result[name] for result in results])) for name in results[0]}
        for side, results in rounds.items()
    }
    own, reference = (sides[side] for side in GREEDY_SIDES)
    return {
        "sides": sides,
        "same_greedy_codes": same,
        "gain_over_transformers": own["columns_per_s"] / reference["columns_per_s"],
        "gain_in_processor_time": reference["processor_ms_per_column"] / own["processor_ms_per_column"],
        "all_rounds": rounds,
    }


# --- one side, in its own process -----------------------------------------------------------------------------------


def measure(side: str, settings: Settings) -> dict[str, Any]:
    """One speech to warm up, then one that is timed from its prompt to its last column."""
    import torch

    torch.set_num_threads(settings.threads)
    model, prompt = speaking_model(settings), make_prompt(settings.seed)
    limit = read_rate(settings.device) / column_bytes(model)
    speak, num_streams = prepare(side, settings, model, prompt)
    speak(16)
    synchronise(settings.device)
    started, started_work = time.perf_counter(), time.process_time()
    codes = speak(settings.num_columns)
    synchronise(settings.device)
    seconds, work_s = time.perf_counter() - started, time.process_time() - started_work
    result: dict[str, Any] = {
        "columns_per_s": num_streams * settings.num_columns / seconds,
        "real_time_factor": seconds / (settings.num_columns / 25),
        "limit_columns_per_s": num_streams * limit,
        "processor_ms_per_column": 1000 * work_s / (num_streams * settings.num_columns),  # for a machine that is busy
    }
    if side in GREEDY_SIDES:
        result["codes"] = codes.tolist()
    return result


def prepare(side: str, settings: Settings, model: Any, prompt: Any) -> tuple[Callable[[int], np.ndarray], int]:
    """(number of columns -> frames [K, T] of one stream, streams side by side)."""
    if side == THEIRS:
        return prepare_theirs(settings, model, prompt), 1
    from train.model.generate import GREEDY, Sampling
    from train.model.generation.block_graph import record_cuda
    from train.model.generation.engine import Engine
    from train.model.generation.request import Request

    num_streams = settings.num_slots if "streams" in side else 1
    books = model.config.num_codebooks
    samplings = [GREEDY if "greedy" in side else Sampling(seed=seed) for seed in range(num_streams)]
    engine = Engine(model, num_streams, record=record_cuda if GRAPHS in side else None)

    def ours(num_columns: int) -> np.ndarray:
        requests = [engine.submit(Request(prompt, num_columns - books, sampling)) for sampling in samplings]
        for _ in engine.run():
            pass
        return requests[0].speech().codes

    return ours, num_streams


def prepare_theirs(settings: Settings, model: Any, prompt: Any) -> Callable[[int], np.ndarray]:
    import torch

    from shards.delay_pattern import undelay

    theirs = transformers_model(settings.size, settings.device, settings.seed)
    theirs.load_state_dict(model.state_dict())
    inputs = {
        "input_ids": torch.from_numpy(prompt.token_ids.astype(np.int64))[None],
        "audio_input_ids": torch.from_numpy(prompt.codes.T.astype(np.int64))[None],
        "audio_input_ids_mask": torch.ones((1, prompt.codes.shape[1]), dtype=torch.bool),
    }
    inputs = {name: tensor.to(settings.device) for name, tensor in inputs.items()}
    books, before = model.config.num_codebooks, prompt.codes.shape[1]

    def speak(num_columns: int) -> np.ndarray:
        out = theirs.generate(**inputs, max_new_tokens=num_columns + 1, do_sample=False, eos_token_id=128009)
        return undelay(out[0, before:].T.cpu().numpy())[:, : num_columns - books]

    return speak


def speaking_model(settings: Settings) -> Any:
    """Random weights; no head row lets an audio end, for either implementation."""
    import torch

    from shards.delay_pattern import STREAM_EOS
    from train.model.decoder import HiggsAudio

    with torch.device("meta"):
        model = HiggsAudio(model_config(settings.size))
    fill_randomly(model, settings.device, settings.seed)
    with torch.no_grad():
        rows = model.audio_lm_head.weight.view(model.config.num_codebooks, model.config.codebook_vocab, -1)
        rows[:, STREAM_EOS] = 0.0
        rows[:, STREAM_EOS - 1] = 0.0
    return model.eval()


def make_prompt(seed: int) -> Any:
    """Text, a reference, text, and the opened target, as `SequenceBuilder.prompt` ends."""
    from shards.delay_pattern import NUM_MARKER_COLUMNS
    from shards.sequence import AUDIO_OUT_BOS, Audio, Text, assemble

    rng = np.random.default_rng(seed)
    num_before, num_frames, num_after = PROMPT
    texts = [rng.integers(0, 128000, number).astype(np.int32) for number in (num_before, num_after)]
    codes = rng.integers(0, 1024, (8, num_frames - NUM_MARKER_COLUMNS)).astype(np.uint16)
    segments = [
        Text(texts[0]),
        Audio(codes, is_target=False),
        Text(texts[1]),
        Text(np.array([AUDIO_OUT_BOS], np.int32)),
    ]
    return assemble(segments)


def column_bytes(model: Any) -> float:
    """Bytes of the weights that one column must read: audio path and head, of all layers; not the text network."""
    text_only = (
        ".mlp.",
        ".input_layernorm.",
        ".post_attention_layernorm.",
        "text_lm_head",
        "embed_tokens",
        "embed_audio",
    )
    named = model.named_parameters()
    return sum(p.numel() * p.element_size() for name, p in named if not any(part in name for part in text_only))


def read_rate(device: str) -> float:
    """Bytes a second of a sum over one large tensor, the best of five."""
    import torch

    data = torch.ones(READ_BYTES[device] // 4, device=device)
    best = float("inf")
    for _ in range(5):
        synchronise(device)
        started = time.perf_counter()
        data.sum()
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return READ_BYTES[device] / best


# --- printing -------------------------------------------------------------------------------------------------------


def print_figures(size: str, figures: dict[str, Any]) -> None:
    settings, measured = figures["settings"], figures["sizes"][size]
    title = f"bench speak: {size} size, {settings['num_columns']} columns, {settings['threads']} threads, {settings['device']}"
    title += f"; {figures['machine']}; {measured['same_greedy_codes']:.1%} of the greedy codes are the same"
    theirs = measured["sides"][THEIRS]["columns_per_s"]
    their_work = measured["sides"][THEIRS]["processor_ms_per_column"]
    rows = [
        (
            side,
            f"{values['columns_per_s']:.1f}",
            f"{values['real_time_factor']:.3f}",
            f"{values['columns_per_s'] / 25:.2f}",
            f"{values['columns_per_s'] / theirs:.2f} x",
            f"{values['columns_per_s'] / values['limit_columns_per_s']:.0%}",
            f"{values['processor_ms_per_column']:.2f} ms, {their_work / values['processor_ms_per_column']:.2f} x",
        )
        for side, values in measured["sides"].items()
    ]
    headings = (
        "side",
        "columns/s",
        "real-time factor",
        "audio s/s",
        "over transformers",
        "of reading rate",
        "processor",
    )
    print_table(rows, headings=headings, title=title, to_stdout=True, width=None if sys.stdout.isatty() else 130)


if __name__ == "__main__":
    print_json(measure(sys.argv[1], Settings(**json.loads(sys.argv[2]))))
