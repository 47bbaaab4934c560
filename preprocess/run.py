"""MAIN PATH of stage one: a ChatML list and its audio in, a finished data set of shards out.

A killed job is continued by the same command and ends with the same bytes: shards are independent, and only their done
markers count.
"""

from __future__ import annotations

import shutil
import time

from preprocess.config import PreprocessConfig
from preprocess.join import join_dataset, pending_shards
from preprocess.plan import Request, plan_job
from preprocess.report import Progress, print_summary
from preprocess.workers import run_tasks, usable_cores
from shards.artifacts import codec_fingerprint, mel_fingerprint, resolve, tokenizer_fingerprint
from shards.manifest import Dataset, Fingerprints


def preprocess(request: Request, config: PreprocessConfig) -> Dataset:
    """Run or continue the job. Raises PipelineError."""
    started = time.monotonic()

    # 1. What makes the features: tokenizer, codec, mel recipe, each with its fingerprint.
    model_dir = resolve(config.model.base, config.model.revision, "model.base")
    codec_dir = resolve(config.model.codec, config.model.codec_revision, "model.codec")
    fingerprints = Fingerprints(
        codec=codec_fingerprint(codec_dir),
        tokenizer=tokenizer_fingerprint(model_dir),
        mel=mel_fingerprint() if config.features.whisper == "mel" else None,
    )

    # 2. The plan: read the list once, shuffle, cut into shards; or recognise the job that stands in OUT.
    job = plan_job(request, config, fingerprints)

    # 3. The shards that are not there yet, on all cores.
    from preprocess.shard_task import ShardTask, TaskSetup

    pending = pending_shards(request.out, job)
    setup = TaskSetup(config, str(request.out), str(model_dir), str(codec_dir), "cpu")
    progress = Progress(job.num_shards, job.num_shards - len(pending))
    try:
        for result in run_tasks(pending, config.preprocess.workers or usable_cores(), ShardTask, setup):
            progress.add(result)
    finally:
        progress.close()

    # 4. The data set: one index, one list of rejects, dataset.json last.
    dataset = join_dataset(request.out, job, config.preprocess.max_reject_fraction)
    shutil.rmtree(request.out / "encoded", ignore_errors=True)

    # 5. What happened.
    print_summary(dataset, request.out, progress, time.monotonic() - started)
    return dataset
