"""What `bench summary` measures: how long `inspect-shards summary` takes on a data set of a million rows.

One shard of real samples is written, and an index and columns of as many rows as asked for that all point into it: reading
samples and counting rows cost what they would in a data set of that size, without its disk. Runs in a process of its own, as
a user starts it, Python's start included.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shards.columns import COLUMNS_DTYPE
from shards.manifest import Dataset, Fingerprints, digest_of
from shards.npy_file import load_npy
from shards.sample import write_npy
from shards.terminal import print_line, print_table
from shards.writer import sample_key, write_bytes, write_json, write_shard

SHARD_SAMPLES = 512
NUM_SPEAKERS = 2000
CODE = "import sys; sys.argv[0] = 'inspect-shards'; from tools.inspect_shards.cli import main; main()"


def bench(num_rows: int, rounds: int, out: Path) -> dict[str, Any]:
    """Measure, print the table, write the JSON file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder, num_rows)
        seconds, cpu_s = [], []
        for _ in range(rounds):
            started, used = time.monotonic(), cpu_of_children()
            command = [sys.executable, "-c", CODE, "summary", str(folder), "--json"]
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(round(time.monotonic() - started, 3))
            cpu_s.append(round(cpu_of_children() - used, 3))
    figures = {"rows": num_rows, "seconds": seconds, "cpu_seconds": cpu_s, "best_s": min(seconds)}
    write_json(out, figures)
    print_table(
        [("rows", f"{num_rows}"), ("seconds", ", ".join(map(str, seconds))), ("of a core", ", ".join(map(str, cpu_s)))],
        to_stdout=True,
    )
    print_line(f"{out}: written")
    return figures


def cpu_of_children() -> float:
    """Seconds of a core: what a busy machine does not stretch."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_set(folder: Path, num_rows: int) -> None:
    """A data set of `num_rows` index rows that lie in one shard."""
    rng = np.random.default_rng(0)
    samples = (random_sample(rng, sample_key(0, number), number) for number in range(min(SHARD_SAMPLES, num_rows)))
    done = write_shard(folder, 0, samples, [])
    index = np.resize(load_npy(folder / "shards" / "000" / "shard-000000.idx.npy"), num_rows)
    index["reference_frames"], index["target_frames"] = rng.integers(25, 500, (2, num_rows))
    columns = np.zeros(num_rows, COLUMNS_DTYPE)
    for column in ("reference_audio", "target_audio", "target_text"):
        columns[column] = rng.integers(1, 1 << 62, num_rows)
    columns["reference_s"], columns["target_s"] = index["reference_frames"] / 25, index["target_frames"] / 25
    columns["num_chars"] = columns["num_letters"] = columns["num_arabic"] = rng.poisson(80, num_rows)
    for column in ("target_bandwidth_hz", "target_level_db", "target_noise_db"):
        columns[column] = rng.normal(-20, 5, num_rows)
    write_bytes(folder / "index.npy", write_npy(index))
    write_bytes(folder / "columns.npy", write_npy(columns))
    speakers = {f"speaker-{number}": num_rows // NUM_SPEAKERS for number in range(NUM_SPEAKERS)}
    record = Dataset(
        config={},
        fingerprints=Fingerprints("0" * 64, "0" * 64, None),
        num_rows=num_rows,
        num_samples=num_rows,
        num_text_tokens=0,
        reference_hours=float(columns["reference_s"].sum() / 3600),
        target_hours=float(columns["target_s"].sum() / 3600),
        speakers=speakers,
        rejects={},
        warnings={},
        target_seconds_histogram={},
        shards=[done],
        digest="",
    )
    write_json(folder / "dataset.json", msgspec.structs.replace(record, digest=digest_of(record)))


def random_sample(rng: np.random.Generator, key: str, number: int):
    """A sample of random codes and token ids: no tokenizer is needed to count them."""
    from shards.cloning import audio_facts
    from shards.sample import Sample, SampleFacts, Turn

    codes = [rng.integers(0, 1024, (8, frames)).astype(np.uint16) for frames in rng.integers(25, 300, 2)]
    text = "نص قصير للقياس"
    facts = SampleFacts(
        id=key,
        row=number,
        speaker=f"speaker-{number % NUM_SPEAKERS}",
        turns=[Turn("user", [0, "reference"]), Turn("assistant", [1, "target"])],
        texts=[text, text],
        text_token_counts=[5, 5],
        system_text=None,
        reference_text=0,
        target_text=1,
        num_as_written_tokens=20,
        reference=audio_facts("reference.wav", codes[0]),
        target=audio_facts("target.wav", codes[1]),
    )
    return Sample(key, facts, np.arange(10, dtype=np.int32), codes[0], codes[1])
