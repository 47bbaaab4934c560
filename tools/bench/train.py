"""What `bench train` measures: our step against what a user would run today, on the same samples, in one run.

Today's way is transformers' class with peft (dropout 0.05) on right-padded batches of 2 and 4, text and audio labels. Ours is
`train.step.train_step` on packs, in a process that keeps the memory it frees, as `train` does on a CPU. Same seeded samples,
rank, threads and sizes; loss, backward and optimizer are timed, data is ready beforehand; on a CPU time is the processor's, so
that neighbours do not count, shared by the threads. Every side runs in a process of its own, so that its peak memory is its own;
sides take turns.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.terminal import print_json, print_line, print_table
from tools.bench.sides import fill_randomly, model_config, run_side, synchronise, transformers_model

SIDES = ("ours", "ours, layer by layer", "padded batches of 2", "padded batches of 4")
TEXT, REFERENCE, TARGET = (40, 220), (60, 260), (60, 260)  # positions of one sample; the audio ones with their markers
WARM_UP = {"cpu": 1, "cuda": 3}  # steps before time is taken; on a GPU the first ones compile
LEARNED_TEXT = 0.2  # of the text positions, right before the target: a layout that writes the text first


@dataclass(frozen=True)
class Settings:
    """`size` "middle": hidden 512, 8 layers, full vocabulary, for a CPU. "full": the released sizes, for a GPU."""

    size: str
    num_samples: int
    batch_tokens: int
    rank: int
    threads: int
    rounds: int
    device: str
    seed: int = 0


def bench(settings: Settings, out: Path) -> None:
    """Measure every side `rounds` times in turn, print the table, write the JSON file."""
    from shards.writer import write_json

    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(settings.rounds):
        for side in SIDES:
            print_line(f"round {number + 1} of {settings.rounds}: {side}")
            rounds[side].append(run_side("tools.bench.train", side, asdict(settings), settings.threads))
    sides = {
        side: {name: float(np.median([result[name] for result in results])) for name in results[0]}
        for side, results in rounds.items()
    }
    best = max(sides[side]["samples_per_s"] for side in SIDES if side.startswith("padded"))
    figures = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "settings": asdict(settings),
        "sides": sides,
        "gain_over_best_padded": sides["ours"]["samples_per_s"] / best,
        "all_rounds": rounds,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, figures)
    print_figures(figures, out)


# --- one side, in its own process -----------------------------------------------------------------------------------


def measure(side: str, settings: Settings) -> dict[str, float]:
    """Steps over all samples once, after some that are not timed."""
    import torch

    from train.model.flops import matmul_rate

    torch.set_num_threads(settings.threads)
    sequences = make_sequences(settings.num_samples, settings.seed)
    if side.startswith("ours"):
        steps, num_positions = prepare_ours(sequences, settings, fuses=side == "ours")
    else:
        steps, num_positions = prepare_padded(sequences, settings, int(side.split()[-1]))
    on_gpu = settings.device == "cuda"
    for step in steps[: WARM_UP[settings.device]]:
        step()
    synchronise(settings.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    now = time.perf_counter if on_gpu else time.process_time
    started = now()
    for step in steps:
        step()
    synchronise(settings.device)
    seconds = (now() - started) / (1 if on_gpu else settings.threads)
    num_tokens = sum(len(sequence) for sequence in sequences)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "samples_per_s": len(sequences) / seconds,
        "tokens_per_s": num_tokens / seconds,
        "useful_share": num_tokens / num_positions,
        "peak_gb": peak / 1e9,
        "matmul_share": useful_operations(sequences, settings) / seconds / matmul_rate(torch.device(settings.device)),
    }


def useful_operations(sequences: list[Any], settings: Settings) -> float:
    """What the mathematics asks for, whoever does it: padding and logits that nobody learns are not counted."""
    import torch

    from train.config import LoraSection
    from train.model.batch import pack
    from train.model.decoder import HiggsAudio
    from train.model.flops import lora_sizes_of, step_flops
    from train.model.lora import add_lora

    with torch.device("meta"):
        model = HiggsAudio(model_config(settings.size))
    add_lora(model, LoraSection(rank=settings.rank), "bench", seed=0)
    return step_flops(model.config, lora_sizes_of(model), [pack([sequence], [0], ["k"]) for sequence in sequences])


def make_sequences(num_samples: int, seed: int) -> list[Any]:
    """Seeded samples: text, reference, learned text, target."""
    from shards.delay_pattern import NUM_MARKER_COLUMNS
    from shards.sequence import AUDIO_EOS, EOT, Audio, Text, assemble

    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(num_samples):
        num_text, reference, target = (int(rng.integers(*bounds)) for bounds in (TEXT, REFERENCE, TARGET))
        num_learned = round(LEARNED_TEXT * num_text)
        ids = rng.integers(0, 128000, num_text).astype(np.int32)
        codes = [rng.integers(0, 1024, (8, n - NUM_MARKER_COLUMNS)).astype(np.uint16) for n in (reference, target)]
        segments = [
            Text(ids[: num_text - num_learned]),
            Audio(codes[0], is_target=False),
            Text(ids[num_text - num_learned :], learned=True),
            Audio(codes[1], is_target=True),
            Text(np.array([AUDIO_EOS, EOT], np.int32), learned=True),
        ]
        sequences.append(assemble(segments))
    return sequences


def prepare_ours(sequences: list[Any], settings: Settings, fuses: bool) -> tuple[list[Callable[[], Any]], int]:
    """One step per pack, and the number of positions that are computed. As `train.model.build` does it, with random weights."""
    import torch

    from train.config import LoraSection, LossSection, TrainSection
    from train.data.packing import PlanSettings, best_fit
    from train.heap import keep_freed_memory
    from train.model.attention import choose_attention
    from train.model.batch import pack
    from train.model.build import prepare_blocks
    from train.model.decoder import HiggsAudio
    from train.model.fsdp import apply_fsdp
    from train.model.lora import add_lora, lora_parameters
    from train.model.loss import LossCounts
    from train.optim import make_optimizer
    from train.step import StepSettings, train_step
    from train.world import join

    world = join(settings.device)
    on_gpu = settings.device == "cuda"
    if not on_gpu:
        keep_freed_memory()
    with torch.device("meta"):
        model = HiggsAudio(model_config(settings.size))
    fill_randomly(model, settings.device, settings.seed)
    model.attention = choose_attention(model.config, world.device, model.audio_lm_head.weight.dtype, on_gpu)
    add_lora(model, LoraSection(rank=settings.rank, alpha=2 * settings.rank), "bench", seed=0)
    model.fuse_lora(fuses)
    prepare_blocks(model.model.layers, recompute=False, backend="inductor" if on_gpu else None)
    apply_fsdp(model, model.model.layers, world, bf16=on_gpu, shard_base=False)  # LoRA computes in bf16 by this
    optimizer = make_optimizer([parameter for _, parameter in lora_parameters(model)], TrainSection())
    lengths = np.array([len(sequence) for sequence in sequences])
    plan = PlanSettings(seed=0, batch_tokens=settings.batch_tokens, packs_per_step=1)
    places, ends = best_fit(lengths, np.zeros_like(lengths), plan)
    groups = [group.tolist() for group in np.split(places, ends[:-1])]
    batches = [
        pack([sequences[i] for i in g], g, [str(i) for i in g]).to(torch.device(settings.device)) for g in groups
    ]
    model.train()
    settings_of_step = StepSettings(0, 1e-4, LossSection())

    def step(batch: Any) -> None:
        train_step(model, optimizer, [batch], settings_of_step, LossCounts.of([batch], world), world)

    return [lambda b=b: step(b) for b in batches], int(lengths.sum())


def prepare_padded(sequences: list[Any], settings: Settings, size: int) -> tuple[list[Callable[[], Any]], int]:
    """One step per right-padded batch of `size`, as its own example would do it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from train.model.lora import MODES

    model = transformers_model(settings.size, settings.device, settings.seed)
    lora = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, lora_dropout=0.05, target_modules=MODES["comprehensive"]
    )
    model = get_peft_model(model, lora)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    groups = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    batches = [padded_batch(group, settings.device) for group in groups]
    model.train()

    def step(batch: dict[str, Any]) -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return [lambda b=b: step(b) for b in batches], sum(batch["input_ids"].numel() for batch in batches)


