"""The `preprocess` command: parse, read the configuration, run, turn faults into one line.

`preprocess DATA OUT` is the job itself; `finalize`, `convert` and `slice` are its companions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from shards.terminal import FileToWrite, ends_on_signals, explained, print_json, print_line

CONTINUES = "the same command continues this job"
PATH = click.Path(path_type=Path)


class JobByDefault(click.Group):
    """`preprocess DATA OUT` needs no word in between: what is no subcommand is the job."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(self.commands["run"].get_help(ctx))


class JobContext(click.Context):
    """Usage and mistakes name what a user types: `preprocess`, without the word in between."""

    @property
    def command_path(self) -> str:
        return self.parent.command_path if self.parent else super().command_path


class Job(click.Command):
    context_class = JobContext


@click.group(cls=JobByDefault, add_help_option=False)
def main() -> None:
    """Stage one."""


@main.command("run", cls=Job, context_settings={"show_default": True}, options_metavar="[OPTIONS]")
@click.argument("data", type=PATH)
@click.argument("out", type=PATH)
@click.option("--config", "config_path", type=PATH, help="Default: ./pipeline.toml if it exists.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. preprocess.seed=1.")
@click.option("--workers", type=click.IntRange(min=1), help="Sets preprocess.workers; default one per usable core.")
@click.option("--validate-only", is_flag=True, help="Check list, texts and audio; write OUT/report.json; no features.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first N rows of the list.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    help="Where the codec runs; cuda = all GPUs. In float32 unless preprocess.codec_precision says otherwise.",
)
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help="Who makes the shards.")
@click.option("--ray-address", help="A running Ray cluster, e.g. auto; default: Ray on this machine.")
@click.option(
    "--task-index", type=click.IntRange(min=0), envvar="SLURM_ARRAY_TASK_ID", help="This machine of an array."
)
@click.option("--num-tasks", type=click.IntRange(min=1), envvar="SLURM_ARRAY_TASK_COUNT", help="Machines of the array.")
@click.option("--new-job", is_flag=True, help="Delete the job that stands in OUT and start over.")
@click.option("--json", "as_json", is_flag=True, help="Print dataset.json (or report.json) on stdout when done.")
def run_command(
    config_path: Path | None,
    overrides: tuple[str, ...],
    workers: int | None,
    validate_only: bool,
    as_json: bool,
    task_index: int | None,
    num_tasks: int | None,
    **request: Any,
) -> None:
    """Turn DATA, a ChatML list (.json or .jsonl, also .gz or .zst), and its audio into shards in OUT.

    Audio paths are used as they stand in the list: absolute, or relative to the folder the command runs in. Run the same
    command again to continue a job that was killed.

    Also: `preprocess finalize OUT` joins what an array of machines made; `preprocess convert KIND SOURCE LIST` makes a
    ChatML list from other projects' data sets; `preprocess slice FOLDER LIST` cuts raw recordings into clips.
    """
    if (task_index is None) != (num_tasks is None) or (task_index or 0) >= (num_tasks or 1):
        raise click.UsageError("--task-index I and --num-tasks N belong together, with I from 0 to N - 1")
    if request["engine"] == "ray" and request["device"] == "cuda":
        raise click.UsageError("--engine ray encodes on CPU cores only; --device cuda needs --engine local")
    with explained(CONTINUES), ends_on_signals():
        from preprocess.config import PreprocessConfig
        from preprocess.plan import Request
        from shards.config import read_config

        flags = [f"preprocess.workers={workers}"] if workers else []
        config = read_config(PreprocessConfig, config_path, [*overrides, *flags])
        asked = Request(task_index=task_index or 0, num_tasks=num_tasks or 1, **request)
        if validate_only:
            from preprocess.validate import validate

            validate(asked, config)
        else:
            from preprocess.run import preprocess

            preprocess(asked, config)
    written = asked.out / ("report.json" if validate_only else "dataset.json")
    if as_json and written.is_file():
        print_json(json.loads(written.read_bytes()), indent=1)


@main.command("finalize")
@click.argument("out", type=PATH)
@click.option(
    "--max-reject-fraction",
    type=click.FloatRange(0.0, 1.0),
    metavar="X",
    help="Accept rejects up to this share of the rows, whatever the job's own limit is.",
)
def finalize_command(out: Path, max_reject_fraction: float | None) -> None:
    """Check every shard in OUT and write dataset.json, after the last task of an array has ended."""
    with explained(CONTINUES), ends_on_signals():
        from preprocess.join import finalize
        from preprocess.report import print_summary

        print_summary(finalize(out, max_reject_fraction), out, None, 0.0)


