"""Whether the data set in train.validation_data is apart from the one trained on.

In: both data sets. Out: an error where one audio is learned on one side and heard on the other, held-out rows to leave out where
both only have the same reference, a warning where only voices are common. No held-out audio is heard in training. The index
holds no hash of an audio, so samples are compared in two steps: lengths, text tokens and speaker of every index row, which
takes no reading, then the codes of up to 512 pairs that agree in them. Where both sets have columns.npy, its hashes also find
an audio under another speaker, and texts that both have, which is a warning; where not, same_audio.py looks for the audio. The
price: behind a URL nothing is read for it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.columns import common_rows, read_columns, shared_audio
from shards.errors import ConfigError, ShardError
from shards.manifest import Dataset, open_dataset
from shards.reader import SampleReader
from shards.sample import AudioFacts, Sample
from train.data.plan import CHUNK, Keep
from train.data.same_audio import Common, Rows, place_of, same_audio
from train.data.scramble import scramble

log = logging.getLogger("train")
KEY = "train.validation_data"
MAX_READ = 512  # training samples that are compared by their codes
MAX_PARTNERS = 4  # held-out samples that each is compared with
MAX_NAMED = 3
FOLDERS_ABOVE = 3  # DATA/shards/000/shard-000000.tar


@dataclass(frozen=True)
class OpenData:
    """A data set with its index [n]; `reader` None where reading a sample would fetch a shard."""

    name: str
    dataset: Dataset
    index: np.ndarray
    reader: SampleReader | None


def require_apart(trained: OpenData, held_out: OpenData) -> list[int]:
    """Places (`place_of`) of held-out rows to leave out, whose reference is one of training too; warns of common speakers.

    Raises ConfigError where `held_out` is trained on.
    """
    left_out: list[int] = []
    what = f"{KEY} = {held_out.name!r}"
    if trained.dataset.digest == held_out.dataset.digest:
        raise ConfigError(
            f"{what} is the data set that is trained on ({len(held_out.index)} samples, digest "
            f"{held_out.dataset.digest[:16]}): such losses fall while speech gets worse; give another one, or hold out "
            "speakers of this one with train.validation_fraction"
        )
    rows, keys = look_alikes(trained.index, held_out.index)
    if trained.reader and held_out.reader:
        refuse_learned(what, find_common(trained, held_out, rows, keys).values())
        found = compare_columns(what, trained, held_out)
        if found is None:
            sides = (
                Rows(trained.name, trained.reader, trained.index),
                Rows(held_out.name, held_out.reader, held_out.index),
            )
            common = same_audio(*sides, read_clips).values()
            refuse_learned(what, (pair for pair, _ in common))
            found = np.array(sorted(set[int]().union(*(places for _, places in common))), np.int64)
        left_out = place_of(held_out.index[found]).tolist()
    elif len(rows):
        log.warning(
            "%s: %d training samples have speaker and lengths of held-out ones; whether their audio is the same is not "
            "checked behind a URL",
            what,
            len(rows),
        )
    warn_of_speakers(what, trained.dataset, held_out.dataset)
    return left_out


def compare_columns(what: str, trained: OpenData, held_out: OpenData) -> np.ndarray | None:
    """Where both sets have columns: the same audio under any speaker, and the same texts, of all samples.

    Returns held-out rows [m] whose reference is one of training too; None where not every hash is known. Raises ConfigError
    for audio that is learned.
    """
    tables = [
        read_columns(Path(data.name), len(data.index)) if data.reader and Path(data.name).is_dir() else None
        for data in (trained, held_out)
    ]
    if tables[0] is None or tables[1] is None:
        log.debug("%s: texts are not compared: one of both data sets has no columns.npy here", what)
        return None
    audio = shared_audio(tables[0], tables[1])
    if len(audio):
        raise ConfigError(
            f"{what}: {len(audio)} of its {len(tables[1])} samples have audio of training ({_named(held_out, audio)}): leave "
            "them out of one of both lists and run preprocess again, or hold out speakers with train.validation_fraction"
        )
    texts = common_rows(tables[1]["target_text"], tables[0]["target_text"])
    if len(texts):
        log.warning(
            "%s: %d of its %d texts are trained on as well (%s); their losses say less about new sentences; "
            "`inspect-shards compare` tells more",
            what,
            len(texts),
            len(tables[1]),
            _named(held_out, texts),
        )
    clips = [table[name] for table in (tables[0], tables[1]) for name in ("reference_audio", "target_audio")]
    is_all_known = all(column.all() for column in clips)
    return common_rows(tables[1]["reference_audio"], tables[0]["reference_audio"]) if is_all_known else None


def _named(data: OpenData, rows: np.ndarray) -> str:
    clips = (clips_of(data, row) for row in rows[:MAX_NAMED].tolist())
    shown = "; ".join(found[-1][0] for found in clips if found)
    return shown + ("; ..." if len(rows) > MAX_NAMED else "")


def heard_places(
    name: str, reader: SampleReader, index: np.ndarray, trained: Keep, held_out: Keep
) -> tuple[list[int], list[str]]:
    """(places of held-out rows with audio that is heard in training, of one data set; how the first are named)."""
    sides = Rows(name, reader, index, trained), Rows(name, reader, index, held_out)
    common = list(same_audio(*sides, read_clips).values())
    rows = sorted(set[int]().union(*(rows for _, rows in common)))
    names = [f"trained {pair.trained}, held out {pair.held_out}" for pair, _ in common[:MAX_NAMED]]
    return place_of(index[rows]).tolist(), names


def refuse_learned(what: str, common: Iterable[Common]) -> None:
    """Raises ConfigError where one of these clips is a target on one of both sides."""
    learned = [pair for pair in common if pair.is_learned]
    if learned:
        shown = "; ".join(f"trained {pair.trained}, held out {pair.held_out}" for pair in learned[:MAX_NAMED])
        shown += "; ..." if len(learned) > MAX_NAMED else ""
        raise ConfigError(
            f"{what}: at least {len(learned)} clips of it are trained on ({shown}): leave them out of one of both lists and "
            "run preprocess again, or hold out speakers with train.validation_fraction"
        )


def warn_of_speakers(what: str, trained: Dataset, held_out: Dataset) -> None:
    names = sorted(trained.speakers.keys() & held_out.speakers.keys())
    if names:
        log.warning(
            "%s: %d of its %d speakers, with %d of its %d samples, are trained on as well: %s%s; their losses say nothing "
            "about new voices",
            what,
            len(names),
            len(held_out.speakers),
            sum(held_out.speakers[name] for name in names),
            held_out.num_samples,
            ", ".join(names[:MAX_NAMED]),
            ", ..." if len(names) > MAX_NAMED else "",
        )


def row_keys(rows: np.ndarray) -> np.ndarray:
    """Index rows [n] -> uint64 [n, 3]: reference clip, target clip (speaker, frames, text tokens), and all lengths together."""
    columns = ("reference_frames", "num_reference_text_tokens", "target_frames", "num_target_text_tokens")
    reference, reference_text, target, target_text = (rows[column].astype(np.uint64) for column in columns)
    speaker = scramble(rows["speaker"].astype(np.uint64), 0)
    bits = np.uint64(16)
    clips = (speaker ^ (reference << bits | reference_text), speaker ^ (target << bits | target_text))
    lengths = ((reference << bits | reference_text) << bits | target) << bits | target_text
    return np.stack((*clips, scramble(lengths, 1)), axis=1)


def look_alikes(trained: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(training rows [m] int64 that share a key with a held-out row, most keys first; sorted held-out keys [h] uint64)."""
    known = np.unique(
        np.concatenate([row_keys(chunk).ravel() for chunk in chunks(held_out)] or [np.empty(0, np.uint64)])
    )
    found, shared = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, chunk in enumerate(chunks(trained)):
        hits = np.isin(row_keys(chunk), known).sum(axis=1)
        found.append(number * CHUNK + np.flatnonzero(hits))
        shared.append(hits[hits > 0])
    order = np.argsort(-np.concatenate(shared), kind="stable")
    return np.concatenate(found)[order], known


