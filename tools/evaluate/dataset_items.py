"""Items of data sets that `preprocess` made: their held-out speakers where something is held out, else all of them.

In: folders, and the [train] section, of which `train` itself says what it holds out of all that it trains on together. Out: items
whose audio is the stored codes. The real recordings are then heard through the codec: that is the best any voice made of
these codes can reach, so it is the right ceiling, and a worse one than the recordings themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.sample import dialect_of
from tools.evaluate.items import Item, Items, is_file, with_distinct_ids

if TYPE_CHECKING:
    from preprocess.text import TextSection
    from shards.reader import SampleReader
    from shards.sample import Sample
    from train.config import TrainSection
    from train.data.plan import Keep
    from train.data.planned_source import PlannedSource


def is_dataset(data: Path) -> bool:
    return (data / "dataset.json").is_file() or data.name == "dataset.json"


def folder_of(data: Path) -> Path:
    return data.parent if data.name == "dataset.json" else data


def dataset_items(
    folders: list[Path],
    section: TrainSection | None = None,
    limit: int | None = None,
    together: Sequence[Path] = (),
) -> Items:
    """Items of the held-out speakers of data sets; of all where `section` is None or holds nothing out.

    `together`: the data sets that are trained on together, these among them; () for these alone. Raises ShardError or
    ConfigError, DataError where nothing is left.
    """
    from shards.errors import DataError, ShardError
    from shards.reader import SampleReader

    fraction = section.validation_fraction if section else 0.0
    items: list[Item] = []
    skipped: list[str] = []
    for folder, index, rows in chosen_rows(folders, section, together or folders):
        reader = SampleReader(folder)
        for row in rows.tolist():
            if limit is not None and len(items) == limit:
                break
            try:
                items.append(item_of(reader.read(index[row]), str(folder), row))
            except ShardError as error:
                skipped.append(str(error))
    source = ", ".join(map(str, folders))
    if not items:
        held_out = ", and none of the others is held out" if fraction else ""
        raise DataError(f"{source}: nothing to evaluate; {len(skipped)} samples could not be read{held_out}")
    kind = "data set" if len(folders) == 1 else f"{len(folders)} data sets"
    if section and fraction:
        kind = f"held-out speakers of {'a ' * (len(folders) == 1)}{kind} ({fraction:g} of it, seed {section.seed})"
    return Items(kind=kind, source=source, items=with_distinct_ids(items), skipped=skipped)


def chosen_rows(
    folders: list[Path], section: TrainSection | None, together: Sequence[Path]
) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """Of each folder its index [n] and the rows [m] int64 of it that training on `together` holds out; all without a share."""
    from shards.manifest import open_dataset

    if section is None or not section.validation_fraction:
        for folder in folders:
            index = open_dataset(folder)[1]
            yield folder, index, np.arange(len(index))
        return
    source, _, held_out = split(together, section)
    places = [path.resolve() for path in together]
    for folder in folders:
        first, end = source.mixing.first_rows[(place := places.index(folder.resolve())) : place + 2]
        yield folder, open_dataset(folder)[1], np.flatnonzero(held_out(source.index)[first:end])


def split(together: Sequence[Path], section: TrainSection) -> tuple[PlannedSource, Keep, Keep]:
    """The data sets as `train` opens them, and its filters of rows that are trained on and held out."""
    from msgspec.structs import replace

    from train.config import DataSource
    from train.data.planned_source import PlannedSource
    from train.world import ALONE

    several = [DataSource(path=str(folder)) for folder in together] if len(together) > 1 else []
    section = replace(section, data=several, validation_data="", data_temperature=1.0)
    source = PlannedSource("" if several else str(together[0]), section)
    if not section.validation_fraction:
        return source, everything, everything
    return source, *source.hold_out(section.validation_fraction, ALONE)


def everything(index: np.ndarray) -> np.ndarray:
    return np.ones(len(index), bool)


def item_of(sample: Sample, folder: str, row: int) -> Item:
    from shards.columns import audio_hash

    facts = sample.facts
    return Item(
        id=facts.id,
        speaker=facts.speaker,
        text=facts.texts[facts.target_text],
        reference=facts.reference.path,
        reference_text=facts.texts[facts.reference_text],
        real=facts.target.path,
        dialect=dialect_of({**(facts.misc or {}), **facts.extra}),
        dataset=folder,
        row=row,
        audio=[number for number in map(audio_hash, (facts.reference, facts.target)) if number],
    )


class StoredSamples:
    """The samples behind items of data sets, one at a time. Items of files have none."""

    def __init__(self) -> None:
        self._opened: dict[str, tuple[np.ndarray, SampleReader, list[str] | None]] = {}

    def of(self, item: Item) -> Sample | None:
        """Raises ShardError."""
        if item.row is None:
            return None
        index, reader, _ = self._open(item.dataset)
        return reader.read(index[item.row])

    def rules_of(self, item: Item) -> list[str] | None:
        """`text.normalize` of the item's data set; None for a file, and where the data set does not say."""
        return None if item.row is None else self._open(item.dataset)[2]

    def _open(self, folder: str) -> tuple[np.ndarray, SampleReader, list[str] | None]:
        from shards.manifest import open_dataset, text_rules
        from shards.reader import SampleReader

        if folder not in self._opened:
            dataset, index = open_dataset(Path(folder))
            self._opened[folder] = index, SampleReader(Path(folder)), text_rules(dataset)
        return self._opened[folder]


