"""Voices on disk: one folder each, with a random name; what people call it stands in its JSON only.

In: checked recordings. Out: references for prompts, their codes computed once for a codec. ROOT/voice_<16 hex>/ holds
voice.json, recording.bin (the upload as it came) and codes.npy; it appears by one rename and goes by another, so a killed server
leaves nothing half. No path is ever made from a request: names are looked up among those read at the start.
"""

from __future__ import annotations

import logging
import re
import secrets
import shutil
import threading
import time
import unicodedata
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from shards.errors import ConfigError, PipelineError
from shards.printable import is_harmful
from shards.writer import sync_folder, write_bytes, write_json
from tools.serve.api_errors import ApiError

if TYPE_CHECKING:
    from preprocess.audio import AudioFile
    from tools.reference import Reference
    from tools.speaker import Speaker

log = logging.getLogger("serve")
FOLDER = re.compile(r"voice_[0-9a-f]{16}")
LEFTOVER = re.compile(r"\.(new|gone)-voice_[0-9a-f]{16}")
MAX_NAME_CHARS = 100
MAX_REF_TEXT_CHARS = 2000
MAX_DESCRIPTION_CHARS = 1000
KEPT = 64  # references in memory
# Names that OpenAI's clients send when they know no other.
OPENAI_VOICES = frozenset(
    "alloy ash ballad cedar coral echo fable marin nova onyx sage shimmer verse".split()  # noqa: SIM905
)


class VoiceFacts(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    created_at: int  # seconds of the epoch
    consent: str
    ref_text: str | None
    speaker_description: str
    mime_type: str
    file_size: int
    duration_s: float
    codec: str  # `codec_probe` of what made codes.npy


class VoiceStore:
    def __init__(self, root: Path, max_voices: int = 1000) -> None:
        """Reads what is there and clears what was left half. Raises ConfigError."""
        self._root, self._max_voices = root, max_voices
        self._lock = threading.Lock()
        self._voices: dict[str, VoiceFacts] = {}
        self._kept: OrderedDict[str, Reference] = OrderedDict()
        self._probe: tuple[int, str] | None = None
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in sorted(root.iterdir()):
                if LEFTOVER.fullmatch(folder.name):
                    shutil.rmtree(folder)
                elif FOLDER.fullmatch(folder.name):
                    self._read(folder)
        except OSError as error:
            raise ConfigError(f"--voices {root}: {error.strerror}; name a folder that can be written") from None

    def _read(self, folder: Path) -> None:
        try:
            facts = msgspec.json.decode((folder / "voice.json").read_bytes(), type=VoiceFacts)
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("%s: skipped, its voice.json cannot be read: %s", folder.name, type(error).__name__)
            return
        self._voices[folder.name] = msgspec.structs.replace(facts, id=folder.name)

    def __len__(self) -> int:
        return len(self._voices)

    def all(self) -> list[VoiceFacts]:
        """The oldest first."""
        return sorted(self._voices.values(), key=lambda one: (one.created_at, one.id))

    def find(self, name: str) -> VoiceFacts | None:
        """By id, else by name."""
        if name in self._voices:
            return self._voices[name]
        wanted = folded(name)
        return next((one for one in self.all() if folded(one.name) == wanted), None)

    def check_name(self, name: str) -> str:
        """The name as it is kept. Raises ApiError."""
        name = checked_name(name)
        with self._lock:
            self._check_free(name)
        return name

    def _check_free(self, name: str) -> None:
        if self.find(name):
            raise ApiError(409, "there is a voice of that name; delete it first", param="name", code="voice_exists")
        if len(self._voices) >= self._max_voices:
            raise ApiError(
                409, f"{self._max_voices} voices are stored, no more fit; delete some", code="too_many_voices"
            )

    def add(self, facts: VoiceFacts, recording: bytes, codes: np.ndarray, reference: Reference) -> VoiceFacts:
        """Store it under a new id; `facts.id` is not used. Raises ApiError, OSError."""
        from shards.sample import write_npy

        facts = msgspec.structs.replace(facts, id=f"voice_{secrets.token_hex(8)}")
        new = self._root / f".new-{facts.id}"
        new.mkdir(mode=0o700)
        try:
            write_bytes(new / "recording.bin", recording)
            write_bytes(new / "codes.npy", write_npy(codes))
            write_json(new / "voice.json", facts)
            with self._lock:
                self._check_free(facts.name)
                new.rename(self._root / facts.id)
                self._voices[facts.id] = facts
                self._keep(facts.id, reference)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        sync_folder(self._root)
        return facts

    def remove(self, name: str) -> VoiceFacts:
        """Raises ApiError where there is none."""
        with self._lock:
            facts = self.find(name)
            if facts is None:
                raise no_such_voice()
            gone = self._root / f".gone-{facts.id}"
            (self._root / facts.id).rename(gone)
            del self._voices[facts.id]
            self._kept.pop(facts.id, None)
        shutil.rmtree(gone, ignore_errors=True)
        sync_folder(self._root)
        return facts

    def reference(self, facts: VoiceFacts, speaker: Speaker) -> Reference:
        """Ready for prompts; called in the thread that has the model. Raises ApiError where it was deleted meanwhile."""
        with self._lock:
            if facts.id not in self._voices:
                raise no_such_voice()
            if facts.id in self._kept:
                self._kept.move_to_end(facts.id)
                return self._kept[facts.id]
        from shards.sample import write_npy
        from tools.reference import read_recordings

        folder = self._root / facts.id
        try:
            recordings = read_recordings([(folder / "recording.bin").read_bytes()])
            probe = self.probe(speaker)
            codes = np.load(folder / "codes.npy", allow_pickle=False) if facts.codec == probe else None
            reference = speaker.reference(recordings, facts.ref_text, codes)
            if codes is None:  # another codec than the one that made them
                write_bytes(folder / "codes.npy", write_npy(reference.codes))
                facts = msgspec.structs.replace(facts, codec=probe)
                write_json(folder / "voice.json", facts)
        except (OSError, ValueError, PipelineError) as error:
            log.error("%s: its files cannot be read: %s", facts.id, type(error).__name__)
            raise ApiError(500, f"the files of voice {facts.id} are damaged; delete it and upload it again") from None
        with self._lock:
            if facts.id in self._voices:
                self._voices[facts.id] = facts
                self._keep(facts.id, reference)
        return reference

    def probe(self, speaker: Speaker) -> str:
        """`codec_probe` of the speaker's codec, computed once."""
        if self._probe is None or self._probe[0] != id(speaker):
            self._probe = id(speaker), codec_probe(speaker)
        return self._probe[1]

    def _keep(self, voice_id: str, reference: Reference) -> None:
        self._kept[voice_id] = reference
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)


