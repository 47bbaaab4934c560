"""`speak MODEL`: a voice and a text in, sound files out; the command line of `tools.inference`.

MODEL is a merged folder (`checkpoints merge`), or a base model with `--adapter`. Prompts are built and texts cleaned as in
training, with the settings that the merged folder (`higgs_voice.json`) or the adapter's checkpoint (`config.toml`)
remembers. What can be wrong in the command is found before the model is loaded.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.errors import ConfigError, DataError
from shards.printable import first_line
from shards.terminal import FileToWrite, explained, print_json, print_line

if TYPE_CHECKING:
    import numpy as np

    from tools.inference import HiggsAudioInference
    from tools.speaker import SpeakConfig
    from tools.speech_request import GeneratedSpeech, SpeechRequest

MAX_TEXT_BYTES = 16 << 20


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--reference", "references", multiple=True, help="Audio file of the voice, 3-15 s; repeat it for several."
)
@click.option(
    "--reference-text", "reference_texts", multiple=True, help="What is said in it, exactly; repeat it as well."
)
@click.option("--text", "texts", multiple=True, help="What to say; repeat it for several files.")
@click.option("--text-file", type=click.Path(path_type=Path), help="A UTF-8 file with what to say.")
@click.option("--lines", is_flag=True, help="Each line of --text-file is a text of its own.")
@click.option("--out", default="speech.wav", type=FileToWrite(), help="wav, flac, mp3 or ogg, 24 kHz.")
@click.option("--stream", is_flag=True, help="Write a wav to stdout while it is spoken, instead of --out.")
@click.option(
    "--first-chunk", type=int, help="With --stream: begin after so many frames of 40 ms, 2 or more, not 1.28 s."
)
@click.option("--play-codes", type=click.Path(path_type=Path), help="Only decode these codes [8, T], an .npy file.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A checkpoint's adapter folder, when MODEL is a base.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Default: ./pipeline.toml if it exists.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the configuration.")
@click.option("--greedy", is_flag=True, help="Always the likeliest code; same input, same output.")
@click.option("--temperature", default=1.0, help="Sampling temperature; 0 is --greedy.")
@click.option("--top-k", default=50, help="Sample among the k likeliest codes; 0 = all.")
@click.option("--top-p", default=0.95, help="Sample among the likeliest codes that make up this probability.")
@click.option("--ras-window", default=7, help="Columns checked for repetition; 0 = off.")
@click.option("--ras-max-repeats", default=2, help="Redraw a code seen this often in the window.")
@click.option("--seed", default=0, help="Of sampling.")
@click.option("--max-seconds", type=float, help="Of a text, in all.  [default: what the text can last at most]")
@click.option("--part-chars", default=250, help="A longer text is split at its sentences.")
@click.option("--slots", default=4, help="Texts spoken at once, when there are several.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--cuda-graphs", is_flag=True, help="On a GPU: replay blocks of columns as CUDA graphs; the same codes.")
@click.option("--codes", "codes_path", type=FileToWrite(), help="Also write the codes [8, T] as .npy.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON on stdout, one line a file.")
def main(model: Path, config_path: Path | None, overrides: tuple[str, ...], **given: Any) -> None:
    """Say TEXT in the voice of REFERENCE with MODEL."""
    with explained():
        try:
            from shards.config import read_config
            from tools.audio_output import check_out
            from tools.speaker import SpeakConfig

            check_out(given["out"])
            check_together(given)
            config = read_config(SpeakConfig, config_path, overrides)
            requests = [] if given["play_codes"] else make_requests(given)
            check_overwritten(given, max(1, len(requests)))
        except ConfigError as error:  # of the command's own values
            print_line(f"error: {error}")
            sys.exit(2)
        if given["play_codes"]:
            play_codes(model, config, given)
            return
        voice = load(model, config, given, len(requests))
        if given["stream"]:
            stream(voice, requests[0], given["first_chunk"])
        else:
            speak(voice, requests, given)


def check_together(given: dict[str, Any]) -> None:
    """Raises ConfigError for options that do not go together, naming them."""
    if given["play_codes"]:
        other = next((name for name in ("references", "texts", "text_file", "stream") if given[name]), None)
        if other:
            raise ConfigError(
                "--play-codes decodes what is there: without --reference, --text, --text-file and --stream"
            )
        return
    if not given["references"]:
        raise ConfigError("--reference is missing: an audio file of the voice")
    if not given["texts"] and not given["text_file"]:
        raise ConfigError("--text or --text-file is missing: what to say")
    if given["lines"] and not given["text_file"]:
        raise ConfigError("--lines says how to read --text-file, which is missing")
    if len(given["reference_texts"]) not in (0, len(given["references"])):
        counts = f"{len(given['reference_texts'])} --reference-text for {len(given['references'])} --reference"
        raise ConfigError(f"{counts}: give one for each, in the same order, or none")
    if given["slots"] < 1:
        raise ConfigError(f"--slots {given['slots']}: expected 1 or more")
    if given["first_chunk"] is not None and not (given["stream"] and given["first_chunk"] >= 2):
        raise ConfigError(f"--first-chunk {given['first_chunk']}: expected 2 or more (frames of 40 ms), and --stream")
    if given["stream"] and (given["as_json"] or given["codes_path"]):
        raise ConfigError("--stream takes stdout for sound: without --json and --codes")
    if given["stream"] and sys.stdout.isatty():
        raise ConfigError(
            "--stream writes sound to stdout, which is a terminal; pipe it: speak ... --stream | ffplay -"
        )


def check_overwritten(given: dict[str, Any], count: int) -> None:
    """Raises ConfigError where a file to be written is one that is read, or is written already."""
    from tools.audio_output import numbered

    sources = (*given["references"], given["text_file"], given["play_codes"])
    taken = {Path(name).resolve(): "this command reads it" for name in sources if name}
    outs = [path for path in (None if given["stream"] else given["out"], given["codes_path"]) if path]
    for path in [numbered(one, number, count) for one in outs for number in range(1, count + 1)]:
        if path.resolve() in taken:
            raise ConfigError(f"{path}: {taken[path.resolve()]}; give another --out or --codes")
        taken[path.resolve()] = "it would be written twice"


def make_requests(given: dict[str, Any]) -> list[SpeechRequest]:
    """One for each text, all checked. Raises ConfigError, and DataError for what files hold."""
    from preprocess.text import TextSection
    from tools.prompt_text import prompt_text
    from tools.reference import read_recordings
    from tools.speech_request import SpeechRequest

    texts = list(given["texts"])
    if given["text_file"]:
        texts += read_texts(given["text_file"], given["lines"])
    if given["stream"] and len(texts) != 1:
        raise ConfigError(f"--stream speaks one text, got {len(texts)}")
    settings = {
        "temperature": 0.0 if given["greedy"] else given["temperature"],
        "top_p": given["top_p"],
        "top_k": given["top_k"],
        "ras_win_len": given["ras_window"],
        "ras_win_max_num_repeat": given["ras_max_repeats"],
        "seed": given["seed"],
        "max_seconds": given["max_seconds"],
        "part_chars": given["part_chars"],
        "reference_text": " ".join(given["reference_texts"]) if given["reference_texts"] else None,
    }
    SpeechRequest(reference_audio=None, target_text="", **settings)  # numbers first: they cost nothing
    for number, text in enumerate(texts):
        prompt_text(text, TextSection(), f"text {number + 1}" if len(texts) > 1 else "--text")
    for text in given["reference_texts"]:
        prompt_text(text, TextSection(), "--reference-text")
    recordings = read_recordings(list(given["references"]))
    return [SpeechRequest(reference_audio=recordings, target_text=text, **settings) for text in texts]


def read_texts(path: Path, lines: bool) -> list[str]:
    """The text of a file, or those of its lines that are not blank. Raises DataError."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise DataError(f"--text-file {path}: more than {MAX_TEXT_BYTES >> 20} MB; is it a text?")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--text-file {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    texts = [line for line in text.split("\n") if line.strip()] if lines else [text]  # \r\n is read as \n
    if not texts or not text.strip():
        raise DataError(f"--text-file {path}: holds no text")
    return texts


