"""The sides of `bench data` that load: by plan, by stream, random padded batches, and encoding audio on line.

In: a folder that `write_data` made, and tokens per pack. Out: samples per second of one loader process, the share of useful
tokens and the loader's memory. The tiny codec stands for the real one, which is some hundred times slower, so encoding on line
looks better here than it is.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

MEL_S = 6.0  # seconds of reference whose mel is stored: read, not decoded, as training with codes does


def frames(rng: np.random.Generator, count: int) -> np.ndarray:
    """Codec frames [count] of clips of 1.5-20 s, median 5.5 s."""
    return np.ceil(25 * np.clip(rng.lognormal(np.log(5.5), 0.45, count), 1.5, 20))


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
    samples = useful = total = 0
    for count, tokens, places in batches:
        samples, useful, total = samples + count, useful + tokens, total + places
        if samples >= num_samples:
            break
    elapsed_s = time.monotonic() - started
    values = {"samples_per_s": samples / elapsed_s, "useful_tokens": useful / total}
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
    from shards.index import read_index

    return len(read_index(Path(work) / "index.npy"))
