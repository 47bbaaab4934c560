"""`bench`: figures measured in one run on this machine, as a table and as JSON. Ratios count; absolute times drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shards.terminal import FileToWrite, explained


@click.group()
def main() -> None:
    """Measure the pipeline on this machine."""


@main.command("preprocess", context_settings={"show_default": True})
@click.option("--out", default="out/bench-preprocess.json", type=FileToWrite(), help="The JSON file.")
@click.option("--speech", default="tests/data/arabic-mini", type=click.Path(path_type=Path), help="A folder of clips.")
@click.option("--clips", default=24, help="Clips to encode; each is a target and the reference of the next.")
@click.option("--list-mb", default=200, help="Size of the generated ChatML list.")
@click.option("--workers", type=int, help="Most workers to try; default one per usable core.")
@click.option("--codec", default="full", type=click.Choice(["full", "tiny"]), help="Random weights of this size.")
@click.option("--rounds", default=3, help="Each job is run this often, in turn; medians are printed.")
def preprocess_command(
    out: Path, speech: Path, clips: int, list_mb: int, workers: int | None, codec: str, rounds: int
) -> None:
    """Stage one: intake, codec, parallel efficiency, deduplication, and the plain way of today beside it."""
    from tools.bench.preprocess import Settings, bench

    with explained():
        bench(Settings(speech, clips, list_mb, workers, codec, rounds), out)


@main.command("codec", context_settings={"show_default": True})
@click.option("--codec", default="full", help="Your codec's folder; full or tiny: random weights of this size.")
@click.option(
    "--clips",
    default="tests/data/arabic-mini",
    type=click.Path(path_type=Path),
    help="A folder of audio files, or a ChatML list.",
)
@click.option(
    "--num-clips",
    default=16,
    type=click.IntRange(1),
    help="The first ones. Without bf16 instructions 10 s per audio-s.",
)
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]), help="cuda: the first GPU beside the CPU.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
@click.option("--out", default="out/bench-codec.json", type=FileToWrite(), help="The JSON file.")
def codec_command(codec: str, clips: Path, num_clips: int, device: str, threads: int, out: Path) -> None:
    """How many codes of your codec and clips change with bfloat16, in batches and on a GPU, and how fast each way is."""
    from tools.bench.code_differences import Settings, bench

    with explained():
        bench(Settings(codec, clips, num_clips, device, threads), out)


@main.command("train", context_settings={"show_default": True})
@click.option("--out", default="out/bench-train.json", type=FileToWrite(), help="The JSON file.")
@click.option(
    "--size", default="auto", type=click.Choice(["auto", "small", "middle", "full"]), help="auto: full on a GPU."
)
@click.option(
    "--protocol/--sides",
    default=None,
    help="All variants of one device within --minutes, or ours beside padded batches. Default: --protocol on a GPU.",
)
@click.option("--minutes", default=10.0, type=click.FloatRange(0), help="Of the protocol; what has no time is listed.")
@click.option("--samples", type=int, help="Seeded samples; every side sees all of them. Default 16, 432 on a GPU.")
@click.option("--batch-tokens", type=int, help="Of our packs. Default 4096, 16384 on a GPU.")
@click.option("--rank", default=16, help="Of LoRA, for every side.")
@click.option("--threads", default=1, help="CPU threads, for every side.")
@click.option("--rounds", default=3, help="Every side is run this often, in turn; medians are printed.")
def train_command(
    out: Path,
    size: str,
    protocol: bool | None,
    minutes: float,
    samples: int | None,
    batch_tokens: int | None,
    rank: int,
    threads: int,
    rounds: int,
) -> None:
    """Stage two: our step against transformers' class with peft and padded batches."""
    import torch

    from tools.bench import protocol as whole
    from tools.bench.train import Settings, bench

    on_gpu = torch.cuda.is_available()
    size = ("full" if on_gpu else "middle") if size == "auto" else size
    samples = samples or (432 if on_gpu else 16)
    batch_tokens = batch_tokens or (16384 if on_gpu else 4096)
    with explained():
        device = "cuda" if on_gpu else "cpu"
        if on_gpu if protocol is None else protocol:
            whole.bench(whole.Settings(size, samples, batch_tokens, rank, device, 60 * minutes, threads=threads), out)
        else:
            bench(Settings(size, samples, batch_tokens, rank, threads, rounds, device), out)


