"""Several streams as one: shares of the audio by weight, without an index.

In: a stream of raw samples for each data set, and weights, given or of the hours in dataset.json. Out: one stream, in
which each has its share at any time: next is whoever is furthest behind. A small set simply begins its next pass sooner.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from shards.errors import ConfigError
from shards.manifest import Dataset
from shards.sample import read_npy
from train.config import TrainSection
from train.data.data_sets import data_weights
from train.data.stages import RawSample


class MixedSamples(torch.utils.data.IterableDataset):
    """Source stage: of several streams, each has its share of the audio at any time: next is whoever is furthest behind."""

    def __init__(self, streams: list[Iterable[RawSample]], weights: tuple[float, ...]) -> None:
        self._streams = streams
        self._weights = np.array(weights)

    def __iter__(self) -> Iterator[RawSample]:
        streams = [iter(stream) for stream in self._streams]
        given = np.zeros(len(streams))  # target frames
        while True:
            number = int(np.argmin(given / self._weights))
            raw = next(streams[number])
            given[number] += target_frames(raw)
            yield raw


def target_frames(raw: RawSample) -> int:
    """Codec frames of its target; 1 of a damaged sample, so that the next stream has its turn."""
    try:
        return max(1, read_npy(raw.members["tgt.codes.npy"]).shape[1])
    except (LookupError, ValueError, TypeError):  # `build_sequences` says what is wrong with it
        return 1


def stream_weights(section: TrainSection, datasets: dict[str, Dataset | None]) -> tuple[float, ...]:
    """Shares of several lists; () where shards are taken as they are. Raises ConfigError where hours are not known."""
    if section.data_temperature == 1:
        return data_weights(section)
    data_weights(section)  # refuses both together
    unknown = [location for location, dataset in datasets.items() if dataset is None]
    if unknown:
        raise ConfigError(
            f"train.data_temperature = {section.data_temperature:g}: {unknown[0]} has no dataset.json, so its hours are not "
            "known; give each of train.data a weight instead"
        )
    return tuple(
        max(dataset.target_hours, 1e-9) ** section.data_temperature for dataset in datasets.values() if dataset
    )
