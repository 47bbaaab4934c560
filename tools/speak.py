"""`speak MODEL`: a reference voice and a text in, a wav file out.

MODEL is a merged folder (`checkpoints merge`), or a base model with `--adapter`. The prompt is built by the same
sequence builder as in training, with the settings that the merged folder (`higgs_voice.json`) or the adapter's checkpoint
(`config.toml`) remembers. A merged folder is not spoken with a codec other than the one it was trained with.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

from shards.config import read_config
from shards.terminal import FileToWrite, explained, print_json, print_line
from tools.speaker import SpeakConfig, load_speaker


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--reference", required=True, type=click.Path(path_type=Path), help="Audio file of the voice, 3-15 s.")
@click.option("--reference-text", required=True, help="What is said in it, exactly.")
@click.option("--text", required=True, help="What to say.")
@click.option("--out", default="speech.wav", type=FileToWrite(), help="The wav file to write, 24 kHz.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A checkpoint's adapter folder, when MODEL is a base.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Default: ./pipeline.toml if it exists.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the configuration.")
@click.option("--greedy", is_flag=True, help="Always the likeliest code; same input, same output.")
@click.option("--temperature", default=1.0, help="Sampling temperature.")
@click.option("--top-k", default=50, help="Sample among the k likeliest codes; 0 = all.")
@click.option("--top-p", default=0.95, help="Sample among the likeliest codes that make up this probability.")
@click.option("--ras-window", default=7, help="Columns checked for repetition; 0 = off.")
@click.option("--ras-max-repeats", default=2, help="Redraw a code seen this often in the window.")
@click.option("--seed", default=0, help="Of sampling.")
@click.option("--max-seconds", default=30.0, help="Stop here if the model does not end by itself.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--codes", "codes_path", type=FileToWrite(), help="Also write the codes [8, T] as .npy.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON on stdout.")
def main(
    model: Path,
    reference: Path,
    reference_text: str,
    text: str,
    out: Path,
    adapter: Path | None,
    config_path: Path | None,
    overrides: tuple[str, ...],
    greedy: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    ras_window: int,
    ras_max_repeats: int,
    seed: int,
    max_seconds: float,
    device: str,
    codes_path: Path | None,
    as_json: bool,
) -> None:
    """Say TEXT in the voice of REFERENCE with MODEL."""
    with explained():
        config = read_config(SpeakConfig, config_path, overrides)
        from shards.encoders.codec import write_wave
        from shards.sequence import FRAMES_PER_SECOND, SAMPLE_RATE
        from train.model.generate import Sampling

        sampling = Sampling(0.0 if greedy else temperature, top_k, top_p, ras_window, ras_max_repeats, seed)
        speaker = load_speaker(model, adapter, config, device)
        started = time.monotonic()
        speech, wave = speaker.say(reference, reference_text, text, round(max_seconds * FRAMES_PER_SECOND), sampling)
        seconds = time.monotonic() - started
        write_wave(out, wave)
        if codes_path:
            np.save(codes_path, speech.codes)
    audio_s = len(wave) / SAMPLE_RATE
    facts = {
        "out": str(out),
        "audio_s": audio_s,
        "frames": speech.codes.shape[1],
        "stopped": speech.stopped,
        "seconds": seconds,
    }
    if as_json:
        print_json(facts)
    ending = "" if speech.stopped else f"; cut at --max-seconds {max_seconds:g}, the model did not end by itself"
    print_line(f"{out}: {audio_s:.2f} s of speech in {seconds:.1f} s{ending}")


if __name__ == "__main__":
    main()
