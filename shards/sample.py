"""One cloning sample: the ChatML a user writes, and the members a shard stores.

In: a ChatML row (`ChatRow`). Stored: `Sample`, the facts of that row (texts and their token ids per text item, raw codec
codes, Whisper mel of the reference) without any policy: no template, no delay pattern, no labels. The members and their
order are the shard contract; `shards/__init__.py` lists them.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import zstandard

from shards.errors import ShardError
from shards.npy_file import parsing
from shards.printable import first_line
from shards.sample_checks import check_sample

SCHEMA_VERSION = 1  # of a sample and of dataset.json, which change together
MEMBERS = ("ids.npy", "json", "ref.codes.npy", "ref.mel.npy.zst", "ref.whisper.npy.zst", "tgt.codes.npy")
MAX_JSON_BYTES = 4 << 20  # texts of a minute and whatever else a row holds; deep JSON costs 40 times its size
MAX_WHISPER_BYTES = 1 << 24  # unpacked; 30 s of states of Whisper large-v3 are 1.9 MB
OPTIONAL_MEMBERS = frozenset({"ref.mel.npy.zst", "ref.whisper.npy.zst"})

Role = Literal["system", "user", "assistant"]


class TextItem(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class AudioItem(msgspec.Struct, tag_field="type", tag="audio"):
    audio_url: Annotated[str, msgspec.Meta(min_length=1)]
    offset: float | None = None  # seconds; boson's AudioContent has both, too
    duration: float | None = None


class Message(msgspec.Struct):
    role: Role
    content: str | list[TextItem | AudioItem]


class ChatRow(msgspec.Struct):
    """One row of the user's ChatML list, in the format of boson's `ChatMLSample`."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    speaker: str | None = None
    start_index: int | None = None
    misc: dict[str, Any] | None = None


class Turn(msgspec.Struct, frozen=True):
    """A ChatML turn as stored: an int is the index of a text item, a word stands for the audio."""

    role: Role
    items: list[int | Literal["reference", "target"]]


class AudioFacts(msgspec.Struct, frozen=True):
    """Where an audio came from and what was measured; `num_frames` counts 25 Hz codec frames."""

    path: str
    sha256: str  # of the file's bytes
    duration_s: float  # of the decoded file
    sample_rate: int  # of the file
    num_frames: int
    num_channels: int = 1  # mixed down to one
    clipped_share: float = 0.0  # of samples at full scale or beyond
    leading_silence_s: float = 0.0
    trailing_silence_s: float = 0.0
    offset_s: float | msgspec.UnsetType = msgspec.UNSET  # where the row's segment begins; unset: the whole file
    cut_start_s: float | msgspec.UnsetType = (
        msgspec.UNSET
    )  # silence taken away before encoding ([audio]); unset: not asked for
    cut_end_s: float | msgspec.UnsetType = msgspec.UNSET
    gain_db: float | msgspec.UnsetType = msgspec.UNSET


DIALECT_KEYS = ("dialect", "dialect_tag")  # of a row's own keys, or in its misc


def dialect_of(fields: dict[str, Any]) -> str | None:
    """What a row says of its dialect."""
    return next((str(fields[key]) for key in DIALECT_KEYS if fields.get(key)), None)


class MelFacts(msgspec.Struct, frozen=True):
    """What rebuilds the 30-s padded Whisper features: every frame that is not stored equals `floor`."""

    num_samples: int  # at 16 kHz, before padding
    floor: float


class SampleFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The `json` member."""

    schema_version: int = SCHEMA_VERSION
    id: str
    row: int  # position in the user's list
    speaker: str
    turns: list[Turn]
    texts: list[str]
    text_token_counts: list[int]  # ids.npy is the concatenation of the texts' ids, in this order
    system_text: int | None  # index into texts
    reference_text: int
    target_text: int
    num_as_written_tokens: int  # text-path positions of the as_written layout
    reference: AudioFacts
    target: AudioFacts
    mel: MelFacts | None = None
    start_index: int | None = None
    misc: dict[str, Any] | None = None
    extra: dict[str, Any] = {}
    warnings: list[str] = []


@dataclass(frozen=True, slots=True)
class Sample:
    """A decoded sample."""

    key: str
    facts: SampleFacts
    text_ids: np.ndarray  # [n] int32
    reference_codes: np.ndarray  # [8, Tr] uint16, raw 0..1023
    target_codes: np.ndarray  # [8, Tt] uint16, raw 0..1023
    reference_mel_zst: bytes | None = None  # zstd of .npy float16 [128, Tm]; kept packed until needed
    reference_whisper_zst: bytes | None = None  # zstd of .npy float16 [W, d]: features.whisper = "encoder"

    def text_item_ids(self, item: int) -> np.ndarray:
        """Token ids [n] int32 of one text item."""
        counts = self.facts.text_token_counts
        start = sum(counts[:item])
        return self.text_ids[start : start + counts[item]]

    def reference_mel(self) -> np.ndarray | None:
        """Stored mel frames [128, Tm] float16 of the reference, or None."""
        if self.reference_mel_zst is None:
            return None
        return read_npy(decompress(self.reference_mel_zst, MAX_WHISPER_BYTES))

    def reference_whisper(self) -> np.ndarray | None:
        """Stored Whisper hidden states [W, d] float16 of the reference at 25 Hz, or None."""
        if self.reference_whisper_zst is None:
            return None
        return read_npy(decompress(self.reference_whisper_zst, MAX_WHISPER_BYTES))


def pack_sample(sample: Sample) -> list[tuple[str, bytes]]:
    """Members (suffix, bytes) of a sample in the contract's fixed order."""
    members = [
        ("ids.npy", write_npy(sample.text_ids.astype("<i4"))),
        ("json", msgspec.json.encode(sample.facts)),
        ("ref.codes.npy", write_npy(sample.reference_codes.astype("<u2"))),
    ]
    if sample.reference_mel_zst is not None:
        members.append(("ref.mel.npy.zst", sample.reference_mel_zst))
    if sample.reference_whisper_zst is not None:
        members.append(("ref.whisper.npy.zst", sample.reference_whisper_zst))
    members.append(("tgt.codes.npy", write_npy(sample.target_codes.astype("<u2"))))
    return members


def unpack_sample(key: str, members: dict[str, bytes]) -> Sample:
    """The inverse of `pack_sample`. Raises ShardError naming the key for missing or malformed members."""
    missing = [name for name in MEMBERS if name not in members and name not in OPTIONAL_MEMBERS]
    if missing:
        raise ShardError(f"sample {key}: missing member {', '.join(missing)}; found {', '.join(sorted(members))}")
    try:
        if len(members["json"]) > MAX_JSON_BYTES:
            raise ValueError(f"json of {len(members['json'])} bytes, at most {MAX_JSON_BYTES}")
        sample = Sample(
            key=key,
            facts=_facts_decoder().decode(members["json"]),
            text_ids=read_npy(members["ids.npy"]),
            reference_codes=read_npy(members["ref.codes.npy"]),
            target_codes=read_npy(members["tgt.codes.npy"]),
            reference_mel_zst=members.get("ref.mel.npy.zst"),
            reference_whisper_zst=members.get("ref.whisper.npy.zst"),
        )
        check_sample(sample)
    except Exception as error:  # msgspec and numpy have many kinds for bytes that are not theirs, RecursionError too
        raise ShardError(f"sample {key}: malformed member: {first_line(error)}") from None
    return sample


@functools.cache
def _facts_decoder() -> msgspec.json.Decoder[SampleFacts]:
    return msgspec.json.Decoder(SampleFacts)


def compress(data: bytes) -> bytes:
    """zstd level 1 with checksum and content size: the checksum turns bit rot into an error instead of wrong data."""
    return zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=True).compress(data)


def decompress(data: bytes, max_size: int = 1 << 28) -> bytes:
    """Undo `compress`. Raises ValueError when the frame is damaged or claims more than `max_size` bytes."""
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= max_size:  # zstandard does not enforce a limit itself when the header states a size
            raise ValueError(f"zstd frame states {size} bytes, at most {max_size} allowed")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged zstd frame: {error}") from None


def write_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def read_npy(data: bytes) -> np.ndarray:
    """Parse .npy bytes without copying. numpy's own reader costs 60-130 us per array, mostly in parsing the header."""
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not a version 1 .npy array")
    start = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape = _npy_header(bytes(data[10:start]))
    array = np.frombuffer(data, dtype=dtype, offset=start)
    return array.reshape(shape)


@functools.lru_cache(maxsize=4096)
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    buffer = io.BytesIO(len(header).to_bytes(2, "little") + header)
    try:
        with parsing:
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(buffer)
    except Exception as error:  # TokenError, TypeError, ...
        raise ValueError(f"not a .npy header: {first_line(error)}") from None
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array of shape {shape}")
    if fortran_order or dtype.hasobject:
        raise ValueError("arrays must be in C order and hold plain numbers")
    return dtype, shape