def load(model: Path, config: SpeakConfig, given: dict[str, Any], num_texts: int) -> HiggsAudioInference:
    from tools.inference import HiggsAudioInference, known_device
    from tools.speaker import load_speaker

    speaker = load_speaker(model, given["adapter"], config, known_device(given["device"]))
    return HiggsAudioInference.of(speaker, min(given["slots"], num_texts), given["cuda_graphs"])


def speak(voice: HiggsAudioInference, requests: list[SpeechRequest], given: dict[str, Any]) -> None:
    """All texts to files, as many at once as there are slots."""
    from tools.audio_output import numbered

    size = len(voice.engine)
    for start in range(0, len(requests), size):
        started = time.monotonic()
        spoken = voice.generate_batch(requests[start : start + size])
        seconds = time.monotonic() - started
        for number, speech in enumerate(spoken, start + 1):
            write(numbered(given["out"], number, len(requests)), speech, seconds, given, number, len(requests))


def write(
    path: Path, speech: GeneratedSpeech, seconds: float, given: dict[str, Any], number: int = 1, count: int = 1
) -> None:
    """One file, its codes if asked, and a line about it; `seconds`: what making it and its neighbours took."""
    from tools.audio_output import numbered, write_audio

    num_clipped = write_audio(path, speech.waveform, speech.sample_rate)
    if given["codes_path"]:
        write_codes(numbered(given["codes_path"], number, count), speech.codes)
    audio_s = len(speech.waveform) / speech.sample_rate
    facts = {
        "out": str(path),
        "audio_s": audio_s,
        "frames": speech.codes.shape[1],
        "parts": len(speech.parts),
        "stopped": speech.stop_reason == "end",
        "stop_reason": speech.stop_reason,
        "clipped_samples": num_clipped,
        "seconds": seconds,
    }
    if given["as_json"]:
        print_json(facts)
    ending = "" if speech.stop_reason == "end" else f"; the model did not end by itself: {speech.stop_reason}"
    clipped = f"; {num_clipped} samples louder than full scale were clipped" if num_clipped else ""
    print_line(f"{path}: {audio_s:.2f} s of speech in {seconds:.1f} s{ending}{clipped}")