def chunks(index: np.ndarray) -> Iterable[np.ndarray]:
    return (index[start : start + CHUNK] for start in range(0, len(index), CHUNK))


def find_common(trained: OpenData, held_out: OpenData, rows: np.ndarray, known: np.ndarray) -> dict[str, Common]:
    """Clips by what they are that both sets hold, of the first look-alike `rows`.

    Samples that cannot be read are left to whoever trains them.
    """
    partners = partners_of(held_out.index, known, trained.index[rows[:MAX_READ]])
    held_out_clips: dict[int, list[tuple[str, str, bool]]] = {}
    common: dict[str, Common] = {}
    for row, others in zip(rows[:MAX_READ].tolist(), partners, strict=True):
        for other in others:
            if other not in held_out_clips:
                held_out_clips[other] = clips_of(held_out, other)
        for name, audio, is_target in clips_of(trained, row):
            for other_name, other_audio, other_is_target in (
                clip for other in others for clip in held_out_clips[other]
            ):
                if audio == other_audio:
                    pair = Common(name, other_name, is_target or other_is_target)
                    if audio not in common or pair.is_learned > common[audio].is_learned:
                        common[audio] = pair
    return common


def partners_of(held_out: np.ndarray, known: np.ndarray, rows: np.ndarray) -> list[list[int]]:
    """For each training row, the first held-out rows that share a key with it."""
    keys = row_keys(rows)
    wanted = np.intersect1d(keys, known)
    places: dict[int, list[int]] = {}
    for number, chunk in enumerate(chunks(held_out)):
        chunk_keys = row_keys(chunk)
        for row, column in np.argwhere(np.isin(chunk_keys, wanted)).tolist():
            rows_of_key = places.setdefault(int(chunk_keys[row, column]), [])
            if len(rows_of_key) < MAX_PARTNERS:
                rows_of_key.append(number * CHUNK + row)
    return [sorted({place for key in row for place in places.get(key, [])}) for row in keys.tolist()]


