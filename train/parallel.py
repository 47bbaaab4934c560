"""The ranks of a run: join what torchrun started, exchange short strings, and stop together.

In: torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without it there is one rank and no
process group. Strings go over gloo on the CPU, so that talking never waits for a GPU. A rank that has died or fallen
silent is an error on all others after at most `timeout_s`, never a hang.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from shards.errors import PipelineError

SHOWN = 16  # characters of a value in a message


@dataclass(frozen=True)
class Ranks:
    """This process among all; `group` None: it is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None
    timeout_s: float = 0.0

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks; all ranks must call it. Raises PipelineError when one is gone."""
        if self.group is None:
            return [text]
        texts: list[str | None] = [None] * self.world_size
        try:
            dist.all_gather_object(texts, text, group=self.group)
        except RuntimeError as error:  # gloo's only kind, for a closed connection and for a timeout
            raise PipelineError(
                f"rank {self.rank} of {self.world_size}: another rank has ended or has been silent for "
                f"{self.timeout_s:.0f} s ({str(error).splitlines()[0][:120]}); its own log says why; start the same "
                "command again to go on from the last checkpoint"
            ) from None
        return [text or "" for text in texts]

    def require_equal(self, facts: dict[str, str]) -> None:
        """Raises PipelineError on every rank, naming both values, when a fact differs between ranks."""
        lines = self.gather("\n".join(facts.values()))
        for rank, line in enumerate(lines):
            if line == lines[0]:
                continue
            differing = [
                f"{name} is {first[:SHOWN]} on rank 0 and {other[:SHOWN]} on rank {rank}"
                for name, first, other in zip(facts, lines[0].split("\n"), line.split("\n"), strict=True)
                if first != other
            ]
            raise PipelineError(
                f"the ranks do not do the same: {'; '.join(differing)}; give every rank the same SHARDS and the same "
                "configuration"
            )


def join_ranks(timeout_s: float = 600.0) -> Ranks:
    """Join the processes that torchrun started; alone without torchrun. Raises PipelineError when they do not come."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Ranks()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise PipelineError(
            f"rank {rank} of {world_size}: the ranks did not come together within {timeout_s:.0f} s "
            f"({str(error).splitlines()[0][:120]}); start them with torchrun, all with the same number of processes"
        ) from None
    atexit.register(leave)
    return Ranks(rank, world_size, local_rank, dist.group.WORLD, timeout_s)


def leave() -> None:
    """Leave the group, at the end of the process at the latest: else threads of gloo may abort it on the way out."""
    if dist.is_initialized():
        dist.destroy_process_group()