@main.command("speak", context_settings={"show_default": True})
@click.option("--out", default="out/bench-speak.json", type=FileToWrite(), help="The JSON file.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    type=click.Choice(["small", "tiny", "middle", "full"]),
    help="May be given often. Default tiny and middle, full on a GPU.",
)
@click.option("--columns", default=250, help="Of the timed speech; 25 are a second.")
@click.option("--streams", type=int, help="Side by side, of the last row. Default 8, 32 on a GPU.")
@click.option("--threads", default=1, help="CPU threads, for every side.")
@click.option("--rounds", default=3, help="Every side is run this often, in turn; medians are printed.")
def speak_command(
    out: Path, sizes: tuple[str, ...], columns: int, streams: int | None, threads: int, rounds: int
) -> None:
    """Generation: our engine against transformers' generate and the reading rate of memory."""
    import torch

    from tools.bench.speak import Settings, bench

    on_gpu = torch.cuda.is_available()
    chosen = list(sizes) or (["full"] if on_gpu else ["tiny", "middle"])
    streams = streams or (32 if on_gpu else 8)
    with explained():
        bench(chosen, Settings("", columns, streams, threads, rounds, "cuda" if on_gpu else "cpu"), out)


@main.command("data", context_settings={"show_default": True})
@click.option("--out", default="out/bench-data.json", type=FileToWrite(), help="The JSON file.")
@click.option("--samples", default=1000, help="Samples written to shards and loaded three times over.")
@click.option("--batch-tokens", default=16384, help="Tokens of a pack.")
@click.option("--rounds", default=3, help="Each loader is run this often, in turn; medians are printed.")
@click.option(
    "--quick", is_flag=True, help="Small sizes, to see that it runs: 4,000 and 10,000 rows, 60 samples, one round."
)
def data_command(out: Path, samples: int, batch_tokens: int, rounds: int, quick: bool) -> None:
    """Data at training time: planning, and feeding packs by plan and by stream, against plain ways."""
    from tools.bench.data import Settings, bench

    rows = [400_000, 1_000_000, 10_000_000]
    settings = Settings([4_000, 10_000], 60, 4096, 1) if quick else Settings(rows, samples, batch_tokens, rounds)
    with explained():
        bench(settings, out)


@main.command("serve", context_settings={"show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--reference", default="tests/data/arabic-mini/spk_00_36.flac", help="A recording of the voice.")
@click.option("--reference-text", default="الجسر الجديد يربط ضفتي النهر.", help="What is said in it.")
@click.option("--out", default="out/bench-serve.json", type=FileToWrite(), help="The JSON file.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Default: ./pipeline.toml if it exists.")
@click.option("--concurrency", multiple=True, type=click.IntRange(1), default=[1, 4, 16], help="May be given often.")
@click.option("--requests", default=32, type=click.IntRange(1), help="At every concurrency.")
@click.option("--seconds", default=4.0, type=click.FloatRange(0.04, 600), help="Of every speech, which is cut there.")
@click.option("--slots", default=4, type=click.IntRange(1), help="Of the server.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
def serve_command(model: Path, out: Path, config_path: Path | None, device: str, **given: Any) -> None:
    """The speech server: requests/s, first sound, p50 and p95 against concurrency, beside speak in a loop."""
    with explained():
        from shards.config import read_config
        from tools.bench.serve import Settings, bench
        from tools.inference import known_device
        from tools.speaker import SpeakConfig, load_speaker

        speaker = load_speaker(model, None, read_config(SpeakConfig, config_path, ()), known_device(device))
        bench(speaker, Settings(**{**given, "concurrency": list(given["concurrency"])}), out)


@main.command("summary", context_settings={"show_default": True})
@click.option("--out", default="out/bench-summary.json", type=FileToWrite(), help="The JSON file.")
@click.option("--rows", default=1_000_000, type=click.IntRange(min=1), help="Samples of the generated data set.")
@click.option("--rounds", default=3, type=click.IntRange(min=1), help="How often it is run.")
def summary_command(out: Path, rows: int, rounds: int) -> None:
    """How long `inspect-shards summary` takes, process start included."""
    from tools.bench.summary import bench

    with explained():
        bench(rows, rounds, out)


if __name__ == "__main__":
    main()
