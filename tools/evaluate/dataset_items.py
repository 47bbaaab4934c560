"""Items of a data set that `preprocess` made: its held-out speakers where something is held out, else all of them.

In: the folder, and the share and seed that training holds out with (`train.validation_fraction`, `train.seed`). Out: items
whose audio is the stored codes. The real recordings are then heard through the codec: that is the best any voice made of
these codes can reach, so it is the right ceiling, and a worse one than the recordings themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.evaluate.items import Item, Items, dialect_of, with_distinct_ids

if TYPE_CHECKING:
    from preprocess.text import TextSection
    from shards.reader import SampleReader
    from shards.sample import Sample


def is_dataset(data: Path) -> bool:
    return (data / "dataset.json").is_file() or data.name == "dataset.json"


def dataset_items(data: Path, fraction: float, seed: int, limit: int | None = None) -> Items:
    """Items of the held-out speakers; of all where `fraction` is 0. Raises ShardError or ConfigError."""
    from shards.errors import DataError, ShardError
    from shards.manifest import open_dataset
    from shards.reader import SampleReader

    folder = data.parent if data.name == "dataset.json" else data
    _, index = open_dataset(folder)
    reader = SampleReader(folder)
    rows = unseen_rows(reader, index, fraction, seed) if fraction else np.arange(len(index))
    items: list[Item] = []
    skipped: list[str] = []
    for row in rows.tolist():
        if limit is not None and len(items) == limit:
            break
        try:
            items.append(item_of(reader.read(index[row]), row))
        except ShardError as error:
            skipped.append(str(error))
    if not items:
        raise DataError(f"{folder}: nothing to evaluate; {len(skipped)} samples could not be read")
    kind = f"held-out speakers of a data set ({fraction:g} of it, seed {seed})" if fraction else "data set"
    return Items(kind=kind, source=str(folder), items=with_distinct_ids(items), skipped=skipped)


def held_out_rows(index: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Rows [n] int64 of the index that training with these settings leaves out."""
    from train.data.validation_split import choose_speakers, of_speakers

    return np.flatnonzero(of_speakers(choose_speakers(index, seed, fraction), inside=True)(index))


def unseen_rows(reader: SampleReader, index: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Of these, those whose audio is not heard in training under another name either, as `train` evaluates; all where none is
    left."""
    from train.data.same_audio import without_places
    from train.data.validation_overlap import heard_places
    from train.data.validation_split import choose_speakers, of_speakers

    speakers = choose_speakers(index, seed, fraction)
    trained, held_out = (of_speakers(speakers, inside=inside) for inside in (False, True))
    places, _ = heard_places("the data set", reader, index, trained, held_out)
    left = np.flatnonzero(without_places(held_out, places)(index))
    return left if len(left) else np.flatnonzero(held_out(index))


def item_of(sample: Sample, row: int) -> Item:
    facts = sample.facts
    return Item(
        id=facts.id,
        speaker=facts.speaker,
        text=facts.texts[facts.target_text],
        reference=facts.reference.path,
        reference_text=facts.texts[facts.reference_text],
        real=facts.target.path,
        dialect=dialect_of({**(facts.misc or {}), **facts.extra}),
        row=row,
        audio_sha256=[digest for digest in (facts.reference.sha256, facts.target.sha256) if digest],
    )


def read_samples(items: Items) -> Iterator[tuple[Item, Sample]]:
    """The samples behind the items of a data set, in their order."""
    from shards.index import read_index
    from shards.reader import SampleReader

    folder = Path(items.source)
    index, reader = read_index(folder / "index.npy"), SampleReader(folder)
    for item in items.items:
        assert item.row is not None
        yield item, reader.read(index[item.row])


def rules_of(items: Items) -> list[str] | None:
    """`text.normalize` of the data set behind the items; None for a list, and where the data set does not say."""
    from shards.manifest import open_dataset, text_rules

    return text_rules(open_dataset(Path(items.source))[0]) if items.items[0].row is not None else None


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


def training_overlap(items: Items, train_data: Path, fraction: float, seed: int) -> str:
    """One line: which evaluated speakers and audio files training has seen. Raises ShardError."""
    from shards.manifest import open_dataset
    from shards.reader import SampleReader

    _, index = open_dataset(train_data)
    held = set(held_out_rows(index, fraction, seed).tolist()) if fraction else set()
    speakers: set[str] = set()
    audio: set[str] = set()
    reader = SampleReader(train_data)
    for row in range(len(index)):
        if row in held:
            continue
        facts = reader.read(index[row]).facts
        speakers.add(facts.speaker)
        audio |= {facts.reference.sha256, facts.target.sha256}
    known = {item.speaker for item in items.items}
    seen = known & speakers
    hashes = {digest for item in items.items for digest in item.audio_sha256 or hashes_of(item)}
    seen_audio = (hashes & audio) - {""}
    if not seen and not seen_audio:
        return f"unseen: none of the {len(known)} speakers and {len(hashes)} audio files stand in {train_data}"
    return (
        f"SEEN IN TRAINING: {len(seen)} of {len(known)} speakers and {len(seen_audio)} of {len(hashes)} audio files stand in "
        f"{train_data}; figures below say how well training was learned, not how well a new voice is cloned"
    )


def hashes_of(item: Item) -> list[str]:
    import hashlib

    found = []
    for name in (item.reference, item.real):
        if name and Path(name).is_file():
            with Path(name).open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found
