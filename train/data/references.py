"""`train.reference = "same_speaker"`: another reference each epoch, drawn of the speaker's other clips.

In: the index, hashes of its clips where there are any, and which rows are trained on. Out: for any epoch and row the clip that
serves as its reference, a pure function of (seed, epoch, row), so that plans have true lengths and ranks agree; and the sample
with that clip in place. Never the target itself or the same audio; never a clip of held-out rows. The surprising rule: without
columns.npy no hash is known, and then a clip as long as the target is taken for the same audio, which costs a few candidates.
The price: a second read for each sample, and about 50 bytes a sample in memory.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np

from shards.errors import ConfigError
from shards.sample import Sample
from shards.sequence import SequenceBuilder
from train.data.data_sets import JoinedSets
from train.data.scramble import scramble

LISTED = -1  # in place of a clip's number: the reference that the list names
CHUNK = 1 << 16


class SpeakerReferences:
    """Clips of one index by speaker; clip 2 r is the reference of row r, clip 2 r + 1 its target."""

    def __init__(
        self,
        index: np.ndarray,
        columns: list[np.ndarray | None],
        first_rows: tuple[int, ...],
        is_trained: np.ndarray,
        seed: int,
        fits: Callable[[np.ndarray], np.ndarray],
        with_targets: bool,
        barred: np.ndarray | None = None,
    ) -> None:
        """index [n] of sets that begin at `first_rows` and their columns; is_trained [n] bool, whose clips may be used;
        `fits`: index rows [m] -> whether their sequence fits a pack, [m] bool; `with_targets`: whether targets may be
        references (they hold no Whisper features); `barred`: hashes of audio that must not be used."""
        self._index = index
        self._seed = seed
        self._fits = fits
        groups = np.repeat(speakers_of_sets(index["speaker"], first_rows), 2)  # [2 n]
        keys = audio_keys(index, columns, first_rows).reshape(-1)  # [2 n]
        usable = np.repeat(is_trained, 2)
        if not with_targets:
            usable[1::2] = False
        if barred is not None:
            usable &= ~np.isin(keys, barred)
        # Targets before references, so that of one audio the target is taken, whose text is sure to be said in it.
        order = np.lexsort((np.arange(len(keys)) % 2 == 0, ~usable, keys, groups))
        is_new = np.ones(len(order), bool)
        is_new[1:] = (np.diff(keys[order]) != 0) | (np.diff(groups[order]) != 0)
        audio = np.cumsum(is_new) - 1  # of each clip in this order
        first = order[is_new]  # of each audio of each speaker the first clip
        is_candidate = usable[first]
        self._candidates = first[is_candidate]  # clips by speaker, an audio once
        place = np.where(is_candidate, np.cumsum(is_candidate) - 1, -1)  # of each audio among the candidates
        own = np.empty(len(keys), np.int64)
        own[order] = place[audio]
        self._own = own[1::2].copy()  # [n] where each row's target stands among the candidates; -1: it does not
        num_groups = int(groups.max(initial=-1)) + 1
        self._ends = np.cumsum(np.bincount(groups[self._candidates], minlength=num_groups))  # [g]
        self._groups = groups[::2].copy()  # [n]
        sizes = self._sizes(np.arange(len(index)))
        self.num_trained = int(is_trained.sum())
        self.num_listed = int((is_trained & (sizes == 0)).sum())  # rows whose speaker has no other clip

    def fitting(self, fits: Callable[[np.ndarray], np.ndarray]) -> SpeakerReferences:
        """The same draws under another budget, which `fits` knows; arrays are shared."""
        other = copy.copy(self)
        other._fits = fits
        return other

    def clips(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """The reference of each row [m] in this epoch: numbers of clips int64, LISTED where none is drawn."""
        sizes = self._sizes(rows)
        numbers = scramble(scramble(rows.astype(np.uint64), self._seed + 104729), epoch)
        drawn = (numbers % np.maximum(sizes, 1).astype(np.uint64)).astype(np.int64) + self._starts(rows)
        own = self._own[rows]
        drawn += (own >= 0) & (drawn >= own)  # steps over the target
        clips = np.full(len(rows), LISTED, np.int64)
        clips[sizes > 0] = self._candidates[drawn[sizes > 0]]
        clips[clips == 2 * rows] = LISTED  # its own reference: nothing to read
        clips[~self._fits(self.with_clips(rows, clips))] = LISTED
        return clips

    def found(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Index rows [m] as they are in this epoch: with the lengths of the references drawn."""
        return self.with_clips(rows, self.clips(epoch, rows))

    def with_clips(self, rows: np.ndarray, clips: np.ndarray) -> np.ndarray:
        """Index rows [m], a copy, with the lengths of these references."""
        found = np.array(self._index[rows])
        is_drawn = clips != LISTED
        donors, is_target = self._index[clips[is_drawn] >> 1], clips[is_drawn] % 2 == 1
        for name, of_target in (
            ("reference_frames", donors["target_frames"]),
            ("num_reference_text_tokens", donors["num_target_text_tokens"]),
            ("mel_samples", 0),
        ):
            values = found[name].copy()
            values[is_drawn] = np.where(is_target, of_target, donors[name])
            found[name] = values
        return found

    def _starts(self, rows: np.ndarray) -> np.ndarray:
        groups = self._groups[rows]
        return np.where(groups > 0, self._ends[groups - 1], 0)

    def _sizes(self, rows: np.ndarray) -> np.ndarray:
        """How many clips [m] may be drawn."""
        return self._ends[self._groups[rows]] - self._starts(rows) - (self._own[rows] >= 0)


