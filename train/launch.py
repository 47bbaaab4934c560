"""Starts one process per GPU from the `train` command, with torch's own launcher; under torchrun or srun it only joins.

The workers run `python -m train` with the same arguments. PYTHONSAFEPATH keeps a `train.py` in the current folder from
being run in place of this package. When a worker fails, the launcher ends the others; what the first one said stands
above, so only its status is reported here.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from shards.errors import ConfigError, PipelineError

STOPPED = 143  # 128 + SIGTERM, as shells report a process ended by it
WELL_ENDED = "HIGGS_VOICE_WELL_ENDED"  # names a file that the first rank makes
# What the launcher passes on to the ranks, who save.
PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")


def is_worker() -> bool:
    """Whether this process was started by torchrun, or joins a Slurm step (`slurm_ranks`)."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a task of a Slurm step with several tasks, one per GPU; {} elsewhere.

    Only srun sets SLURM_STEP_*; a batch script that runs `train` itself is not a task of a step. What is set already, as by
    torchrun, is kept.
    """
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size < 2 or "RANK" in environment:
        return {}
    number = int(environment.get("SLURM_JOB_ID", "0"))
    found = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)).split("(")[0].split(",")[0],
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(20000 + number % 20000),  # jobs that share a node must not meet
    }
    return {name: value for name, value in found.items() if name not in environment}


def allocator_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """For torch's CUDA allocator, before it starts; {} where the user has settings of his own.

    No two packs have tensors of the same sizes. Blocks that can grow are reused for all of them; without, gaps between
    blocks fill a GPU that had room for the heaviest pack when that was measured.
    """
    known = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
    return {} if known & environment.keys() else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: "gpu[003-004,7],cpu1" -> "gpu003"."""
    prefix, bracket, rest = nodes.split(",")[0].partition("[")
    if not bracket:
        return prefix
    numbers, _, suffix = (rest if "]" in rest else nodes.partition("[")[2]).partition("]")
    return prefix + numbers.split(",")[0].split("-")[0] + suffix.split(",")[0]


def num_processes(gpus: int | None, device: str) -> int:
    """How many to start: `--gpus`, or every visible GPU. Raises ConfigError when there are fewer."""
    if device == "cpu" and gpus:
        return gpus  # gloo: for trying out, and for machines without a GPU
    import torch

    visible = torch.cuda.device_count() if device != "cpu" else 0
    if gpus is None:
        return max(1, visible)
    if gpus > visible and not (visible == 0 and device == "auto"):
        raise ConfigError(f"--gpus {gpus}: {visible} are visible here (CUDA_VISIBLE_DEVICES); take fewer")
    return gpus


def launch(num_workers: int, arguments: list[str]) -> None:
    """Run `python -m train ARGUMENTS` in `num_workers` processes. Raises PipelineError when one of them failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_workers)))
    root = str(Path(__file__).resolve().parent.parent)  # importable for the workers also where it is not installed
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the ranks say themselves what is wrong, in one line
    config = LaunchConfig(
        run_id=str(os.getpid()),
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_workers,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        # Slurm's --signal=USR1 reaches the launcher too, and would end it; so it is passed on to the ranks, who save.
        # torch takes SIGHUP over even where nohup has it ignored.
        signals_to_handle=",".join(
            name for name in PASSED_ON if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN
        ),
    )
    folder = tempfile.mkdtemp(prefix="train-")
    os.environ[WELL_ENDED] = str(Path(folder) / "well-ended")
    try:
        elastic_launch(config, sys.executable)("-m", "train", *arguments)
    except SignalException as error:  # it was passed on, and the ranks have ended; how, only a file of theirs says
        message = f"stopped by {error.sigval.name}"
        if Path(os.environ[WELL_ENDED]).exists():
            raise WorkerFailed(message, STOPPED) from None
        raise WorkerFailed(f"{message}, and nothing was saved then; what the ranks said above says why", 1) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"killed by signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
        raise WorkerFailed(f"rank {rank} failed first ({how}); the others were ended", failure.exitcode) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def mark_well_ended() -> None:
    """By the first rank, when the run has ended as it should: done, or stopped by a signal and saved."""
    mark = os.environ.get(WELL_ENDED)
    if mark and os.environ.get("RANK") == "0":
        Path(mark).touch()


class WorkerFailed(PipelineError):
    """A rank failed; it has said why itself, unless it was killed."""

    def __init__(self, message: str, exitcode: int) -> None:
        super().__init__(message)
        self.exitcode = exitcode
