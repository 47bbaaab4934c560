"""Voices on disk: one folder each, with a random name; what people call it stands in its JSON only.

In: checked recordings. Out: references for prompts, their codes computed once for a codec. ROOT/voice_<16 hex>/ holds
voice.json, recording.bin (the upload as it came) and codes.npy; it appears by one rename and goes by another, so a killed server
leaves nothing half. No path is ever made from a request: names are looked up among those that were read. Servers may share ROOT:
each reads it again when it has changed, and leftovers are cleared by a server that is alone there (flock on ROOT).
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from shards.errors import ConfigError, DataError, PipelineError
from shards.npy_file import load_npy
from shards.sequence import SAMPLE_RATE
from shards.writer import sync_folder, write_bytes, write_json
from tools.serve.api_errors import ApiError
from tools.serve.voice_names import FOLDER, checked_name, folded

if TYPE_CHECKING:
    from preprocess.audio import AudioFile
    from tools.reference import Reference
    from tools.speaker import Speaker

log = logging.getLogger("serve")
LEFTOVER = re.compile(r"\.(new|gone)-voice_[0-9a-f]{16}")
MAX_REF_TEXT_CHARS = 2000
MAX_DESCRIPTION_CHARS = 1000
NAME_TAKEN = "there is a voice of that name; delete it first"
KEPT = 64  # references in memory
SAME_TICK_NS = 100_000_000  # a file system's clock: what is younger may change once more without a new time


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
        self._lock = threading.RLock()
        self._voices: dict[str, VoiceFacts] = {}
        self._unreadable: set[str] = set()  # folders that were logged
        self._read_at_ns = 0  # the folder's time when it was read; 0: read it again
        self._kept: OrderedDict[str, Reference] = OrderedDict()
        self._probe: tuple[int, str] | None = None
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._handle: int | None = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
            if is_alone(self._handle):
                clear_leftovers(root)
            self._read_again()
        except OSError as error:
            raise ConfigError(f"--voices {root}: {error.strerror}; name a folder that can be written") from None

    def close(self) -> None:
        """Another server may then clear up here."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _read_again(self) -> None:
        """Where another server, or a person, has changed the folder. Raises OSError."""
        with self._lock:
            changed_ns = self._root.stat().st_mtime_ns
            if changed_ns == self._read_at_ns:
                return
            is_settled = time.time_ns() - changed_ns > SAME_TICK_NS
            found = {path.name for path in self._root.iterdir() if FOLDER.fullmatch(path.name)}
            for name in self._voices.keys() - found:
                del self._voices[name]
                self._kept.pop(name, None)
            for name in sorted(found - self._voices.keys()):
                self._read(self._root / name)
            self._read_at_ns = changed_ns if is_settled else 0

    def _read(self, folder: Path) -> None:
        try:
            facts = msgspec.json.decode((folder / "voice.json").read_bytes(), type=VoiceFacts)
        except (OSError, msgspec.MsgspecError) as error:
            if folder.name not in self._unreadable:
                log.warning("%s: skipped, its voice.json cannot be read: %s", folder.name, type(error).__name__)
                self._unreadable.add(folder.name)
            return
        self._voices[folder.name] = msgspec.structs.replace(facts, id=folder.name)

    def __len__(self) -> int:
        return len(self._voices)

    def all(self) -> list[VoiceFacts]:
        """The oldest first. Raises ApiError where the folder is gone."""
        try:
            self._read_again()
        except OSError as error:
            raise ApiError(500, f"the folder of the voices cannot be read: {error.strerror}") from None
        with self._lock:
            return sorted(self._voices.values(), key=lambda one: one.created_at)  # within a second: as they were found

    def find(self, name: str) -> VoiceFacts | None:
        """By id, else by name."""
        stored = self.all()
        wanted = folded(name)
        by_id = next((one for one in stored if one.id == name), None)
        return by_id or next((one for one in stored if wanted and folded(one.name) == wanted), None)

    def check_name(self, name: str) -> str:
        """The name as it is kept. Raises ApiError."""
        name = checked_name(name)
        with self._lock:
            self._check_free(name)
        return name

    def _check_free(self, name: str) -> None:
        if self.find(name):
            raise ApiError(409, NAME_TAKEN, param="name", code="voice_exists")
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
        self._read_at_ns = 0
        if any(folded(one.name) == folded(facts.name) for one in self.all() if one.id != facts.id):
            self.remove(facts.id)  # another server was quicker; never two of one name
            raise ApiError(409, NAME_TAKEN, param="name", code="voice_exists")
        return facts

    def remove(self, name: str) -> VoiceFacts:
        """Raises ApiError where there is none."""
        with self._lock:
            facts = self.find(name)
            if facts is None:
                raise no_such_voice()
            gone = self._root / f".gone-{facts.id}"
            try:
                (self._root / facts.id).rename(gone)
            except FileNotFoundError:  # by another server, just now
                raise no_such_voice() from None
            except OSError as error:
                raise ApiError(507, f"the voice could not be deleted: {error.strerror}") from None
            del self._voices[facts.id]
            self._kept.pop(facts.id, None)
        shutil.rmtree(gone, ignore_errors=True)
        sync_folder(self._root)
        return facts

    def reference(self, facts: VoiceFacts, speaker: Speaker) -> Reference:
        """Ready for prompts; called in the thread that has the model. Raises ApiError where it was deleted meanwhile."""
        self.all()
        with self._lock:
            if facts.id not in self._voices:
                raise no_such_voice()
            if facts.id in self._kept:
                self._kept.move_to_end(facts.id)
                return self._kept[facts.id]
        try:
            reference, is_new = self._made(facts, speaker)
        except (OSError, PipelineError) as error:
            if not (self._root / facts.id).is_dir():
                raise no_such_voice() from None
            log.error("%s: its files cannot be read: %s", facts.id, type(error).__name__)
            raise ApiError(500, f"the files of voice {facts.id} are damaged; delete it and upload it again") from None
        if is_new:
            facts = self._store_codes(facts, reference.codes, speaker)
        with self._lock:
            if facts.id in self._voices:
                self._voices[facts.id] = facts
                self._keep(facts.id, reference)
        return reference

    def _made(self, facts: VoiceFacts, speaker: Speaker) -> tuple[Reference, bool]:
        """From its files, and whether its codes had to be made anew. Raises OSError, PipelineError."""
        from tools.inference import checked_codes
        from tools.reference import read_recordings

        folder = self._root / facts.id
        recordings = read_recordings([(folder / "recording.bin").read_bytes()])
        codes = None
        if facts.codec == self.probe(speaker):
            try:
                codes = checked_codes(load_npy(folder / "codes.npy"))
            except (OSError, ValueError, EOFError, DataError) as error:
                log.warning("%s: its codes are made anew: %s", facts.id, type(error).__name__)
        return speaker.reference(recordings, facts.ref_text, codes), codes is None

    def _store_codes(self, facts: VoiceFacts, codes: np.ndarray, speaker: Speaker) -> VoiceFacts:
        """For the next start. A disk that is full costs time then, and no request now."""
        from shards.sample import write_npy

        made = msgspec.structs.replace(facts, codec=self.probe(speaker))
        folder = self._root / facts.id
        try:
            if not folder.is_dir():  # deleted meanwhile; writing would make it again
                return facts
            write_bytes(folder / "codes.npy", write_npy(codes))
            write_json(folder / "voice.json", made)
        except OSError as error:
            log.warning("%s: its codes could not be stored: %s", facts.id, error.strerror)
            return facts
        return made

    def probe(self, speaker: Speaker) -> str:
        """`codec_probe` of the speaker's codec, computed once."""
        if self._probe is None or self._probe[0] != id(speaker):
            self._probe = id(speaker), codec_probe(speaker)
        return self._probe[1]

    def _keep(self, voice_id: str, reference: Reference) -> None:
        self._kept[voice_id] = reference
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)


