"""A block of columns recorded once and replayed: one launch in place of about 200 kernels for each of its eight columns.

In: the same inputs as `Slots.block`. Out: the same columns, code for code. A recording holds addresses, so it is made anew
whenever the cache or the window has moved, and kept for each width of drawing beside that; the caller's state is copied into
the recording's own before each replay. The price is a second or so and some memory per recording. Recording reaches this file
as a function: `record_cuda` on a GPU, and in tests one that simply runs the block again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.model.generation.audio_path import Path
from train.model.generation.key_value_cache import KeyValueCache
from train.model.generation.slots import COLUMNS_PER_BLOCK, Slots, State

Record = Callable[[Callable[[], None]], Callable[[], None]]
WARM_UP = 2  # runs before recording: libraries allocate their workspaces, tables are made


@dataclass(frozen=True)
class Recording:
    """What a replay reads and writes; the tensors never move."""

    state: State
    noise: Tensor  # [n, B, 2, K]
    columns: Tensor  # [n, B, K]
    after: State
    replay: Callable[[], None]


class BlockGraph:
    """Recorded blocks of one engine's slots."""

    def __init__(self, slots: Slots, path: Path, cache: KeyValueCache, record: Record) -> None:
        self._slots, self._path, self._cache, self._record = slots, path, cache, record
        self._recordings: dict[int, Recording] = {}  # by the width of drawing
        self._addresses = (-1, -1)

    def __call__(self, state: State, noise: Tensor) -> tuple[Tensor, State]:
        """A whole block: noise [COLUMNS_PER_BLOCK, B, 2, K] -> (columns [COLUMNS_PER_BLOCK, B, K], the state after them)."""
        addresses = (self._cache.capacity, len(self._slots.rules.in_window))
        if addresses != self._addresses:
            self._recordings.clear()
            self._addresses = addresses
        width = self._slots.rules.width
        if width not in self._recordings:
            self._recordings[width] = self._make(state, noise)
        recording = self._recordings[width]
        for mine, given in zip((*recording.state, recording.noise), (*state, noise), strict=True):
            mine.copy_(given)
        recording.replay()
        # Copies: columns on a CPU are kept as views, a request that joins changes its state in place, and the next replay may
        # be another recording's.
        return recording.columns.clone(), State(*(tensor.clone() for tensor in recording.after))

    def _make(self, state: State, noise: Tensor) -> Recording:
        """Record from copies of the given values. What the runs write into the cache, the replay writes over."""
        state, noise = State(*(tensor.clone() for tensor in state)), noise.clone()
        ends = [self._cache.capacity] * COLUMNS_PER_BLOCK  # everything is looked at, through a mask
        columns, after = self._slots.block(self._path, self._cache, state, noise, ends)
        columns, after = columns.clone(), State(*(tensor.clone() for tensor in after))

        def block() -> None:
            said, then = self._slots.block(self._path, self._cache, state, noise, ends)
            for mine, given in zip((columns, *after), (said, *then), strict=True):
                mine.copy_(given)

        return Recording(state, noise, columns, after, self._record(block))


def record_cuda(block: Callable[[], None]) -> Callable[[], None]:
    """Record `block`, which must not look at the device, as a CUDA graph; returns its replay.

    Another thread may use the GPU meanwhile (a codec that decodes), so only this one's calls are watched.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            block()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        block()
    return graph.replay
