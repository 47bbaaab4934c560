"""Data sets that are trained on together, seen as one: one index, one reader, one digest.

In: folders or URLs in the order given. Out: their rows in that order, with shard numbers that go on from set to set, and whether
they fit together. The surprising decision: a speaker's name means one person in all sets where that is the careful answer
(holding out, contrastive pairs), and a person of its own set where it is not (whose clips may serve as a reference). The
price: with more than one data set the joined index lies in memory, 44 bytes a sample.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from shards.columns import read_columns
from shards.errors import ConfigError, ShardError
from shards.manifest import Dataset, edits_in_words, open_dataset, require_one_precision, text_rules
from shards.printable import redact
from shards.reader import SampleReader
from train.config import TrainSection
from train.data.mixing import Mixing
from train.data.remote import CachedReader, RemoteShards, is_remote

log = logging.getLogger("train")
MOST_SHARDS = 1 << 20  # of all sets together: `same_audio.place_of` has as many bits


@dataclass(frozen=True)
class OpenSet:
    """One data set, here or behind a URL."""

    location: str
    dataset: Dataset
    index: np.ndarray
    reader: SampleReader
    remote: RemoteShards | None

    def columns(self) -> np.ndarray | None:
        """Its columns [n], None where it has none here. Raises ShardError for damaged ones."""
        if self.remote or not Path(self.location).is_dir():
            return None
        return read_columns(Path(self.location), len(self.index))


def open_set(location: str, section: TrainSection) -> OpenSet:
    """Raises ShardError when there is no data set."""
    if is_remote(location):
        remote = RemoteShards(location, Path(section.cache_dir), int(section.cache_gb * 1e9))
        return OpenSet(location, *remote.open(), CachedReader(remote), remote)
    return OpenSet(location, *open_dataset(Path(location)), SampleReader(Path(location)), None)


@dataclass(frozen=True)
class JoinedSets:
    """Data sets as one. Of a single one everything is its own."""

    sets: list[OpenSet]
    index: np.ndarray  # [n] of all sets; shards are numbered on
    reader: SampleReader
    digest: str
    first_rows: tuple[int, ...]  # where each set begins in the index, and its end
    first_shards: tuple[int, ...]  # the number that shard 0 of each set has, and the end

    @property
    def names(self) -> tuple[str, ...]:
        return short_names([one.location for one in self.sets])

    @property
    def is_remote(self) -> bool:
        """Whether one of them is behind a URL."""
        return any(one.remote for one in self.sets)

    def columns(self) -> np.ndarray | None:
        """Columns [n] of all sets; None where one has none here."""
        found = [one.columns() for one in self.sets]
        tables = [table for table in found if table is not None]
        if len(tables) < len(found):
            return None
        return tables[0] if len(tables) == 1 else np.concatenate(tables)

    def of_set(self, shards: np.ndarray, number: int) -> np.ndarray:
        """Those of these shards [v] that are of one set, by the numbers they have there."""
        first, end = self.first_shards[number : number + 2]
        return shards[(shards >= first) & (shards < end)] - first


def joint_digest(digests: Sequence[str]) -> str:
    """Of data sets that are trained on together, in their order; of one alone its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def join(sets: list[OpenSet]) -> JoinedSets:
    """Raises ShardError or ConfigError, naming both, where two do not fit together."""
    for one, other in itertools.combinations(sets, 2):
        require_compatible(one.location, one.dataset, other.location, other.dataset)
    if len(sets) == 1:
        (only,) = sets
        return JoinedSets(sets, only.index, only.reader, only.dataset.digest, (0, len(only.index)), (0, MOST_SHARDS))
    if empty := [redact(one.location) for one in sets if not len(one.index)]:
        raise ConfigError(f"train.data: {empty[0]} holds no sample (its list was empty, or all rejected); leave it out")
    first_rows = [0, *itertools.accumulate(len(one.index) for one in sets)]
    sizes = (1 + max((done.shard for done in one.dataset.shards), default=0) for one in sets)
    first_shards = [0, *itertools.accumulate(sizes)]
    if first_shards[-1] > MOST_SHARDS:
        raise ConfigError(f"train.data: {first_shards[-1]} shards together, at most {MOST_SHARDS}; write larger ones")
    index = np.concatenate([np.asarray(one.index) for one in sets])
    for (first, end), shard in zip(itertools.pairwise(first_rows), first_shards[:-1], strict=True):
        index["shard"][first:end] += np.uint32(shard)
    digest = joint_digest([one.dataset.digest for one in sets])
    return JoinedSets(sets, index, JoinedReader(sets, first_shards), digest, tuple(first_rows), tuple(first_shards))


