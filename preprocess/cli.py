"""The `preprocess` command: parse, read the configuration, run, turn faults into one line."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command(context_settings={"show_default": True})
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="Default: ./pipeline.toml if it exists.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. preprocess.seed=1.")
@click.option("--workers", type=click.IntRange(min=1), help="Sets preprocess.workers; default one per usable core.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first N rows of the list.")
@click.option("--new-job", is_flag=True, help="Delete the job that stands in OUT and start over.")
@click.option("--json", "as_json", is_flag=True, help="Print dataset.json on stdout when done.")
def main(
    data: Path,
    out: Path,
    config_path: Path | None,
    overrides: tuple[str, ...],
    workers: int | None,
    limit: int | None,
    new_job: bool,
    as_json: bool,
) -> None:
    """Turn DATA, a ChatML list (.json or .jsonl, also .gz or .zst), and its audio into shards in OUT.

    Audio paths are used as they stand in the list: absolute, or relative to the folder the command runs in. Run the same
    command again to continue a job that was killed.
    """
    from preprocess.config import PreprocessConfig
    from preprocess.plan import Request
    from preprocess.run import preprocess
    from shards.config import read_config
    from shards.errors import PipelineError

    flags = [f"preprocess.workers={workers}"] if workers else []
    try:
        config = read_config(PreprocessConfig, config_path, [*overrides, *flags])
        preprocess(Request(data, out, limit, new_job), config)
    except PipelineError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("interrupted; the same command continues this job", err=True)
        sys.exit(130)
    if as_json:
        click.echo((out / "dataset.json").read_text(encoding="utf-8"), nl=False)


if __name__ == "__main__":
    main()
