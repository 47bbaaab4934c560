"""`evaluate MODEL DATA OUT`: real recordings, base model, tuned model and strangers side by side, with intervals.

In: a model (or several), what to say in whose voice, a folder. Out: OUT/results.json, OUT/report.html and every wave. The
question it answers: is the tuned model better than the base, for whom, and how sure are we. `evaluate --only-score FOLDER
DATA OUT` does the same for waves that another system has made. Exit status 1 where a --fail-if condition holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from shards.errors import ConfigError
from shards.printable import printable
from shards.terminal import explained, print_json, print_line, print_table
from tools.evaluate.conditions import broken, parse_condition
from tools.evaluate.mos import KNOWN, check_predictor
from tools.evaluate.perturb import parse_perturbations
from tools.evaluate.request import Request
from train.evaluation.recognizers import check_recognizer
from train.evaluation.speaker_encoders import check_encoder

NUM_DRAWS = 3  # of sampling: one draw of a model that was not changed differs from the next by a point or two


@click.command(context_settings={"show_default": True})
@click.argument("paths", nargs=-1, required=True, metavar="[MODEL]... DATA OUT", type=click.Path(path_type=Path))
@click.option(
    "--only-score", multiple=True, metavar="[NAME=]FOLDER", help="Score these waves too, named like the items."
)
@click.option("--data-only", is_flag=True, help="Score the recordings of DATA themselves, before any training.")
@click.option(
    "--base/--no-base", "with_base", default=None, help="Evaluate model.base as well.  [default: with a MODEL]"
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    help="How often every item is said, each with another seed.  [default: 3, and 1 with --greedy]",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first items.")
@click.option(
    "--similarity",
    multiple=True,
    metavar="NAME",
    help="Speaker encoder: resemblyzer, ovfl, wavlm:FOLDER or none; may be repeated.  [default: resemblyzer and ovfl]",
)
@click.option("--asr", default="none", metavar="NAME", help="faster-whisper:FOLDER, whisper:FOLDER or none.")
@click.option(
    "--mos",
    multiple=True,
    metavar="NAME",
    help="MOS predictor: dnsmos, distillmos or none, as a difference to the recordings; may be repeated.  [default: both]",
)
@click.option(
    "--perturb",
    multiple=True,
    metavar="NAMES",
    help="Say all once more with worse references, as in noise10dB,phone8k,short3s,notext.",
)
@click.option("--language", default="ar", help="Of the texts, for the recognizer.")
@click.option(
    "--train-data",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="SHARDS",
    help="Say what training on these has seen of it; may be repeated.  [default: the data of a RUN]",
)
@click.option("--fail-if", multiple=True, metavar="'cer > 0.1'", help="Exit status 1 if this holds of a tuned model.")
@click.option("--players", default=40, type=click.IntRange(0), help="Items with sound in the report.")
@click.option("--greedy", is_flag=True, help="Always the likeliest code, instead of sampling.")
@click.option("--temperature", default=1.0, type=click.FloatRange(0, 100), help="Sampling temperature.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Of sampling; draw k takes seed + k.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="Default: the run's, or ./pipeline.toml."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the configuration.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON on stdout.")
def main(
    paths: tuple[Path, ...],
    data_only: bool,
    fail_if: tuple[str, ...],
    players: int,
    greedy: bool,
    config_path: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """Say DATA with MODEL (a merged model, a RUN, a checkpoint or an adapter) and score it beside its base model.

    DATA: a data set of `preprocess` or a RUN (held-out speakers), a ChatML list, a seed-tts .lst, a ZipVoice .tsv, a Habibi
    folder.
    """
    refuse_combinations(paths, data_only, fail_if, greedy, asked)
    with usage_errors():
        conditions = [parse_condition(text) for text in fail_if]
        request = request_of(paths, data_only, greedy, asked)
    out = request.out
    with explained(f"what is done stays in {out}; the same command goes on"):
        from tools.evaluate.report import write_report
        from tools.evaluate.run import evaluate
        from tools.evaluate.systems import EvaluateConfig, read_evaluate_config
        from train.model.generate import Sampling

        request = msgspec.structs.replace(request, device=chosen_device(request.device))
        known = EvaluateConfig.__struct_fields__
        mine = [text for text in overrides if not data_only or text.split(".")[0] in known]  # the rest is stage one's
        config = read_evaluate_config(config_path, tuple(mine), (*request.models, request.data))
        if data_only:
            from tools.evaluate import data_check

            found = data_check.check_data(request, config, overrides, config_path)
            if as_json:
                print_json(found)
            data_check.show(found, out)
            return
        results, rows, plan = evaluate(
            request, config, Sampling(0.0 if greedy else asked["temperature"], seed=asked["seed"])
        )
        pages = write_report(out, results, rows, plan, players)
        failures = broken(conditions, results)
    if as_json:
        print_json(results)
    show(results)
    print_line(f"{out}/results.json: the figures; with sound: {', '.join(map(str, pages))}")
    for sentence in failures:
        print_line(f"failed: {sentence}")
    if failures:
        raise SystemExit(1)


# --- what was typed -------------------------------------------------------------------------------------------------


def refuse_combinations(
    paths: tuple[Path, ...], data_only: bool, fail_if: tuple[str, ...], greedy: bool, asked: dict[str, Any]
) -> None:
    """Raises click.UsageError for what does not go together."""
    others = asked["only_score"]
    if greedy and (asked["seeds"] or 1) > 1:
        raise click.UsageError("--greedy says an item the same way each time; leave --seeds out")
    if data_only and (len(paths) != 2 or others or fail_if or asked["perturb"]):
        raise click.UsageError("expected --data-only DATA OUT: no model, no other waves, no --fail-if, no --perturb")
    if math.isnan(asked["temperature"]):
        raise click.UsageError("--temperature nan is no temperature; expected 0 to 100")
    if len(paths) < 2 or (len(paths) < 3 and not (data_only or others or asked["with_base"])):
        raise click.UsageError("expected MODEL DATA OUT, or --only-score FOLDER DATA OUT")
    if paths[-1].exists() and not paths[-1].is_dir():
        raise click.UsageError(
            f"OUT {printable(str(paths[-1]))} is a file; expected a folder, which is made if it is missing"
        )


@contextmanager
def usage_errors() -> Iterator[None]:
    """What is wrong with the words themselves ends with exit status 2, before anything is loaded."""
    try:
        yield
    except ConfigError as error:
        raise click.UsageError(str(error)) from None


def request_of(paths: tuple[Path, ...], data_only: bool, greedy: bool, asked: dict[str, Any]) -> Request:
    """Raises ConfigError for a name that is none; nothing is loaded."""
    *models, data, out = paths
    encoders, mos, with_base = asked["similarity"], asked["mos"], asked["with_base"]
    request = Request(
        data=data,
        out=out,
        models=models,
        wave_folders=[named_folder(text) for text in asked["only_score"]],
        with_base=bool(models) if with_base is None else with_base,
        draws=asked["seeds"] or (1 if greedy else NUM_DRAWS),
        limit=asked["limit"],
        encoders=list(dict.fromkeys(name for name in encoders or ("resemblyzer", "ovfl") if name != "none")),
        asr=asked["asr"],
        mos=[] if data_only else list(dict.fromkeys(name for name in mos or KNOWN if name != "none")),
        perturbations=parse_perturbations(asked["perturb"]),
        language=asked["language"],
        device=asked["device"],
        train_data=list(asked["train_data"]),
    )
    for name in request.encoders:
        check_encoder(name)
    for name in request.mos:
        check_predictor(name)
    check_recognizer(request.asr)
    return request


def named_folder(text: str) -> tuple[str, Path]:
    """NAME=FOLDER, or a folder whose own name serves."""
    name, equals, folder = text.partition("=")
    if equals and not Path(text).is_dir():
        return name, Path(folder)
    return Path(text).absolute().name, Path(text)


def chosen_device(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def show(results: dict[str, Any]) -> None:
    """The table and verdicts for a person, on stderr."""
    encoders = [model["name"] for model in results["models"]["similarity"]]
    headings = ("system", "failures", "CER", "WER", *(f"similarity {name}" for name in encoders), "length")
    rows = []
    for name, scores in results["scores"].items():
        alike = [scores["similarity"][encoder] for encoder in encoders]
        rows.append(
            (
                name,
                f"{scores['failures']['share']:.1%}",
                percent(scores.get("cer", {}).get("strict", {}).get("corpus")),
                percent(scores.get("wer", {}).get("strict", {}).get("corpus")),
                *(similarity_in_words(pair) for pair in alike),
                "-" if scores["duration_ratio"] is None else f"{scores['duration_ratio']:.2f}",
            )
        )
    print_line(results["seen"])
    print_table(rows, headings=headings, width=max(100, 30 * len(headings)))
    for row in results["comparisons"]:
        if (row["second"] == "base" or " +" in row["first"]) and "another" not in row["metric"]:
            print_line(comparison_in_words(row))
    for name, scores in results["scores"].items():
        if changed := scores["changed_texts"]:
            first = changed[0]
            print_line(
                f"{name}: the text of {len(changed)} items did not reach the model as it was asked; the first, {first['item']}: "
                f"asked {first['asked']!r}, its tokens spell {first['reached']!r}"
            )
    for line in results["not_measured"]:
        print_line(f"skipped: {line}")


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def similarity_in_words(pair: dict[str, Any]) -> str:
    way = pair["share_of_the_way"]
    return f"{pair['to_reference']:.3f}" + ("" if way is None else f" ({way:.0%} of the way)")


def comparison_in_words(row: dict[str, Any]) -> str:
    interval = "" if row["low"] is None else f" [{row['low']:+.4f}, {row['high']:+.4f}], P(worse) {row['p_worse']:.3f}"
    return f"{row['metric']}, {row['first']} - {row['second']}: {row['difference']:+.4f}{interval}: {row['words']}"


if __name__ == "__main__":
    main()