def require_compatible(one: str, ours: Dataset, other: str, theirs: Dataset) -> None:
    """Raises where two data sets at these places cannot be trained on together."""
    names = f"{redact(one)} and {redact(other)}"
    if ours.digest == theirs.digest:
        raise ConfigError(
            f"train.data: {names} are one data set (digest {ours.digest[:16]}); give it once, with a weight"
        )
    require_made_alike(one, ours, other, theirs, "cannot be trained on together")


def require_made_alike(one: str, ours: Dataset, other: str, theirs: Dataset, so: str) -> None:
    """Raises ShardError with both values of what differs in how clips became numbers; `so`: what that means."""
    require_one_precision(f"{redact(one)} and {redact(other)}", ours, theirs)
    differing = [
        f"{what} {here[:16]} and {there[:16]}"
        for what, here, there in (
            (name, getattr(ours.fingerprints, name), getattr(theirs.fingerprints, name))
            for name in ("codec", "tokenizer", "mel", "whisper")
        )
        if here is not None and there is not None and here != there
    ] + edits_in_words(ours, theirs)
    if differing:
        raise ShardError(
            f"{redact(one)} and {redact(other)} were not made alike and {so}: {'; '.join(differing)}; run preprocess for one "
            "of them again with the pipeline.toml of the other"
        )


def require_distinct(lists: dict[str, list[str]]) -> None:
    """Shards by the list that names them: none is in two. Raises ConfigError."""
    owner: dict[str, str] = {}
    for location, urls in lists.items():
        for url in urls:
            real = url if is_remote(url) else str(Path(url).resolve())
            if (other := owner.setdefault(real, location)) != location:
                raise ConfigError(
                    f"train.data: {redact(url)} is in {redact(other)} and in {redact(location)}; give each shard once, with a "
                    "weight"
                )


def short_names(locations: Sequence[str]) -> tuple[str, ...]:
    """Names for logs and metrics: the last part of each location, numbered where two have the same."""
    names: list[str] = []
    for location in locations:
        plain = redact(location).split("?")[0].rstrip("/")
        name = base = PurePosixPath(plain).name or "data"
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return tuple(names)


def mixing_of(section: TrainSection, data: JoinedSets) -> Mixing:
    """How data sets and speakers share an epoch. Raises ConfigError."""
    return Mixing(
        data.names, data.first_rows, data_weights(section), section.data_temperature, section.speaker_temperature
    )


def data_weights(section: TrainSection) -> tuple[float, ...]:
    """The weights of [[train.data]]; () where none has one. Raises ConfigError where they do not say all."""
    weights = [source.weight for source in section.data]
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        without = next(source.path for source in section.data if source.weight is None)
        raise ConfigError(
            f"train.data: {without} has no weight, others have; a weight is a share of the audio against the others', so "
            "give one to each, or to none"
        )
    if given and section.data_temperature != 1:
        raise ConfigError(
            f"train.data_temperature = {section.data_temperature:g} and weights in train.data: shares come from one of "
            "them; remove the weights or set it to 1"
        )
    return tuple(given)


def common_text_rules(data: JoinedSets) -> list[str] | None:
    """What stage one did to the texts; a warning where it did not do the same to all."""
    rules = [text_rules(one.dataset) for one in data.sets]
    if any(other != rules[0] for other in rules):
        log.warning(
            "train.data: text.normalize differs: %s; the model learns all of them, `speak` will clean texts as for %s",
            "; ".join(f"{name}: {rule}" for name, rule in zip(data.names, rules, strict=True)),
            data.names[0],
        )
    return rules[0]


class JoinedReader(SampleReader):
    """Reads a row of the joined index from the data set it is of."""

    def __init__(self, sets: list[OpenSet], first_shards: Sequence[int]) -> None:
        super().__init__(Path())
        self._readers = [one.reader for one in sets]
        self._names = short_names([one.location for one in sets])
        self._first_shards = np.array(first_shards[:-1])

    def read_raw(self, row: Any) -> dict[str, Any]:
        number, own = self._own(row)
        return self._readers[number].read_raw(own)

    def key_of(self, row: Any, position: int) -> str:
        number, own = self._own(row)
        return self._readers[number].key_of(own, position)

    def shard_name(self, row: Any) -> str:
        number, own = self._own(row)
        return f"{self._names[number]}/{self._readers[number].shard_name(own)}"

    def _own(self, row: Any) -> tuple[int, Any]:
        """(number of the data set, the row as it stands in that set's index)."""
        number = int(np.searchsorted(self._first_shards, int(row["shard"]), side="right")) - 1
        own = row.copy()
        own["shard"] -= self._first_shards[number].astype(np.uint32)
        return number, own

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            **{name: self.__dict__[name] for name in ("_readers", "_names", "_first_shards")},
        }