def clips_of(data: OpenData, row: int) -> list[tuple[str, str, bool]]:
    """(how it is named, what it is, whether it is a target) of both clips of a sample; none where it cannot be read."""
    assert data.reader
    return read_clips(data.reader, data.index[row])


def read_clips(reader: SampleReader, row: np.ndarray) -> list[tuple[str, str, bool]]:
    """The same of an index row."""
    try:
        sample = reader.read(row)
    except ShardError as error:
        log.debug("not compared: %s", error)
        return []
    return [
        (clip_name(sample, sample.facts.reference), clip_digest(sample.reference_codes), False),
        (clip_name(sample, sample.facts.target), clip_digest(sample.target_codes), True),
    ]


def clip_name(sample: Sample, audio: AudioFacts) -> str:
    return f"{audio.path} (sample {sample.key})"


def clip_digest(codes: np.ndarray) -> str:
    """Of codes [8, T]: one codec makes one audio the same codes, in whatever file it came."""
    return hashlib.sha256(np.ascontiguousarray(codes, "<u2").tobytes()).hexdigest()


def data_of_shards(urls: Iterable[str]) -> list[OpenData]:
    """The data sets of stage one that local shards of a stream lie in."""
    folders: dict[Path, None] = {}
    for url in urls:
        if "://" not in url:
            above = list(Path(url).resolve().parents)[:FOLDERS_ABOVE]
            folders.update(dict.fromkeys([folder for folder in above if (folder / "dataset.json").is_file()][:1]))
    return [OpenData(str(folder), *open_dataset(folder), SampleReader(folder)) for folder in folders]