def draw_references(
    data: JoinedSets,
    builder: SequenceBuilder,
    is_trained: Callable[[np.ndarray], np.ndarray] | None,
    seed: int,
    held_out: np.ndarray | None,
) -> SpeakerReferences:
    """Of these data sets, of every length (`fitting` sets a budget). `is_trained`: a filter of index rows, None for all;
    `held_out`: columns of validation data, whose audio is never drawn.

    Raises ConfigError where references cannot be drawn.
    """
    if data.is_remote:
        raise ConfigError(
            'train.reference = "same_speaker" reads clips from all shards at any time, and those behind a URL are fetched '
            'window by window: copy the data set to a local disk, or set it to "as_listed"'
        )
    if builder.layout == "as_written":
        raise ConfigError(
            'train.reference = "same_speaker" needs sequence.layout "clone": turns of layout "as_written" stay as they '
            'were written, with their own reference; set it to "as_listed"'
        )
    index = data.index
    trained = np.ones(len(index), bool)
    for start in range(0, len(index), CHUNK) if is_trained else ():
        trained[start : start + CHUNK] = is_trained(index[start : start + CHUNK]) if is_trained else True
    return SpeakerReferences(
        index,
        [one.columns() for one in data.sets],
        data.first_rows,
        trained,
        seed,
        lambda rows: np.ones(len(rows), bool),
        with_targets=not builder.uses_whisper,
        barred=None if held_out is None else np.concatenate([held_out["target_audio"], held_out["reference_audio"]]),
    )


def speakers_of_sets(speakers: np.ndarray, first_rows: tuple[int, ...]) -> np.ndarray:
    """[n] int64: numbers of speakers; one name in two sets is two speakers, for it may be two people."""
    groups = np.empty(len(speakers), np.int64)
    number = 0
    for start, end in itertools.pairwise(first_rows):
        names, inverse = np.unique(speakers[start:end], return_inverse=True)
        groups[start:end] = number + inverse
        number += len(names)
    return groups


def audio_keys(index: np.ndarray, columns: list[np.ndarray | None], first_rows: tuple[int, ...]) -> np.ndarray:
    """uint64 [n, 2] of reference and target: equal where the audio is, by hash; in a set without all hashes, by frames."""
    keys = np.empty((len(index), 2), np.uint64)
    for table, start, end in zip(columns, first_rows[:-1], first_rows[1:], strict=True):
        for side, name in enumerate(("reference", "target")):
            keys[start:end, side] = index[f"{name}_frames"][start:end] if table is None else table[f"{name}_audio"]
        if table is not None and not keys[start:end].all():
            for side, name in enumerate(("reference", "target")):
                keys[start:end, side] = index[f"{name}_frames"][start:end]
    return keys


def with_reference(sample: Sample, donor: Sample, is_target: bool) -> Sample:
    """The sample with a clip of another one as its reference: codes, text and Whisper features."""
    theirs = donor.facts
    item = theirs.target_text if is_target else theirs.reference_text
    ids = donor.text_item_ids(item)
    facts = msgspec.structs.replace(
        sample.facts,
        texts=[*sample.facts.texts, theirs.texts[item]],
        text_token_counts=[*sample.facts.text_token_counts, len(ids)],
        reference_text=len(sample.facts.texts),
        reference=theirs.target if is_target else theirs.reference,
        mel=None if is_target else theirs.mel,
    )
    return replace(
        sample,
        facts=facts,
        text_ids=np.concatenate([sample.text_ids, ids]),
        reference_codes=donor.target_codes if is_target else donor.reference_codes,
        reference_mel_zst=None if is_target else donor.reference_mel_zst,
        reference_whisper_zst=None if is_target else donor.reference_whisper_zst,
    )