def write_codes(path: Path, codes: np.ndarray) -> None:
    from shards.sample import write_npy
    from shards.writer import write_bytes

    write_bytes(path, write_npy(codes))


def stream(voice: HiggsAudioInference, request: SpeechRequest, first_chunk: int | None = None) -> None:
    """A wav to stdout, piece by piece."""
    from tools.audio_output import pcm16, stream_header

    out = sys.stdout.buffer
    out.write(stream_header(voice.sample_rate))
    out.flush()
    for wave in voice.stream_request(request, first_chunk):
        out.write(pcm16(wave))
        out.flush()


def play_codes(model: Path, config: SpeakConfig, given: dict[str, Any]) -> None:
    """Decode a file of codes with the model's codec; the model itself is not loaded."""

    from shards.encoders.codec import load_codec
    from shards.npy_file import load_npy
    from tools.inference import checked_codes, decoded, known_device
    from tools.speaker import find_codec

    path = given["play_codes"]
    try:
        codes = checked_codes(load_npy(path))
    except OSError:
        raise
    except Exception as error:  # numpy has many kinds for a file that is not its own, TokenError and MemoryError too
        raise DataError(f"--play-codes {path}: not an .npy file of codes: {first_line(error)}") from None
    started = time.monotonic()
    device = known_device(given["device"])
    codec = load_codec(find_codec(model.expanduser(), config), "cpu" if device == "auto" else device)
    write(given["out"], decoded(codec, codes), time.monotonic() - started, given)


if __name__ == "__main__":
    main()
