"""What stage one may do to a clip before it is encoded, both off by default: cut the silence at its edges, set its loudness.

In: a decoded file and the section [audio]. Out: the same file, edited, with what was done in its measures; with both off, the
very same object. Silence is what lies below -34 dB of the clip's peak, as in the warnings. Loudness is that of the speech (the
frames within 30 dB of the loudest), so long pauses do not make a clip louder. The price: a gain stops where the peak would clip.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import msgspec
import numpy as np

from preprocess.audio import AudioFile, AudioLimits
from preprocess.reasons import AudioFault
from preprocess.segment import WHOLE, Segment
from shards.sample import AudioFacts

MAX_PEAK = 0.99


class AudioSection(msgspec.Struct, frozen=True, kw_only=True):
    max_edge_silence_s: Annotated[float, msgspec.Meta(ge=0.0, le=60.0)] = 0.0  # 0: off
    target_rms_db: Annotated[float, msgspec.Meta(ge=-60.0, le=0.0)] = 0.0  # 0: off

    @property
    def is_off(self) -> bool:
        return self.max_edge_silence_s == 0 and self.target_rms_db == 0


def edited(audio: AudioFile, section: AudioSection, limits: AudioLimits) -> AudioFile:
    """Raises AudioFault where less than the shortest clip is left. What was edited once is not edited again."""
    if section.is_off or audio.measures.cut_start_s is not None or audio.measures.gain_db is not None:
        return audio
    wave, measures = audio.wave, audio.measures
    rate = measures.sample_rate
    if section.max_edge_silence_s:
        kept = section.max_edge_silence_s
        lead = max(0, math.floor((measures.leading_silence_s - kept) * rate))
        tail = max(0, math.floor((measures.trailing_silence_s - kept) * rate))
        wave = wave[lead : len(wave) - tail]
        duration_s = len(wave) / rate
        if duration_s < limits.min_duration_s:
            detail = f"{duration_s:.3f} s without the silence at its edges, at least {limits.min_duration_s:g} s"
            raise AudioFault("audio_too_short", detail)
        measures = msgspec.structs.replace(
            measures,
            duration_s=duration_s,
            leading_silence_s=measures.leading_silence_s - lead / rate,
            trailing_silence_s=measures.trailing_silence_s - tail / rate,
            cut_start_s=round(lead / rate, 6),
            cut_end_s=round(tail / rate, 6),
            warnings=[
                code
                for code in measures.warnings
                if not (code == "leading_silence" and lead) and not (code == "trailing_silence" and tail)
            ],
        )
    if section.target_rms_db:
        headroom_db = 20 * math.log10(MAX_PEAK / float(np.abs(wave).max()))
        wanted_db = section.target_rms_db - measures.sound.level_db
        gain_db = min(wanted_db, max(0.0, headroom_db))
        wave = (wave * np.float32(10 ** (gain_db / 20))).astype(np.float32)
        measures = msgspec.structs.replace(measures, gain_db=round(gain_db, 3))
    return dataclasses.replace(audio, wave=wave, measures=measures)


def segment_of(facts: AudioFacts) -> Segment:
    """The part of its file that a stored clip was made of, with the silence that was cut."""
    cut_s = sum(_or_zero(part) for part in (facts.cut_start_s, facts.cut_end_s))
    return WHOLE if facts.offset_s is msgspec.UNSET else Segment(facts.offset_s, facts.duration_s + cut_s)


def as_encoded(audio: AudioFile, facts: AudioFacts) -> AudioFile:
    """The recording of a stored clip, decoded again: cut and made as loud as it was when it was encoded."""
    rate = audio.measures.sample_rate
    lead, tail = round(_or_zero(facts.cut_start_s) * rate), round(_or_zero(facts.cut_end_s) * rate)
    wave = audio.wave[lead : len(audio.wave) - tail]
    if gain_db := _or_zero(facts.gain_db):
        wave = (wave * np.float32(10 ** (gain_db / 20))).astype(np.float32)
    return dataclasses.replace(audio, wave=wave)


def _or_zero(value: float | msgspec.UnsetType) -> float:
    return 0.0 if value is msgspec.UNSET else value