def read_samples(items: Items) -> Iterator[tuple[Item, Sample]]:
    """The samples behind the items of data sets, in their order."""
    stored = StoredSamples()
    for item in items.items:
        sample = stored.of(item)
        assert sample is not None
        yield item, sample


def in_words_of(sample: Sample, rules: TextSection, tokenizer: Any) -> Sample:
    """The sample with its texts as a voice of these rules was trained on them, where its data set was made with others."""
    import dataclasses

    import msgspec

    from preprocess.text import clean
    from shards.sequence import encode_text

    facts = sample.facts
    spoken = {facts.reference_text, facts.target_text}
    texts = [clean(text, rules)[0] for text in facts.texts]
    texts = [text.strip() if number in spoken else text for number, text in enumerate(texts)]
    if texts == facts.texts:
        return sample
    ids = [encode_text(tokenizer, text) for text in texts]
    facts = msgspec.structs.replace(facts, texts=texts, text_token_counts=[len(item) for item in ids])
    return dataclasses.replace(sample, facts=facts, text_ids=np.concatenate(ids))


def training_overlap(items: Items, train_data: Sequence[Path], section: TrainSection) -> str:
    """One line: which evaluated speakers and audio files training on these data sets has seen. Raises ShardError.

    A part of a file is an audio of its own, as in stage one. Without columns.npy every sample is read for its audio.
    """
    from shards.index import hash64

    source, trained, _ = split(train_data, section)
    rows = np.flatnonzero(trained(source.index))
    audio = audio_of(source, rows)
    known = {item.speaker for item in items.items}
    seen = np.isin(np.array([hash64(name) for name in known], np.uint64), source.index["speaker"][rows]).sum()
    hashes = sorted({number for item in items.items for number in item.audio or hashes_of(item)})
    seen_audio = np.isin(np.array(hashes, np.uint64), audio).sum()
    where = ", ".join(map(str, train_data)) + (", held-out speakers left out" if section.validation_fraction else "")
    if not seen and not seen_audio:
        return f"unseen: none of the {len(known)} speakers and {len(hashes)} audio files are trained on ({where})"
    return (
        f"SEEN IN TRAINING: {seen} of {len(known)} speakers and {seen_audio} of {len(hashes)} audio files are trained on "
        f"({where}); figures below say how well training was learned, not how well a new voice is cloned"
    )


def audio_of(source: PlannedSource, rows: np.ndarray) -> np.ndarray:
    """`audio_hash` [2 n] uint64 of the references and targets of these rows."""
    from shards.columns import audio_hash

    columns = source.columns()
    if columns is not None:
        return np.concatenate([columns["reference_audio"][rows], columns["target_audio"][rows]])
    facts = (source.reader.read(source.index[row]).facts for row in rows)
    return np.array([audio_hash(audio) for found in facts for audio in (found.reference, found.target)], np.uint64)


def hashes_of(item: Item) -> list[int]:
    """`audio_hash` of an item's files, of their parts where the list says how long these are."""
    import hashlib

    from shards.index import hash64

    found = []
    for name, segment in ((item.reference, item.reference_segment), (item.real, item.real_segment)):
        if name and is_file(name):
            with Path(name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            part = "" if segment.is_whole else f" {segment.offset_s:.3f} {segment.duration_s or 0:.2f}"
            found.append(hash64(digest + part) or 1)
    return found
