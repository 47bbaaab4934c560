"""Why a row is rejected, and what is only warned about: every code of stage one, with one plain line each.

In: a code. Out: the code, when it stands in the lists below; anything else is a mistake of ours and raises at once. Every
reject is made by `reject`, every fault and warning is checked here, so no code reaches rejects.jsonl or dataset.json that
preprocess/README.md does not explain (tests/test_preprocess_reasons.py compares them).
"""

from __future__ import annotations

from collections.abc import Iterable

from shards.printable import printable, redact
from shards.writer import Reject

# Reason code -> what it means. The closed list of why a row is rejected (rejects.jsonl).
REASONS = {
    "row_invalid": "the row does not have the ChatML form; the detail names the path inside",
    "duplicate_id": "an earlier row has the same id",
    "audio_count": "not exactly one reference and one target audio, or the target is not in an assistant turn",
    "text_missing": "no reference text or no target text",
    "text_unclear": "what stands where a text belongs may be a label, an instruction or one of several texts",
    "text_control_token": "a text contains <|...|>, which would become a control token; only a system's text may, for a scene",
    "text_control_character": "a text holds NUL or another control character: damaged bytes, and the letters around may be, too",
    "text_too_short": "a text has fewer than text.min_chars characters",
    "text_too_long": "a text has more than text.max_chars characters",
    "text_too_fast": "more than text.max_chars_per_s characters per second: text and audio do not belong together",
    "text_too_slow": "fewer than text.min_chars_per_s characters per second: most of what is said is not in the text",
    "text_not_arabic": "fewer Arabic letters than text.min_arabic_share",
    "audio_not_a_file": "an address (http, s3, file, data), or audio inside the list, where the path of a file belongs",
    "audio_missing": "the file does not exist or is not a regular file",
    "audio_unreadable": "no decoder knows the file, or the file system does not give it",
    "audio_truncated": "the file ends before its header says",
    "audio_not_finite": "samples that are NaN or infinite",
    "audio_silent": "no sample reaches -60 dB of full scale",
    "audio_clipped": "more than preprocess.max_clipped_share of the samples stand at full scale or beyond",
    "audio_too_short": "shorter than preprocess.min_duration_s",
    "audio_too_long": "longer than preprocess.max_duration_s",
    "audio_sample_rate": "a sample rate outside 4 to 384 kHz: no recording of speech, or a damaged header",
    "audio_too_large": "a file of more than 1 GiB, or one that does not fit the memory when decoded",
    "audio_scale": "samples far beyond full scale: integers written as floats",
    "audio_several": "joined files, several tracks or a stale header: a decoder would read only the first part",
    "audio_segment": "offset and duration of an audio item name a part that the file does not have",
    "reference_is_target": "reference and target are the same audio: that teaches copying, not cloning",
    "worker_died": "the process that worked on this row was killed each time",
}

# Warning code -> what it means. The row is kept; the sample and the data set count it.
ROLE_WARNINGS = {  # of an audio or its text; written with the role in front: target_low_sample_rate
    "low_sample_rate": "below 16 kHz: half of what the codec could carry is not there",
    "quiet": "the peak stays below -30 dB of full scale",
    "dc_offset": "the wave does not swing around zero",
    "leading_silence": "more than a second before the first sound",
    "trailing_silence": "more than a second after the last sound: the model learns to stop late",
    "text_slow": "fewer than twice text.min_chars_per_s characters per second: is all of it in the text?",
    "text_garbled": "looks like a wrong encoding: UTF-8 read as a code page, U+FFFD, private letters, ???? for words",
    "text_presentation_forms": "letters as shapes (U+FB50-FDFF, U+FE70-FEFC); normalize presentation_forms writes plain ones",
    "narrow_band": "the sound ends below 3/4 of what the rate could carry: brought up from 8 or 16 kHz, or packed hard",
    "noisy": "less than 10 dB between the speech and the quietest moments: the noise is learned with the voice",
    "channels_cancel": "the channels cancel each other when mixed (one is upside down); the louder one was taken",
}
TEXT_WARNINGS = {
    "text_behind_target": "a text stands behind the target audio; it was not taken for what is said in it",
    "texts_are_the_same": "reference and target have the same text, in different audio",
    "target_text_from_instruction": "the assistant's turn has no text; the user's last text was taken",
    "instruction_text_differs": "the instruction asks for another text than the assistant's, which was taken",
    "speaker_from_reference": "no speaker is named; the reference file stands for one: a voice of two files counts as two",
    "invisible_marks_removed": "marks without a sound (byte order, direction, zero width, soft hyphen) were removed from a text",
    "normalized_nfc": "text.normalize changed a text (Unicode composition)",
    "normalized_tatweel": "text.normalize removed tatweel",
    "normalized_presentation_forms": "text.normalize wrote letters of the presentation blocks as plain ones",
    "normalized_digits": "text.normalize wrote Arabic-Indic digits as ASCII",
}
MAX_FIELD_CHARS = 500  # of an id, a path or a detail in rejects.jsonl
ROLES = ("reference", "target")
WRITTEN_WARNINGS = frozenset({f"{role}_{code}" for role in ROLES for code in ROLE_WARNINGS} | TEXT_WARNINGS.keys())


def known_reason(reason: str) -> str:
    """The reason itself. Raises ValueError for one that REASONS does not explain."""
    if reason not in REASONS:
        raise ValueError(f"reject reason {reason!r} is not in preprocess/reasons.py; add it there with its line")
    return reason


def known_warnings(codes: Iterable[str]) -> list[str]:
    """The codes as a sample stores them. Raises ValueError for one that is not explained."""
    codes = list(codes)
    for code in codes:
        if code not in WRITTEN_WARNINGS:
            raise ValueError(f"warning code {code!r} is not in preprocess/reasons.py; add it there with its line")
    return codes


def reject(row: int, row_id: str, stage: str, reason: str, detail: str, path: str | None = None) -> Reject:
    """The only maker of rejects in stage one. `stage` is where it was found: ingest, pair, text, audio or worker.

    What a list holds may be megabytes long or a secret: every part is cut to MAX_FIELD_CHARS and passes `redact`.
    """
    path = None if path is None else _shortened(path)
    return Reject(
        row=row,
        id=_shortened(row_id),
        stage=stage,
        reason=known_reason(reason),
        detail=printable(_shortened(detail)),
        path=path,
    )


def _shortened(text: str) -> str:
    cut = redact(text[: 100 * MAX_FIELD_CHARS])  # before the cut, or half a secret stays at its end
    if len(text) <= MAX_FIELD_CHARS:
        return cut
    return f"{cut[:MAX_FIELD_CHARS]}... ({len(text)} characters)"


class AudioFault(Exception):
    """A file, or a row's pair, that cannot be used; `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = known_reason(reason)
        self.detail = detail


class RowFault(Exception):
    """Why one row is rejected; `reason` is one of REASONS."""

    def __init__(self, stage: str, reason: str, detail: str, path: str | None = None) -> None:
        super().__init__(detail)
        self.stage, self.reason, self.detail, self.path = stage, known_reason(reason), detail, path


def reject_of(fault: RowFault, row: int, row_id: str) -> Reject:
    """The line of rejects.jsonl for a fault of this row."""
    return reject(row, row_id, fault.stage, fault.reason, fault.detail, fault.path)
