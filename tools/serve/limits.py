"""What one request may cost, and how many may wait. In: options of `serve`. Out: `Limits`, read by every other file here.

Decoding has two limits of its own: an upload is never decoded beyond `preprocess.audio.AudioLimits` (30 s), and a header that
promises more than `MAX_SAMPLES_PER_S` is refused before it is decoded. Ten megabytes of FLAC can hold gigabytes of silence.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_SAMPLES_PER_S = 400_000  # rate times channels: 192 kHz stereo and below
MAX_FIELD_BYTES = 64 << 10  # of a form's text field
MAX_FORM_PARTS = 20
BODIES_AT_ONCE = 32  # of the largest size, in memory together; more get a 503
BODY_SPARE_BYTES = 1 << 20  # what may stand around an upload: JSON, field names, boundaries


@dataclass(frozen=True)
class Limits:
    max_text_chars: int = 10_000
    max_upload_bytes: int = 10 << 20
    max_reference_s: float = 30.0
    max_speech_s: float = 600.0
    max_waiting: int = 32
    max_voices: int = 1000
    max_body_pause_s: float = 30.0  # between two pieces of a body
    max_body_s: float = 300.0  # of a whole one

    @property
    def max_body_bytes(self) -> int:
        """A reference in base64 and all that stands around it."""
        return self.max_upload_bytes * 4 // 3 + BODY_SPARE_BYTES
