"""What `bench data` measures: planning, and feeding packs to training, against the plain ways of doing it.

Planning: seconds, peak memory and fill for generated indexes. Loading: one loader process delivering packs by plan and by
stream, random padded batches from the same shards, and encoding audio on line; the tiny codec stands for the real one there,
which is some hundred times slower, so that figure flatters the plain way. Every side runs in a process of its own, in
rounds, and times itself from its first batch on.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.terminal import print_line, print_table

MEL_S = 6.0  # seconds of reference whose mel is stored: read, not decoded, as training with codes does
CODE = "import json, sys; from tools.bench import data as b; print('RESULT', json.dumps(b.{name}(*sys.argv[1:])), flush=True)"


@dataclass(frozen=True)
class Settings:
    rows: list[int]
    samples: int
    batch_tokens: int
    rounds: int


def bench(settings: Settings, out: Path) -> dict[str, Any]:
    """Measure everything, print the table, write the JSON file."""
    from preprocess.workers import usable_cores
    from shards.writer import write_json
    from tools.bench.preprocess import run

    figures: dict[str, Any] = {
        "machine": f"{usable_cores()} usable cores, {platform.processor() or platform.machine()}"
    }
    figures["settings"] = dict(settings.__dict__)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        figures["planning"] = {
            str(rows): run(CODE.format(name="plan_rows"), work / "index.npy", rows, settings.batch_tokens).result
            for rows in settings.rows
        }
        write_data(work, settings.samples)
        rounds: dict[str, list[dict[str, float]]] = {}
        for _ in range(settings.rounds):  # in turn, so that a change of the machine's speed meets all of them
            for kind in ("plan", "stream", "padded", "online"):
                rounds.setdefault(kind, []).append(
                    run(CODE.format(name=f"load_{kind}"), work, settings.batch_tokens).result
                )
    figures["loading"] = {
        kind: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for kind, results in rounds.items()
    }
    plan = figures["loading"]["plan"]
    figures["ratios"] = {
        f"plan_over_{kind}": plan["samples_per_s"] / figures["loading"][kind]["samples_per_s"]
        for kind in ("stream", "padded", "online")
    }
    write_json(out, figures)
    print_figures(figures, out)
    return figures


# --- planning -------------------------------------------------------------------------------------------------------


def plan_rows(path: str, rows: str, batch_tokens: str) -> dict[str, float]:
    """Plan one epoch of a generated index, memory-mapped from a file. Runs in a process of its own."""
    from shards.index import INDEX_DTYPE, read_index
    from train.data.plan import Planner, PlanSettings

    count = int(rows)
    index = np.lib.format.open_memmap(path, "w+", INDEX_DTYPE, (count,))
    part = index
    rng = np.random.default_rng(0)
    for start in range(0, count, 1 << 20):
        part = index[start : start + (1 << 20)]
        part["shard"] = np.arange(start, start + len(part)) // 1024
        for name in ("reference_frames", "target_frames"):
            part[name] = frames(rng, len(part))
        part["num_target_text_tokens"] = rng.poisson(120, len(part))
    index.flush()
    del index, part  # pages of a written map would count
    before_mb = resident_mb("VmRSS")
    started = time.monotonic()
    planner = Planner(read_index(Path(path)), lengths, PlanSettings(0, int(batch_tokens), 8))
    scanned_s = time.monotonic() - started
    num_packs = planner.num_packs(0)
    return {
        "scan_s": scanned_s,
        "plan_s": time.monotonic() - started - scanned_s,
        "fill": planner.num_tokens / (num_packs * int(batch_tokens)),
        "peak_mb": resident_mb("VmHWM"),  # pages of the mapped index included: the system takes them back when it wants
        "before_mb": before_mb,
        "index_mb": Path(path).stat().st_size / 1e6,
        "padded_useful": padded_share(read_index(Path(path)), int(batch_tokens)),
        "num_packs": num_packs,
        "num_windows": planner.num_windows(0),
    }


def frames(rng: np.random.Generator, count: int) -> np.ndarray:
    """Codec frames [count] of clips of 1.5-20 s, median 5.5 s."""
    return np.ceil(25 * np.clip(rng.lognormal(np.log(5.5), 0.45, count), 1.5, 20))


def lengths(rows: np.ndarray) -> np.ndarray:
    return rows["num_target_text_tokens"].astype(np.int64) + rows["reference_frames"] + rows["target_frames"] + 18


def padded_share(index: np.ndarray, batch_tokens: int) -> float:
    """Share of useful tokens in random batches padded to their longest, as many samples a batch as a pack holds."""
    tokens = lengths(np.array(index[:100_000]))
    size = max(1, int(batch_tokens / tokens.mean()))
    batches = np.random.default_rng(0).permutation(tokens)[: len(tokens) // size * size].reshape(-1, size)
    return float(batches.sum() / (batches.max(axis=1) * size).sum())


def resident_mb(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


# --- loading --------------------------------------------------------------------------------------------------------


def write_data(work: Path, num_samples: int) -> None:
    """A tokenizer, a tiny codec, two shards of random samples of real sizes, their index, and a wave for each sample."""
    import soundfile

    from shards.artifacts import load_tokenizer
    from shards.encoders.codec import HOP
    from shards.index import read_index
    from shards.sequence import SAMPLE_RATE
    from shards.writer import sample_key, shard_path, write_shard
    from tools.tiny.cli import write_tiny

    write_tiny(work)
    tokenizer = load_tokenizer(work / "model")
    rng = np.random.default_rng(0)
    per_shard = -(-num_samples // 2)
    noise = (0.1 * rng.standard_normal(20 * SAMPLE_RATE)).astype(np.float32)
    (work / "waves").mkdir()
    for number in range(per_shard * 2):
        soundfile.write(work / "waves" / f"{number}.wav", noise[: int(frames(rng, 1)[0]) * HOP], SAMPLE_RATE)
    for shard in range(2):
        keys = [sample_key(shard, number) for number in range(per_shard)]
        write_shard(work, shard, (random_sample(rng, tokenizer, key) for key in keys), [])
    rows = [read_index(shard_path(work, shard, ".idx.npy")) for shard in range(2)]
    np.save(work / "index.npy", np.concatenate(rows))


def random_sample(rng: np.random.Generator, tokenizer: Any, key: str) -> Any:
    import msgspec

    from shards.artifacts import WHISPER_FEATURES
    from shards.cloning import cloning_sample
    from shards.sample import MelFacts, compress, write_npy

    texts = [" ".join(rng.choice(["صباح", "الخير", "كيف", "حالك"], 12)) for _ in range(2)]
    codes = [rng.integers(0, 1024, (8, int(count))).astype(np.uint16) for count in frames(rng, 2)]
    mel = rng.standard_normal((128, int(100 * MEL_S) + 2)).astype(np.float16)
    sample = cloning_sample(
        tokenizer, texts[0], codes[0], texts[1], codes[1], key=key, speaker=f"speaker-{rng.integers(20)}"
    )
    facts = msgspec.structs.replace(sample.facts, mel=MelFacts(int(WHISPER_FEATURES["sampling_rate"] * MEL_S), 0.0))
    return replace(sample, facts=facts, reference_mel_zst=compress(write_npy(mel)))


def load_plan(work: str, batch_tokens: str) -> dict[str, float]:
    from shards.index import read_index
    from shards.reader import SampleReader
    from train.data.loader import LoaderShare, load_planned_packs
    from train.data.plan import Planner, PlanSettings

    index = read_index(Path(work) / "index.npy")
    builder = sequence_builder(work)
    planner = Planner(index, builder.lengths, PlanSettings(0, int(batch_tokens), 1))
    packs = load_planned_packs(SampleReader(Path(work)), index, planner, 0, builder, LoaderShare(num_workers=1))
    return timed(
        ((len(d.batch.keys), d.batch.num_tokens, int(batch_tokens)) for d in packs), 3 * len(index), workers_too=True
    )


def load_stream(work: str, batch_tokens: str) -> dict[str, float]:
    from train.config import TrainSection
    from train.data.loader import LoaderShare
    from train.data.streamed_source import StreamedSource

    options = {"loader": "stream", "max_steps": 1, "batch_tokens": int(batch_tokens), "packs_per_step": 1}
    source = StreamedSource(str(Path(work) / "shards"), TrainSection(**options, shuffle_buffer=200))
    source.prepare(sequence_builder(work))
    packs = source.loaded_packs(0, LoaderShare(num_workers=1))
    return timed(
        ((len(d.batch.keys), d.batch.num_tokens, int(batch_tokens)) for d in packs),
        3 * count_of(work),
        workers_too=True,
    )


def load_padded(work: str, batch_tokens: str) -> dict[str, float]:
    """A map-style data set, random batches, padded to the longest: what most trainers do."""
    import torch

    from shards.index import read_index
    from shards.reader import SampleReader

    index = read_index(Path(work) / "index.npy")
    reader, builder = SampleReader(Path(work)), sequence_builder(work)
    size = max(1, int(int(batch_tokens) / builder.lengths(index).mean()))

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(index)

        def __getitem__(self, number: int) -> Any:
            return builder.training(reader.read(index[number]))

    def collate(sequences: list[Any]) -> tuple[Any, int]:
        longest = max(len(sequence) for sequence in sequences)
        ids, labels = (torch.zeros(len(sequences), longest, dtype=torch.long) for _ in range(2))
        codes, targets = (torch.zeros(len(sequences), 8, longest, dtype=torch.long) for _ in range(2))
        for i, one in enumerate(sequences):
            ids[i, : len(one)] = torch.from_numpy(one.token_ids)
            labels[i, : len(one)] = torch.from_numpy(one.next_token)
            codes[i, :, : one.codes.shape[1]] = torch.from_numpy(one.codes)
            targets[i, :, : one.codes.shape[1]] = torch.from_numpy(one.next_codes)
        return (ids, labels, codes, targets), sum(len(sequence) for sequence in sequences)

    loader = torch.utils.data.DataLoader(
        Samples(), batch_size=size, shuffle=True, num_workers=1, collate_fn=collate, persistent_workers=True
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return timed(((len(b[0][0]), b[1], b[0][0].numel()) for b in batches), 3 * len(index), workers_too=True)


def load_online(work: str, batch_tokens: str) -> dict[str, float]:
    """Read two waves, encode them with the (tiny) codec and make the reference's mel, for every sample of every epoch."""
    import soundfile
    import torch
    import torchaudio
    from transformers import WhisperFeatureExtractor

    from shards.artifacts import WHISPER_FEATURES
    from shards.encoders.codec import load_codec
    from shards.sequence import SAMPLE_RATE

    torch.set_num_threads(1)
    codec, mels = load_codec(Path(work) / "codec"), WhisperFeatureExtractor(**WHISPER_FEATURES)  # pyright: ignore[reportArgumentType]
    whisper_rate = WHISPER_FEATURES["sampling_rate"]
    waves = sorted((Path(work) / "waves").iterdir())[:24]

    def samples() -> Iterator[tuple[int, int, int]]:
        for reference, target in itertools.cycle(itertools.pairwise(waves)):
            num_frames = 0
            for path in (reference, target):
                wave, _ = soundfile.read(path, dtype="float32")
                num_frames += codec.encode(wave).shape[-1]
            wave, _ = soundfile.read(reference, dtype="float32")
            low = torchaudio.functional.resample(torch.from_numpy(wave), SAMPLE_RATE, whisper_rate)
            mels(low.numpy(), sampling_rate=whisper_rate)
            yield 1, num_frames, num_frames

    return timed(samples(), 24, workers_too=False)


