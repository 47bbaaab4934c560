"""MAIN PATH of stage one: a ChatML list and its audio in, a finished data set of shards out.

A killed job is continued by the same command and ends with the same bytes: shards are independent, and only their done
markers count. Who makes them (processes here, GPUs, an array of machines, Ray) does not change a byte.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator

from preprocess.codec_server import CodecServers, cuda_devices
from preprocess.config import PreprocessConfig
from preprocess.join import join_dataset, pending_shards
from preprocess.plan import Request, hold_out, identify_job, plan_job
from preprocess.report import Progress, print_share, print_summary
from preprocess.shard_task import ShardTask, TaskResult, TaskSetup
from preprocess.sources import read_rows
from preprocess.workers import run_tasks, usable_cores
from shards.artifacts import codec_fingerprint, mel_fingerprint, resolve, tokenizer_fingerprint, whisper_fingerprint
from shards.encoders.codec import codec_layout
from shards.manifest import Dataset, Fingerprints


def preprocess(request: Request, config: PreprocessConfig) -> Dataset | None:
    """Run or continue the job; None when other machines still have shards to make. Raises PipelineError."""
    started = time.monotonic()
    next(read_rows(request.data))  # a mistyped or empty list is answered before models are looked for

    # 1. What makes the features: tokenizer, codec, mel recipe, each with its fingerprint.
    model_dir = resolve(config.model.base, config.model.revision, "model.base")
    codec_dir = resolve(config.model.codec, config.model.codec_revision, "model.codec")
    codec_layout(codec_dir)  # before the job is fixed: a wrong folder must not become part of it
    features = config.features
    is_encoder = features.whisper == "encoder"
    whisper_dir = (
        resolve(features.whisper_model, features.whisper_revision, "features.whisper_model") if is_encoder else None
    )
    fingerprints = Fingerprints(
        codec=codec_fingerprint(codec_dir, config.preprocess.codec_precision),
        tokenizer=tokenizer_fingerprint(model_dir),
        mel=mel_fingerprint() if config.features.whisper != "none" else None,
        whisper=whisper_fingerprint(whisper_dir) if whisper_dir else None,
    )

    # 2. OUT is held until the end; the tasks of one array hold it together.
    identity = identify_job(request, config, fingerprints)
    with hold_out(request, identity):
        # 3. The plan: read the list once, shuffle, cut into shards; or recognise the job that stands in OUT.
        job = plan_job(request, config, identity)

        # 4. This machine's shards that are not there yet, on all cores.
        mine = range(request.task_index, job.num_shards, request.num_tasks)
        pending = [shard for shard in pending_shards(request.out, job) if shard in mine]
        setup = TaskSetup(
            config, str(request.out), str(model_dir), str(codec_dir), str(whisper_dir) if whisper_dir else None
        )
        progress = Progress(len(mine), len(mine) - len(pending), config.preprocess.samples_per_shard)
        try:
            for result in make_shards(request, config, setup, pending, progress.row):
                progress.add(result)
        finally:
            progress.close()

        # 5. The data set: one index, one list of rejects, dataset.json last.
        if request.num_tasks > 1:
            print_share(request, len(mine), len(pending_shards(request.out, job)))
            return None
        dataset = join_dataset(request.out, job)
        shutil.rmtree(request.out / "encoded", ignore_errors=True)

    # 6. What happened.
    print_summary(dataset, request.out, progress, time.monotonic() - started)
    return dataset


def make_shards(
    request: Request, config: PreprocessConfig, setup: TaskSetup, pending: list[int], on_row: Callable[[], None]
) -> Iterator[TaskResult]:
    """The shards, by the engine and device asked for, as they come."""
    num_workers = config.preprocess.workers or usable_cores()
    if not pending:
        return
    if request.engine == "ray":
        from preprocess.ray_engine import run_tasks_on_ray

        yield from run_tasks_on_ray(pending, ShardTask, setup, request.ray_address)
    elif request.device == "cuda":
        yield from make_with_codec_servers(cuda_devices(), num_workers, setup, pending, on_row)
    else:
        yield from run_tasks(pending, num_workers, ShardTask, setup, on_row)


def make_with_codec_servers(
    devices: list[str],
    num_workers: int,
    setup: TaskSetup,
    pending: list[int],
    on_row: Callable[[], None] | None = None,
) -> Iterator[TaskResult]:
    """CPU workers decode and make mels; one codec process per device encodes for them."""
    servers = CodecServers(setup.codec_dir, devices, setup.whisper_dir, setup.config.preprocess.codec_precision)
    try:
        with_servers = setup.with_servers(servers.addresses, servers.key)
        yield from run_tasks(pending, num_workers, ShardTask, with_servers, on_row)
    finally:
        servers.close()