def padded_batch(group: list[Any], device: str) -> dict[str, Any]:
    """Right-padded inputs and unshifted labels, as transformers' class takes them."""
    import torch

    from shards.delay_pattern import STREAM_EOS
    from shards.label_shift import IGNORE

    longest, most = max(len(s) for s in group), max(s.codes.shape[1] for s in group)
    ids = np.full((len(group), longest), 128001)
    labels, mask = np.full_like(ids, IGNORE), np.zeros_like(ids)
    codes = np.full((len(group), most, 8), STREAM_EOS)
    audio_labels, audio_mask = np.full_like(codes, IGNORE), np.zeros((len(group), most), bool)
    for row, sequence in enumerate(group):
        length, columns = len(sequence), sequence.codes.shape[1]
        ids[row, :length], mask[row, :length] = sequence.token_ids, 1
        labels[row, 1:length] = sequence.next_token[:-1]
        codes[row, :columns], audio_mask[row, :columns] = sequence.codes.T, True
        audio_labels[row, 1:columns] = sequence.next_codes[:, :-1].T
    named = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "audio_input_ids": codes,
        "audio_input_ids_mask": audio_mask,
        "audio_labels": audio_labels,
    }
    return {name: torch.from_numpy(array).to(device) for name, array in named.items()}


# --- telling --------------------------------------------------------------------------------------------------------


def print_figures(figures: dict[str, Any], out: Path) -> None:
    settings = figures["settings"]
    title = f"bench train: {settings['size']} size, rank {settings['rank']}, {settings['threads']} threads, {settings['device']}"
    title += f"; {figures['machine']}"
    rows: list[tuple[str, ...]] = []
    ours = figures["sides"]["ours"]["samples_per_s"]
    for side, values in figures["sides"].items():
        rows.append(
            (
                side,
                f"{values['samples_per_s']:.2f}",
                f"{values['tokens_per_s']:.0f}",
                f"{values['useful_share']:.0%}",
                f"{values['matmul_share']:.0%}",
                f"{values['peak_gb']:.2f} GB",
                "" if side == "ours" else f"ours is {ours / values['samples_per_s']:.2f} x",
            )
        )
    width = None if sys.stdout.isatty() else 110
    headings = ("side", "samples/s", "tokens/s", "useful positions", "of matmul rate", "peak memory", "gain")
    print_table(rows, headings=headings, title=title, to_stdout=True, width=width)
    print_line(f"written to {out}")


if __name__ == "__main__":
    print_json(measure(sys.argv[1], Settings(**json.loads(sys.argv[2]))))
