"""`loader = "stream"`: any list of WebDataset shards with the documented members.

In: a folder, globs, brace lists or URLs, or several of them in train.data; no index is needed. Out: the same loaded_packs as a
plan gives, packed on line under the same budgets. The order of shards is drawn anew for every pass and then split among ranks
and workers, and there is no end: `train.max_steps` says how long, so every rank takes as many steps. The price: no exact
epochs, a shuffle within a buffer only, and a resumed run draws a new order from the same statistics.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from webdataset.pipeline import DataPipeline

from shards.errors import ConfigError, ShardError
from shards.manifest import Dataset, Fingerprints, check_fingerprints, open_dataset, stated_edits, text_rules
from shards.printable import redact
from shards.sample import Sample, unpack_sample
from shards.sequence import SequenceBuilder
from train.config import TrainSection
from train.data.data_sets import require_compatible, require_distinct, short_names
from train.data.feed import DamageLimits
from train.data.heaviest_pack import PackSource, StreamedPacks
from train.data.loader import LoaderShare, run_pipeline
from train.data.packing import plan_settings
from train.data.planned_source import validation_source
from train.data.shard_urls import read_shards, shard_urls
from train.data.source import HeldOut
from train.data.stages import BuiltSample, Fault, LoadedPack, RawSample, build_sequences, collate
from train.data.stream_mixing import MixedSamples, stream_weights
from train.data.stream_stages import Passes, StreamedSamples, numbered, pack_online, shuffled
from train.data.text_dropout import TextDropout
from train.data.validation_overlap import data_of_shards
from train.model.batch import PackedBatch
from train.model.conditioning import Conditioning
from train.world import ALONE, World

log = logging.getLogger("train")


class StreamedSource:
    """Lists of shards without an index."""

    def __init__(self, location: str, section: TrainSection) -> None:
        """`location`: of the one list; "" where train.data names them.

        Raises ConfigError when there are no shards, or when a setting needs an index.
        """
        if not section.max_steps:
            raise ConfigError('train.loader = "stream" knows no epochs: say how long with train.max_steps')
        if section.validation_fraction or section.order != "random":
            raise ConfigError(
                'train.loader = "stream" has no index: train.validation_fraction must be 0 (name a data set in '
                'train.validation_data instead) and train.order "random"'
            )
        if section.reference != "as_listed":
            raise ConfigError(
                'train.reference = "same_speaker" needs an index of the speakers\' clips, and train.loader = "stream" has none: '
                'set it to "as_listed", or train.loader to "plan"'
            )
        if section.speaker_temperature != 1:
            raise ConfigError(
                f'train.loader = "stream" has no index, so it cannot balance speakers: train.speaker_temperature = '
                f'{section.speaker_temperature:g} must be 1, or train.loader "plan"'
            )
        if location:
            section = msgspec.structs.replace(section, data=[])
        self._section = section
        self._locations = [location] if location else [source.path for source in section.data]
        self._lists = [shard_urls(one) for one in self._locations]
        if repeated := next((one for one in self._locations if self._locations.count(one) > 1), ""):
            raise ConfigError(f"train.data: {redact(repeated)} is named twice; give it once, with a weight")
        require_distinct(dict(zip(self._locations, self._lists, strict=True)))
        self._weights = stream_weights(section, self._datasets())
        self.data_sets = short_names(self._locations)
        self.urls = [url for urls in self._lists for url in urls]
        self.digest = hashlib.sha256("\n".join(self.urls).encode()).hexdigest()
        self.text_rules: list[str] | None = None
        self.audio_edits: dict[str, float] | None = None
        self._validation = validation_source(section)
        self.validation_digest = self._validation.digest if self._validation else ""

    def check(self, expected: Fingerprints, conditioning: Conditioning) -> Conditioning:
        """Hold fingerprints against the model where there are any: foreign shards have none."""
        known = {location: dataset for location, dataset in self._datasets().items() if dataset}
        for dataset in known.values():
            check_fingerprints(dataset, expected)
            self.text_rules = self.text_rules or text_rules(dataset)
            self.audio_edits = self.audio_edits or stated_edits(dataset)
        for (one, ours), (other, theirs) in itertools.combinations(known.items(), 2):
            require_compatible(one, ours, other, theirs)
        if self._validation:
            self._validation.check(expected, conditioning)
            self._validation.require_like(known)
        return conditioning

    def _datasets(self) -> dict[str, Dataset | None]:
        """dataset.json of each list that is a folder of stage one; None for others."""
        return {
            one: open_dataset(Path(one))[0] if (Path(one) / "dataset.json").is_file() else None
            for one in self._locations
        }

    def require_apart(self) -> list[int]:
        """Of shards that stage one made here; foreign ones say nothing about what is in them."""
        if not self._validation:
            return []
        known = data_of_shards(self.urls)
        if not known:
            log.info("train.validation_data is not compared with the stream: its shards have no index")
        return self._validation.require_apart_from(known)

    def leave_out(self, places: list[int]) -> None:
        if self._validation:
            self._validation.keep_without(places)

    def heaviest_packs(self, builder: SequenceBuilder, world: World) -> PackSource:
        """Packs to measure memory with: of the first sound samples, in the order of the list."""
        built = build_sequences(builder, TextDropout(builder, self._section.seed))(read_shards(self.urls))
        return StreamedPacks(lambda: (item.sequence for item in built if item.sequence))

    def prepare(
        self,
        builder: SequenceBuilder,
        batch_tokens: int | None = None,
        counts_path: Path | None = None,
        world: World = ALONE,
    ) -> None:
        """`batch_tokens`: the budget where the section says "auto"; there is nothing to count."""
        self._builder = builder
        if batch_tokens:
            self._section = msgspec.structs.replace(self._section, batch_tokens=batch_tokens)
        self.total_steps = self._section.max_steps
        self._require_shards_for(world.size, self._section.num_workers)

    def _require_shards_for(self, world_size: int, num_workers: int) -> None:
        """Every reader needs a shard of its own, of each data set that is mixed in. Raises ConfigError."""
        readers = world_size * max(1, num_workers)
        lists, names = (self._lists, self._locations) if self._weights else ([self.urls], [""])
        fewest, location = min((len(urls), name) for urls, name in zip(lists, names, strict=True))
        where = f" in {redact(location)} of train.data" if len(lists) > 1 else ""
        if fewest < readers:
            raise ConfigError(
                f"{fewest} shards{where} for {readers} readers ({world_size} ranks of {max(1, num_workers)} loader processes): "
                "every reader needs a shard of its own; lower train.num_workers or write smaller shards"
            )

    def describe(self) -> None:
        log.info("stream of %d shards, %d steps; codec and tokenizer are not checked", len(self.urls), self.total_steps)
        if self._weights:
            for location, weight in zip(self._locations, self._weights, strict=True):
                log.info(
                    "%s: %.1f %% of the audio, as often as that takes", location, 100 * weight / sum(self._weights)
                )

    def loaded_packs(self, first_step: int, share: LoaderShare) -> Iterator[LoadedPack]:
        if self._section.packs_per_step % share.world_size:
            raise ConfigError(
                f"train.packs_per_step = {self._section.packs_per_step} cannot be shared by {share.world_size} ranks"
            )
        self._require_shards_for(share.world_size, share.num_workers)
        lists = self._lists if self._weights else [self.urls]
        passes = Passes()
        streams: list[Iterable[RawSample]] = [
            StreamedSamples(urls, self._section.seed, first_step, share, passes) for urls in lists
        ]
        source = MixedSamples(streams, self._weights) if self._weights else streams[0]
        mixed = shuffled(self._section.shuffle_buffer, self._section.seed, first_step, share.rank)
        built = build_sequences(self._builder, TextDropout(self._builder, self._section.seed))
        packed = pack_online(self._section, passes, len(self._lists))
        pipeline = DataPipeline(source, numbered(self._lists), mixed, built, packed)
        return run_pipeline(pipeline, share.num_workers)

    def preflight_batch(self, num_samples: int) -> PackedBatch:
        """The first sound samples of the stream. Raises ShardError when a whole pass has none."""
        raws = StreamedSamples(self.urls, self._section.seed, 0, LoaderShare())
        longest = plan_settings(self._section).batch_tokens
        first: list[BuiltSample] = []
        judge = Passes()
        for item in build_sequences(self._builder)(raws):
            if item.epoch:
                break  # a small stream is read once
            reason = judge.reason_of(item, longest)
            if not reason:
                first.append(item)
            if len(first) == num_samples:
                break
        if not first:
            raise ShardError(judge.message(len(self.urls)))
        return collate(first, 0).batch

    def listening_samples(self, num_samples: int) -> list[Sample]:
        """Samples for the listening set: of the validation data, or the first sound ones of the stream."""
        if self._validation:
            return self._validation.first_samples(num_samples, self._builder)
        samples: list[Sample] = []
        for raw in read_shards(self.urls):
            if len(samples) == num_samples:
                break
            try:
                sample = unpack_sample(raw.key, raw.members)
                self._builder.prompt(sample)
            except (ShardError, ValueError, IndexError) as error:  # a foreign sample's facts may contradict it
                log.warning("listening set: skipped: %s", Fault(raw.shard, raw.key, raw.reason or str(error)))
            else:
                samples.append(sample)
        return samples

    def limits(self) -> DamageLimits:
        return DamageLimits(self._section.max_bad_fraction)

    def facts(self, epoch: int) -> dict[str, str]:
        """What all ranks must have in common."""
        settings = hashlib.sha256(repr(plan_settings(self._section)).encode()).hexdigest()
        return {"the list of shards": self.digest, "the settings of packs": settings}

    def held_out(self, world: World) -> HeldOut | None:
        if self._validation is None:
            return None
        budget = plan_settings(self._section).batch_tokens
        return self._validation.held_out_packs(self._builder, world, budget)