def timed(batches: Iterator[tuple[int, int, int]], num_samples: int, workers_too: bool) -> dict[str, float]:
    """(samples, useful tokens, all tokens) of each batch -> rates from the first batch on, and the loader's memory."""
    next(batches)
    started = time.monotonic()
    samples = useful = whole = 0
    for count, tokens, places in batches:
        samples, useful, whole = samples + count, useful + tokens, whole + places
        if samples >= num_samples:
            break
    elapsed_s = time.monotonic() - started
    values = {"samples_per_s": samples / elapsed_s, "useful_tokens": useful / whole}
    if workers_too:
        values["worker_mb"] = worker_mb()
    return values


def worker_mb() -> float:
    """Memory of the loader process that is its own and not shared with this one (proportional set size)."""
    import multiprocessing

    (worker,) = multiprocessing.active_children()
    lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


def sequence_builder(work: str) -> Any:
    from shards.artifacts import load_tokenizer
    from shards.config import SequenceSection
    from shards.sequence import SequenceBuilder

    return SequenceBuilder(load_tokenizer(Path(work) / "model"), SequenceSection())


def count_of(work: str) -> int:
    return len(np.load(Path(work) / "index.npy", mmap_mode="r"))


# --- telling --------------------------------------------------------------------------------------------------------


