"""`checkpoints quantize MODEL OUT --int8|--int4`: the command; the work is done in `quantize.py`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shards.terminal import explained, print_json, print_line, print_table

if TYPE_CHECKING:
    from tools.checkpoints.quantize import Report
    from tools.checkpoints.quantize_effect import Effect


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--int8", is_flag=True, help="8 bits, a scale per row: hardly to be told from the whole.")
@click.option("--int4", is_flag=True, help="4 bits, a scale per 32 weights: smaller, and worse.")
@click.option("--data", type=click.Path(path_type=Path), help="Measure on a data set's held-out part, or a RUN's.")
@click.option("--samples", default=16, show_default=True, type=click.IntRange(1), help="How many of them.")
@click.option("--seed", default=0, show_default=True, help="Of the sampled speech; sample k takes seed + k.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="Default: the RUN's, or ./pipeline.toml."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout.")
def quantize(
    model: Path,
    out: Path,
    int8: bool,
    int4: bool,
    data: Path | None,
    samples: int,
    seed: int,
    device: str,
    config_path: Path | None,
    as_json: bool,
) -> None:
    """Write MODEL (a merged or base model's folder) with its decoder's linear layers in few bits into OUT.

    Everything else keeps its dtype. OUT/quantize.json holds what it changed; `speak` and `evaluate` load OUT.
    """
    if int8 == int4:
        raise click.UsageError("give one of --int8 and --int4")
    with explained():
        from shards.artifacts import resolve
        from tools.checkpoints.quantize import import_torchao, quantize_model
        from tools.checkpoints.quantize_effect import read_held_out
        from tools.evaluate.cli import chosen_device
        from tools.evaluate.systems import read_evaluate_config

        import_torchao()
        folder = resolve(str(model), "", "MODEL")
        found = None
        if data:
            config = read_evaluate_config(config_path, (), (data,))
            found = read_held_out(data, folder, config, samples, seed)
        report = quantize_model(folder, out, 8 if int8 else 4, found, chosen_device(device), print_line, str(model))
    if as_json:
        print_json(to_builtins(report), indent=1)
    show(report)
    print_line(f"next: speak {shlex.quote(str(out))} --reference WAV --reference-text TEXT --text TEXT")


def to_builtins(report: Report) -> object:
    import msgspec

    return msgspec.to_builtins(report)


def show(report: Report) -> None:
    """The table for a person, on stderr."""
    print_table(
        [(name, f"{snr_db:.1f}") for name, snr_db in report.snr_db_of_groups.items()],
        headings=("layers", "lowest SNR, dB"),
    )
    linears = report.linears_bytes_before / report.linears_bytes_after
    print_line(
        f"{report.bits} bits: {megabytes(report.bytes_before)} -> {megabytes(report.bytes_after)} ({report.factor:.2f} times "
        f"smaller; the {len(report.snr_db)} quantized layers alone {linears:.2f} times); logits of a seeded input change by "
        f"{report.probe_logits_change:.2%}"
    )
    if report.effect:
        print_line(in_words(report.effect))
    for line in report.not_measured:
        print_line(f"not measured: {line}")
    if report.bits == 4:
        print_line(
            f"warning: 4 bits change what is said: {cost_of_4_bits(report)}; listen before you use it, or take --int8"
        )
    effect = report.effect
    if effect and effect.quantized.sampled_not_ended + effect.quantized.greedy_not_ended > (
        effect.whole.sampled_not_ended + effect.whole.greedy_not_ended
    ):
        print_line("warning: more speech runs on without an end than before")


def in_words(effect: Effect) -> str:
    whole, few = effect.whole, effect.quantized
    return (
        f"{effect.samples} samples ({effect.source}): audio loss {whole.audio_loss:.4f} -> {few.audio_loss:.4f} "
        f"({effect.audio_loss_difference:+.4f}), KL of logits {effect.logits_kl:.2g}, likeliest code the same in "
        f"{effect.same_likeliest_code:.1%}, greedy frames in {effect.same_greedy_frames:.1%}; did not end: greedy "
        f"{whole.greedy_not_ended} -> {few.greedy_not_ended}, sampled {whole.sampled_not_ended} -> {few.sampled_not_ended} "
        f"({whole.not_ended_rate:.0%} -> {few.not_ended_rate:.0%} of all speech)"
    )


def cost_of_4_bits(report: Report) -> str:
    snr_db = min(report.snr_db_of_groups.values())
    if report.effect is None:
        return (
            f"SNR down to {snr_db:.1f} dB, logits off by {report.probe_logits_change:.1%}, speech not measured (--data)"
        )
    effect = report.effect
    return (
        f"SNR down to {snr_db:.1f} dB, audio loss {effect.audio_loss_difference:+.4f}, another likeliest code in "
        f"{1 - effect.same_likeliest_code:.1%}, {effect.quantized.not_ended_rate:.0%} of speech does not end "
        f"(whole: {effect.whole.not_ended_rate:.0%})"
    )


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
