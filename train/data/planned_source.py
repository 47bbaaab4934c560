"""Packs of data sets with an index: every step of every epoch is known before the first.

In: the data set as the user wrote it or those of train.data, and the [train] section. Out: loaded_packs for any step, the
number of steps, held-out data, a small batch for the preflight, and what the ranks must have in common. The price of exact
epochs and exact resume is the index that stage one wrote; any tars with the documented members go through
`streamed_source`, which gives neither.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import msgspec
import numpy as np

from shards.errors import ConfigError
from shards.manifest import Dataset, Fingerprints, check_fingerprints, stated_edits
from shards.sample import Sample
from shards.sequence import SequenceBuilder
from train.config import TrainSection
from train.data.data_sets import common_text_rules, join, mixing_of, open_set, require_made_alike
from train.data.feed import DamageLimits
from train.data.heaviest_pack import FIRST_REMOTE_SAMPLES, FIRST_SAMPLES, PackSource, PlannedPacks
from train.data.held_out_rows import hold_out
from train.data.loader import LoaderShare, load_planned_packs
from train.data.packing import PlanSettings, plan_settings
from train.data.plan import Keep, Planner
from train.data.plan_log import log_plan
from train.data.references import SpeakerReferences, draw_references
from train.data.same_audio import without_places
from train.data.source import HeldOut
from train.data.stages import LoadedPack, read_pack
from train.data.text_dropout import TextDropout
from train.data.validation_overlap import MAX_NAMED, OpenData, require_apart
from train.data.validation_split import choose_samples
from train.model.batch import PackedBatch
from train.model.conditioning import Conditioning, fit_to_shards
from train.world import ALONE, World

log = logging.getLogger("train")


class PlannedSource:
    """Data sets with an index: every step of every epoch is known beforehand."""

    def __init__(self, location: str, section: TrainSection) -> None:
        """`location`: of the one data set; "" where train.data names them. Raises ShardError when there is none."""
        if location:
            section = msgspec.structs.replace(section, data=[])
        self._section = section
        locations = [location] if location else [source.path for source in section.data]
        self._data = join([open_set(one, section) for one in locations])
        self._sets = self._data.sets
        self._is_remote = self._data.is_remote
        self.mixing = mixing_of(section, self._data)
        self.data_sets = self._data.names
        self.index, self.reader = self._data.index, self._data.reader
        self.digest = self._data.digest
        self.text_rules = common_text_rules(self._data)
        self.audio_edits = stated_edits(self._data.sets[0].dataset)  # all sets are edited alike, or refused
        self._validation = validation_source(section)
        self.validation_digest = self._validation.digest if self._validation else ""
        self._trained: Keep | None = None
        self._references: SpeakerReferences | None = None
        self._held_out: Keep | None = None  # of validation_fraction, or of held-out data without what training hears

    def check(self, expected: Fingerprints, conditioning: Conditioning) -> Conditioning:
        """Refuse shards that were not made for this model; settle what the reference enters as."""
        found: list[Conditioning] = []
        for one in self._sets:
            check_fingerprints(one.dataset, expected)
            found.append(fit_to_shards(conditioning, one.dataset, one.index))
        settled = found[0]
        if other := next((i for i, one in enumerate(found) if one.runs_tower != settled.runs_tower), 0):
            raise ConfigError(
                f"train.data: one of {self._sets[0].location} and {self._sets[other].location} holds mels, the other states of "
                "a Whisper encoder; run preprocess with one features.whisper for both, or set sequence.conditioning = "
                '"codes"'
            )
        if self._validation:
            self._validation.require_like({one.location: one.dataset for one in self._sets})
        if self._validation and self._validation.check(expected, conditioning).runs_tower:
            return conditioning  # held-out shards hold mels, whatever those trained on hold: the tower is needed
        return settled

    def require_apart(self) -> list[int]:
        return self._validation.require_apart_from(self.open_data()) if self._validation else []

    def leave_out(self, places: list[int]) -> None:
        if self._validation:
            self._validation.keep_without(places)

    def require_apart_from(self, trained: list[OpenData]) -> list[int]:
        """`Source.require_apart` of the held-out data set, against each that is trained on."""
        (held_out,) = self.open_data()
        return sorted({place for data in trained for place in require_apart(data, held_out)})

    def require_like(self, trained: dict[str, Dataset]) -> None:
        """Raises ShardError where this held-out data set was made in another way than one that is trained on."""
        (own,) = self._sets
        for location, dataset in trained.items():
            so = "so losses of one say little of the other (train.validation_data)"
            require_made_alike(location, dataset, own.location, own.dataset, so)

    def keep_without(self, places: list[int]) -> None:
        """This held-out data set without the rows at these places. Raises ConfigError where none is left."""
        if not places:
            return
        keep = without_places(lambda rows: np.ones(len(rows), bool), places)
        (own,) = self._sets
        if len(places) == len(self.index):
            raise ConfigError(
                f"train.validation_data = {own.location!r}: the references of all its {len(places)} samples are heard in "
                "training as well, so nothing of it is held out; give its rows other references, or hold out speakers with "
                "train.validation_fraction"
            )
        first = ", ".join(self.reader.read(row).key for row in self.index[~keep(self.index)][:MAX_NAMED])
        log.warning(
            "train.validation_data = %r: %d of its %d samples have a reference that is heard in training as well; they are "
            "not evaluated with: %s%s",
            own.location,
            len(places),
            len(self.index),
            first,
            ", ..." if len(places) > MAX_NAMED else "",
        )
        self._held_out = keep

    def open_data(self) -> list[OpenData]:
        return [
            OpenData(one.location, one.dataset, one.index, None if one.remote else one.reader) for one in self._sets
        ]

    def heaviest_packs(self, builder: SequenceBuilder, world: World = ALONE) -> PackSource:
        """Packs to measure memory with, before anything is planned. Every rank must call this."""
        section = msgspec.structs.replace(self._section, batch_tokens=1)
        references = self._drawn_references(builder, world)
        first_samples = (FIRST_REMOTE_SAMPLES if self._is_remote else FIRST_SAMPLES) // len(self._sets)
        starts = self._data.first_rows
        parts = [np.arange(start, min(end, start + first_samples)) for start, end in pairwise(starts)]
        return PlannedPacks(self.reader, self.index, builder, plan_settings(section), np.concatenate(parts), references)

    def prepare(
        self,
        builder: SequenceBuilder,
        batch_tokens: int | None = None,
        counts_path: Path | None = None,
        world: World = ALONE,
    ) -> None:
        """Plan. `batch_tokens`: the budget where the section says "auto"; `counts_path`: where the first rank keeps the pack
        counts of epochs."""
        self._builder = builder
        if batch_tokens:
            self._section = msgspec.structs.replace(self._section, batch_tokens=batch_tokens)
        settings = plan_settings(self._section)
        dropout = self._dropout = TextDropout(builder, self._section.seed)
        references = self._drawn_references(builder, world)
        if references:
            references = references.fitting(lambda rows: dropout.longest(rows) <= settings.batch_tokens)
        keep = self._trained_rows(world)
        self.planner = Planner(self.index, dropout.longest, settings, keep, self.mixing, dropout, references)
        self._require_room(self.planner)
        if counts_path and world.is_first:
            self.planner.load_counts(counts_path)
        self._count_packs(world)
        self.planner.require_full_step()
        self.total_steps = self._section.max_steps or self.planner.total_steps(self._section.num_epochs)
        if counts_path and world.is_first:
            counts_path.parent.mkdir(parents=True, exist_ok=True)
            self.planner.save_counts(counts_path)

    def _trained_rows(self, world: World) -> Keep | None:
        """A filter of the rows trained on, None for all; the others are held out. Every rank must call this."""
        fraction = self._section.validation_fraction
        if fraction and self._trained is None:
            self._trained, self._held_out = self.hold_out(fraction, world)
        return self._trained

    def columns(self) -> np.ndarray | None:
        """Columns [n] beside the index; None where a data set has none here."""
        return self._data.columns()

    def hold_out(self, fraction: float, world: World) -> tuple[Keep, Keep]:
        """Filters of the rows trained on and of those held out. Every rank must call this."""
        return hold_out(self._data, msgspec.structs.replace(self._section, validation_fraction=fraction), world)

    def _drawn_references(self, builder: SequenceBuilder, world: World) -> SpeakerReferences | None:
        """Of all budgets (`fitting` sets one); None where references are those of the list. Every rank must call this."""
        if self._section.reference != "as_listed" and self._references is None:
            held_out = self._validation._data.columns() if self._validation else None
            self._references = draw_references(
                self._data, builder, self._trained_rows(world), self._section.seed, held_out
            )
        return self._references

    def _count_packs(self, world: World) -> None:
        """To count an epoch's packs is to plan it, so the first rank does it for all. Every rank must call this."""
        if world.is_first:
            self.planner.total_steps(1 if self._section.max_steps else self._section.num_epochs)
        self.planner.counts = world.gather(self.planner.counts if world.is_first else None)[0]

    def held_out(self, world: World) -> HeldOut | None:
        """The held-out packs; None where nothing is held out."""
        budget = self.planner.settings.batch_tokens
        if self._validation:
            return self._validation.held_out_packs(self._builder, world, budget)
        if self._held_out is not None:
            return self.held_out_packs(self._builder, world, budget)
        return None

    def held_out_packs(self, builder: SequenceBuilder, world: World, batch_tokens: int) -> HeldOut:
        """One pass over the held-out rows in a fixed order, filled up so that ranks stay in step. Raises ConfigError."""
        keep = self._held_out
        settings = PlanSettings(
            seed=0,
            batch_tokens=batch_tokens,
            packs_per_step=world.size,
            max_references=self._section.max_references,
        )
        planner = Planner(self.index, builder.lengths, settings, keep)
        share = LoaderShare(world.rank, world.size)
        on_window = self._fetches(planner)
        if keep:
            for one in self._sets:
                if one.remote:
                    everything = [shard.shard for shard in one.dataset.shards]
                    one.remote.require_room(everything, "held-out speakers lie in all shards")

        def one_pass() -> Iterator[LoadedPack]:
            packs = load_planned_packs(
                self.reader, self.index, planner, 0, builder, share, on_window, first_rows=self._data.first_rows[:-1]
            )
            return islice(packs, planner.num_steps(0))

        return HeldOut(
            one_pass,
            self._section.max_bad_fraction,
            num_samples=planner.num_samples,
            num_packs=planner.num_packs(0),
            num_too_long=planner.num_too_long,
            data_sets=self.data_sets,
        )

    def listening_samples(self, num_samples: int) -> list[Sample]:
        """Samples for the listening set, of held-out speakers where there are any."""
        if self._validation:
            return self._validation.first_samples(num_samples, self._builder)
        return choose_samples(self.reader, self.index, self._held_out, num_samples, self._builder)

    def first_samples(self, num_samples: int, builder: SequenceBuilder) -> list[Sample]:
        """The same of a data set that is only validated with."""
        return choose_samples(self.reader, self.index, self._held_out, num_samples, builder)

    def describe(self) -> None:
        log_plan(self.planner, self._section, self.total_steps, self._data)

    def loaded_packs(self, first_step: int, share: LoaderShare) -> Iterator[LoadedPack]:
        on_window = self._fetches(self.planner)
        return load_planned_packs(
            self.reader,
            self.index,
            self.planner,
            first_step,
            self._builder,
            share,
            on_window,
            self._dropout,
            self._data.first_rows[:-1],
        )

    def _fetches(self, planner: Planner) -> Callable[[int, int], None] | None:
        """Called when a window begins: has its shards here and fetches the next ones."""
        if not self._is_remote:
            return None

        def enter(epoch: int, window: int) -> None:
            present, following = (
                planner.window_shards(*place) for place in ((epoch, window), planner.following(epoch, window))
            )
            for number, one in enumerate(self._sets):
                if one.remote:
                    one.remote.enter(self._data.of_set(present, number), self._data.of_set(following, number))

        return enter

    def _require_room(self, planner: Planner) -> None:
        """A remote data set needs two windows at a time on this disk. Raises ConfigError."""
        for number, one in enumerate(self._sets):
            for window in range(planner.num_windows(0)) if one.remote else ():
                places = (0, window), planner.following(0, window)
                shards = {
                    int(shard) for place in places for shard in self._data.of_set(planner.window_shards(*place), number)
                }
                assert one.remote
                one.remote.require_room(shards, f"windows {window} and {window + 1}")

    def preflight_batch(self, num_samples: int) -> PackedBatch:
        """The first sound samples of the first step. Raises ShardError when there is none."""
        _, packs = next(self.planner.steps_from(0))
        return read_pack(self.reader, self.index, np.concatenate(packs), self._builder, num_samples)

    def limits(self) -> DamageLimits:
        return DamageLimits(self._section.max_bad_fraction, self.planner.epoch_samples(0), self.facts)

    def facts(self, epoch: int) -> dict[str, str]:
        """What all ranks must have in common when an epoch begins."""
        return {"the data set": self.digest, f"the plan of epoch {epoch}": self.planner.epoch_hash(epoch)}


def validation_source(section: TrainSection) -> PlannedSource | None:
    """The data set named in train.validation_data. Raises ConfigError when a fraction is asked for as well."""
    if not section.validation_data:
        return None
    if section.validation_fraction:
        raise ConfigError(
            f"train.validation_data = {section.validation_data!r} and train.validation_fraction = "
            f"{section.validation_fraction}: held-out data come from one of them; set the other to its default"
        )
    return PlannedSource(
        section.validation_data, msgspec.structs.replace(section, validation_data="", data=[], reference="as_listed")
    )
