"""The part of an audio file that a row means: ChatML `offset` and `duration` in seconds, or the whole file.

In: two numbers of a list. Out: bounds in samples and the key under which features are kept. A second is turned into
samples by rounding both ends alike, so segments that touch in the list touch in the file; the price is that an end may
lie ROUNDING_S behind the file, which is how far lists that round to centiseconds are off.
"""

from __future__ import annotations

import hashlib
import math

import msgspec

from preprocess.reasons import AudioFault

ROUNDING_S = 0.0051
MAX_S = 1e9  # 30 years: no recording is longer, and sums and products of such numbers are finite
SHARED_S = 0.1  # more than this of one file in reference and target is the same audio


class Segment(msgspec.Struct, frozen=True):
    """`duration_s` of a file from `offset_s` on; a duration of None goes to the end."""

    offset_s: float = 0.0
    duration_s: float | None = None

    @property
    def is_whole(self) -> bool:
        return self.offset_s == 0 and self.duration_s is None

    def check(self) -> None:
        """Raises AudioFault for numbers that name no part of any file."""
        if not 0 <= self.offset_s <= MAX_S:
            raise AudioFault("audio_segment", f"offset {self.offset_s!r} s; expected 0 to {MAX_S:g}")
        if self.duration_s is not None and not 0 < self.duration_s <= MAX_S:
            raise AudioFault(
                "audio_segment", f"duration {self.duration_s!r} s; expected more than 0 and at most {MAX_S:g}, or none"
            )

    def start(self, sample_rate: int) -> int:
        """The first sample."""
        return round(self.offset_s * sample_rate)

    def end(self, sample_rate: int) -> int | None:
        """The sample behind the last one; None is the end of the file."""
        return None if self.duration_s is None else round((self.offset_s + self.duration_s) * sample_rate)

    def check_read(self, num_read: int, sample_rate: int) -> None:
        """Hold what was read from `start` on against the segment. Raises AudioFault where the file ends before it."""
        end = self.end(sample_rate)
        wanted = 1 if end is None else end - self.start(sample_rate) - math.ceil(ROUNDING_S * sample_rate)
        if not self.is_whole and num_read < max(1, wanted):
            raise AudioFault(
                "audio_segment",
                f"{self} of a file that ends at {self.offset_s + num_read / sample_rate:.3f} s"
                if num_read
                else f"{self} begins behind the end of the file",
            )

    def key(self, file_sha256: str) -> str:
        """What the features of this part are kept under: the file's own sha256 for the whole file."""
        if self.is_whole:
            return file_sha256
        return hashlib.sha256(f"{file_sha256} {self.offset_s!r} {self.duration_s!r}".encode()).hexdigest()

    def shares_with(self, other: Segment) -> bool:
        """Whether two parts of one file are, to the ear, the same audio: they have more than SHARED_S in common."""
        ends = [part.offset_s + (math.inf if part.duration_s is None else part.duration_s) for part in (self, other)]
        return min(ends) - max(self.offset_s, other.offset_s) > SHARED_S

    def __str__(self) -> str:
        end = "the end" if self.duration_s is None else f"{self.offset_s + self.duration_s:g} s"
        return f"the segment {self.offset_s:g} s to {end}"


WHOLE = Segment()
