"""Held-out speakers of several data sets: whoever shares a clip goes to the same side.

In: the joined index and its columns, which hold a hash of each audio. Out: held-out speakers, such that no audio is on both
sides in any role. One recording under two names (two data sets made of the same corpus) makes its speakers one. The price:
a clip that everybody shares, as one reference for all, leaves nobody to hold out, which is refused.
"""

from __future__ import annotations

import numpy as np

from shards.errors import CannotHoldOut
from train.data.validation_split import choose_speakers

ONE_SPEAKER = np.dtype([("speaker", "<u8")])


def choose_linked_speakers(
    index: np.ndarray, columns: np.ndarray, seed: int, fraction: float, first_rows: tuple[int, ...]
) -> np.ndarray:
    """Held-out speakers [v] uint64, sorted, of index and columns [n] of data sets that begin at `first_rows`.

    Raises CannotHoldOut where all are linked."""
    names, heads = linked_speakers(index["speaker"], [columns["target_audio"], columns["reference_audio"]])
    if len(names) > 1 and len(np.unique(heads)) == 1:
        raise CannotHoldOut(
            fraction,
            f"all {len(names)} speakers are linked by clips that they share (the same audio under several names), so none can "
            "be held out",
        )
    rows = np.empty(len(index), ONE_SPEAKER)
    rows["speaker"] = heads[np.searchsorted(names, index["speaker"])]
    chosen = choose_speakers(rows, seed, fraction, first_rows)
    return names[np.isin(heads, chosen)]


def linked_speakers(speakers: np.ndarray, audio: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Speakers and hashes of their clips, each [n] -> (names [s] uint64, sorted, and for each one name of its group).

    Hash 0 is an unknown audio and links nobody.
    """
    names, own = np.unique(speakers, return_inverse=True)
    known = [column != 0 for column in audio]
    people = np.concatenate([own[is_known] for is_known in known])
    clips = np.unique(
        np.concatenate([column[is_known] for column, is_known in zip(audio, known, strict=True)]), return_inverse=True
    )[1]
    people, clips = np.unique(np.stack([people, clips]), axis=1)
    heads = np.arange(len(names))
    while True:
        of_clip = np.full(int(clips.max(initial=-1)) + 1, len(names))
        np.minimum.at(of_clip, clips, heads[people])
        lower = heads.copy()
        np.minimum.at(lower, people, of_clip[clips])
        lower = lower[lower]  # a head's own head
        if (lower == heads).all():
            return names, names[heads]
        heads = lower