def new_facts(name: str, audio: AudioFile, **given: Any) -> VoiceFacts:
    """Of a checked upload; given: consent, ref_text, speaker_description, mime_type, file_size, codec."""
    return VoiceFacts(
        id="", name=name, created_at=int(time.time()), duration_s=round(audio.measures.duration_s, 3), **given
    )


def codec_probe(speaker: Speaker) -> str:
    """Which codec this is, by what it does: the codes of a second of noise."""
    wave = (0.1 * np.random.default_rng(7).standard_normal(24000)).astype(np.float32)
    return sha256(speaker.codec.encode(wave).tobytes()).hexdigest()[:16]


def checked_name(name: str) -> str:
    """What people call a voice. It names no file here, but clients make file names and lines of it. Raises ApiError."""
    name = unicodedata.normalize("NFC", name).strip()
    wrong = None
    if not 0 < len(name) <= MAX_NAME_CHARS:
        wrong = f"expected 1 to {MAX_NAME_CHARS} characters, got {len(name)}"
    elif any(is_harmful(letter) or letter in '/\\:*?"<>|%' or letter in "\n\r\t\0" for letter in name):
        wrong = "expected letters, digits, blanks and - _ . ' ( ) only"
    elif name.startswith(".") or ".." in name:
        wrong = "a name neither begins with a full stop nor holds two in a row"
    elif not any(letter.isalnum() for letter in name):
        wrong = "expected at least one letter or digit"
    elif FOLDER.fullmatch(name.casefold()):
        wrong = "that is how ids look; choose another"
    if wrong:
        raise ApiError(400, f"name: {wrong}", param="name")
    return name


def folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


def no_such_voice() -> ApiError:
    return ApiError(404, "no such voice; GET /v1/audio/voices lists them", param="voice", code="voice_not_found")