def print_figures(figures: dict[str, Any], out: Path) -> None:
    budget = figures["settings"]["batch_tokens"]
    title = f"bench data: {figures['machine']}, packs of {budget} tokens"
    rows: list[tuple[str, ...]] = []
    for num_rows, plan in figures["planning"].items():
        rows.append(
            (
                f"plan {int(num_rows):,} rows",
                f"{plan['scan_s'] + plan['plan_s']:.2f} s, {plan['peak_mb'] - plan['before_mb']:.0f} MB at most, "
                f"{plan['index_mb']:.0f} MB of them the mapped index; {plan['fill']:.1%} full",
                f"{plan['num_windows']} windows; random padded batches {plan['padded_useful']:.1%} useful",
            )
        )
    names = {
        "plan": "plan",
        "stream": "stream",
        "padded": "random padded batches",
        "online": "encoding on line (tiny codec)",
    }
    for kind, name in names.items():
        values = figures["loading"][kind]
        ratio = "" if kind == "plan" else f"plan is {figures['ratios'][f'plan_over_{kind}']:.2f} x"
        memory = f", worker {values['worker_mb']:.0f} MB of its own" if "worker_mb" in values else ""
        useful = "" if kind == "online" else f", {values['useful_tokens']:.1%} useful tokens"
        rows.append((f"{name}, one process", f"{values['samples_per_s']:.0f} samples/s{useful}{memory}", ratio))
    print_table(rows, headings=("what", "figure", "beside it"), title=title, to_stdout=True)
    print_line(f"written to {out}")
