"""Fixed slots in which requests are spoken side by side; they join and leave between blocks of eight columns.

In: requests. Out: their codes, block by block. Every column is computed for all slots, empty ones too, so a request always
meets kernels of the same shape and its codes do not depend on its neighbours: bit for bit the same for any company in an
engine of this many slots (on a CPU, any length of theirs; on a GPU within one length bucket of the cache). An engine with
another number of slots multiplies other shapes and may round otherwise. The price: an empty slot costs as much as a full one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from train.model.batch import pack
from train.model.decoder import HiggsAudio
from train.model.generation.audio_path import AudioPath, open_path
from train.model.generation.block_graph import BlockGraph, Record
from train.model.generation.key_value_cache import KeyValueCache
from train.model.generation.request import Request
from train.model.generation.slots import COLUMNS_PER_BLOCK, Slots, State
from train.world import ALONE, World


class Engine:
    """A model, a cache, and `num_slots` slots. With more than one rank, every rank must make the same calls.

    `record`: `record_cuda` to replay blocks as CUDA graphs, on one GPU; codes are the same.
    """

    def __init__(
        self, model: HiggsAudio, num_slots: int = 1, world: World = ALONE, record: Record | None = None
    ) -> None:
        config, weight = model.config, model.audio_lm_head.weight
        self._model = model
        self._path = open_path(model)
        self._cache = KeyValueCache(config, num_slots, weight.dtype, weight.device)
        self._slots = Slots(num_slots, config.num_codebooks, config.codebook_vocab, weight.device)
        self._agree = world.first if world.size > 1 else None
        if record is not None and (world.size > 1 or not isinstance(self._path, AudioPath)):
            raise ValueError("blocks are recorded for a whole model on one device: a sharded one is run as it is")
        self._recorded = BlockGraph(self._slots, self._path, self._cache, record) if record is not None else None
        self._requests: list[Request | None] = [None] * num_slots
        self._generators: list[torch.Generator | None] = [None] * num_slots
        self._lengths = [0] * num_slots  # positions of each slot that are in the cache
        self._waiting: deque[Request] = deque()
        self._device = weight.device

    def submit(self, request: Request) -> Request:
        """Queue it; it joins as soon as a slot is free."""
        self._waiting.append(request)
        return request

    def __len__(self) -> int:
        """Its slots."""
        return len(self._requests)

    @property
    def num_free_slots(self) -> int:
        return self._requests.count(None)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or any(request is not None for request in self._requests)

    def advance(self) -> list[Request]:
        """Let requests leave and join, then speak a block of columns; returns the requests that got any."""
        # Inference mode takes 5-10 % less of a CPU than no_grad, but FSDP's hooks need tensors with versions.
        with torch.inference_mode() if isinstance(self._path, AudioPath) else torch.no_grad():
            return self._advance()

    def _advance(self) -> list[Request]:
        self._release()
        self._fill()
        spoken = [request for request in self._requests if request is not None]
        if not spoken:
            return []
        most = max(request.num_columns_left for request in spoken)
        whole = self._device.type == "cuda" or self._recorded is not None
        number = COLUMNS_PER_BLOCK if whole else min(COLUMNS_PER_BLOCK, most)
        self._cache.reserve(max(self._lengths) + number)  # for those at their limit that run on beside others
        columns, self._slots.state = self._block(number)
        said = columns.cpu().numpy()  # the one look
        for slot, request in enumerate(self._requests):
            if request is not None:
                self._lengths[slot] += number
                request.append(said[:, slot])
        self._release()
        return spoken

    def _block(self, number: int) -> tuple[Tensor, State]:
        """columns [n, B, K] and the state after them."""
        noise = self._noise(number)
        if self._recorded is not None:
            return self._recorded(self._slots.state, noise)
        longest = max(self._lengths)
        ends = [longest + step + 1 for step in range(number)]
        return self._slots.block(self._path, self._cache, self._slots.state, noise, ends, self._agree)

    def run(self) -> Iterator[Request]:
        """Every request as it is done, until none is left."""
        while self.has_work:
            for request in self.advance():
                if request.is_done:
                    yield request

    def _release(self) -> None:
        for slot, request in enumerate(self._requests):
            if request is not None and request.is_done:
                self._requests[slot] = self._generators[slot] = None
                self._lengths[slot] = 0
                self._slots.leave(slot)

    def _fill(self) -> None:
        for slot, taken in enumerate(self._requests):
            while taken is None and self._waiting:
                request = self._waiting.popleft()
                if not request.is_done:
                    try:
                        self._join(slot, request)
                    except BaseException:  # out of memory, say; perhaps in another thread than its owner's
                        request.cancel()  # it is in no queue any more: its owner must not wait for it for ever
                        raise
                    break

    def _join(self, slot: int, request: Request) -> None:
        """Run the prompt into the slot's part of the cache."""
        self._cache.reserve(request.max_positions + COLUMNS_PER_BLOCK)
        batch = pack([request.prompt], [0], ["prompt"]).to(self._device)
        attend = self._cache.prompt(slot, batch.documents.order)
        self._model.next_logits(batch.text_ids, batch.codes, batch.positions, attend, batch.whisper)
        self._requests[slot] = request
        self._generators[slot] = torch.Generator().manual_seed(request.sampling.seed)
        self._lengths[slot] = len(request.prompt)
        self._slots.join(slot, len(request.prompt), request.sampling)

    def _noise(self, number: int) -> Tensor:
        """[n, B, 2, K] uniform, each slot's from its own seed; a generator advances by a whole block at a time."""
        shape = (COLUMNS_PER_BLOCK, 2, self._slots.state.column.shape[1])
        blank = torch.zeros(shape)
        drawn = [torch.rand(shape, generator=one) if one is not None else blank for one in self._generators]
        return torch.stack(drawn, dim=1)[:number].to(self._device)