@main.command("convert")
@click.argument(
    "kind", type=click.Choice(["metadata", "csv", "folder", "ljspeech", "commonvoice", "kaldi", "lhotse", "hf"])
)
@click.argument("source", type=PATH)
@click.argument("chatml", type=FileToWrite())
@click.option("--seed", default=0, show_default=True, help="Of drawing references.")
@click.option("--speaker", help="Who speaks all clips, where SOURCE names no speakers.")
@click.option("--speaker-from-folder", is_flag=True, help="A folder per speaker, where SOURCE names no speakers.")
@click.option("--split", help="Of hf: which one, where there are several.")
@click.option("--text-column", help="Of hf, where its name is not text, sentence, transcription or transcript.")
@click.option("--speaker-column", help="Of hf, where its name is not speaker, speaker_id or client_id.")
@click.option(
    "--audio-folder", type=PATH, help="Of hf: for audio inside the table; default: CHATML without its ending."
)
def convert_command(
    kind: str,
    source: Path,
    chatml: Path,
    seed: int,
    speaker: str | None,
    speaker_from_folder: bool,
    audio_folder: Path | None,
    **columns: Any,
) -> None:
    """Write the list CHATML (.json or .jsonl) from SOURCE, another project's data set."""
    if speaker and speaker_from_folder:
        raise click.UsageError("--speaker and --speaker-from-folder exclude each other")
    if kind != "hf" and (audio_folder or any(columns.values())):
        raise click.UsageError("--split, --text-column, --speaker-column and --audio-folder are of hf alone")
    if kind == "hf" and speaker_from_folder:
        raise click.UsageError("--speaker-from-folder: a table has no folders; give --speaker or --speaker-column")
    place = audio_folder or chatml.with_suffix("")
    if place == chatml:
        raise click.UsageError(f"{chatml}: give the list a name that ends in .jsonl or .json, or --audio-folder")
    with explained(CONTINUES if kind == "hf" else ""), ends_on_signals():
        from preprocess.convert import convert, convert_hugging_face
        from preprocess.convert_hugging_face import HuggingFaceSource

        if kind == "hf":
            made = convert_hugging_face(HuggingFaceSource(source, place, **columns), chatml, seed, speaker)
        else:
            made = convert(kind, source, chatml, seed, speaker, speaker_from_folder)
        print_line(f"{chatml}: {made.num_rows} rows of {made.num_speakers} speakers")
        if made.ignored_columns:
            print_line(f"not used: {', '.join(made.ignored_columns)}")
        for lacking, count in sorted(made.skipped_rows.items()):
            print_line(f"skipped: {count} rows without {lacking}")
        if made.lonely_clips:
            first = made.lonely_clips[0]
            print_line(f"skipped: {len(made.lonely_clips)} clips whose speaker has no other clip; first {first}")


@main.command("slice", context_settings={"show_default": True})
@click.argument("folder", type=PATH)
@click.argument("chatml", type=FileToWrite())
@click.option("--pieces", type=PATH, help="Folder of the FLAC pieces; default: CHATML without its ending.")
@click.option("--min-s", type=click.FloatRange(0.5, 30.0), default=3.0, help="Shortest piece.")
@click.option("--max-s", type=click.FloatRange(1.0, 30.0), default=15.0, help="Longest piece.")
@click.option(
    "--min-pause", type=click.FloatRange(0.2, 5.0), default=0.3, help="Shortest pause that is cut at, seconds."
)
@click.option("--without-text", is_flag=True, help="Leave the texts empty, for somebody else's recognizer.")
@click.option(
    "--speakers",
    type=click.Choice(["folder", "rttm", "rttm-names"]),
    default="folder",
    help="Who speaks: the folder's name, or x.rttm beside x.wav, whose names count in their recording (rttm) or in all.",
)
@click.option(
    "--asr", metavar="NAME", help="faster-whisper:FOLDER writes the texts of recordings without a transcript."
)
@click.option("--language", default="ar", help="Of --asr.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Of --asr.")
@click.option("--min-log-probability", default=-1.0, help="Of the recognizer's tokens, on average; below: skipped.")
@click.option("--max-no-speech", type=click.FloatRange(0.0, 1.0), default=0.6, help="No-speech probability.")
@click.option("--max-compression", default=2.4, help="Of the recognizer's text by zlib; above: it repeats itself.")
@click.option("--seed", default=0, help="Of drawing references.")
def slice_command(
    folder: Path,
    chatml: Path,
    pieces: Path | None,
    min_s: float,
    max_s: float,
    min_pause: float,
    without_text: bool,
    speakers: Any,
    asr: str | None,
    language: str,
    device: str,
    min_log_probability: float,
    max_no_speech: float,
    max_compression: float,
    seed: int,
) -> None:
    """Cut the recordings in FOLDER, in a folder per speaker, at pauses into clips and write the list CHATML."""
    if 2 * min_s > max_s:
        raise click.UsageError(
            f"--max-s {max_s:g} must be at least twice --min-s {min_s:g}, or pauses cannot be chosen"
        )
    if asr and without_text:
        raise click.UsageError("--asr and --without-text exclude each other")
    with explained(CONTINUES), ends_on_signals():
        from preprocess.slicing.cutting import CutRules
        from preprocess.slicing.recognition import HearingLimits, load_recognizer
        from preprocess.slicing.run import SliceRequest, slice_folder

        rules = CutRules(min_s, max_s, min_pause)
        place = pieces or chatml.with_suffix("")
        if place == chatml:
            raise click.UsageError(f"{chatml}: give the list a name that ends in .jsonl or .json, or --pieces FOLDER")
        limits = HearingLimits(min_log_probability, max_no_speech, max_compression)
        request = SliceRequest(
            source=folder,
            out=chatml,
            pieces=place,
            rules=rules,
            without_text=without_text,
            speakers=speakers,
            limits=limits,
            seed=seed,
        )
        slice_folder(request, load_recognizer(asr, language, device) if asr else None)


if __name__ == "__main__":
    main()