def is_alone(handle: int) -> bool:
    """Whether no other server has this folder; from now on this one does. Where there is no flock nobody is alone."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        found = False
    else:
        found = True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return found


def clear_leftovers(root: Path) -> None:
    """Of a server that was killed while it stored or deleted. Raises OSError."""
    for path in sorted(root.iterdir()):
        if LEFTOVER.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def new_facts(name: str, audio: AudioFile, **given: Any) -> VoiceFacts:
    """Of a checked upload; given: consent, ref_text, speaker_description, mime_type, file_size, codec."""
    return VoiceFacts(
        id="", name=name, created_at=int(time.time()), duration_s=round(audio.measures.duration_s, 3), **given
    )


def codec_probe(speaker: Speaker) -> str:
    """What makes codes of a recording: the codec, by what it does to a second of noise, and the model's edits of clips."""
    wave = (0.1 * np.random.default_rng(7).standard_normal(SAMPLE_RATE)).astype(np.float32)
    edits = b"" if speaker.edits.is_off else msgspec.json.encode(speaker.edits)
    return sha256(speaker.codec.encode(wave).tobytes() + edits).hexdigest()[:16]


def no_such_voice() -> ApiError:
    return ApiError(404, "no such voice; GET /v1/audio/voices lists them", param="voice", code="voice_not_found")
