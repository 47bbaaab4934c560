"""The Python interface: a voice and a text in, speech out.

    from tools.inference import HiggsAudioInference

    voice = HiggsAudioInference("out/merged", device="cuda", torch_dtype="bfloat16")
    speech = voice.generate_speech("voice.wav", "النص المطلوب", reference_text="ما يقال في التسجيل")

In: a merged folder, or a base model with `adapter`. Out: `GeneratedSpeech`, or its wave while it is spoken. All requests of an
instance go through one engine of `num_slots` slots, so a request says the same alone and beside others, code for code. With
another number of slots rounding differs. Threads may share an instance; each moves all requests on.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict, Unpack

import msgspec
import numpy as np
import torch

from shards.config import read_config
from shards.delay_pattern import CODEBOOK_SIZE, NUM_CODEBOOKS
from shards.encoders.codec import Codec
from shards.encoders.codec_stream import CodecStream
from shards.errors import ConfigError, DataError
from shards.sequence import SAMPLE_RATE
from tools.reference import Reference, read_recordings
from tools.speaker import SpeakConfig, Speaker, load_speaker
from tools.speech_request import GeneratedSpeech, SpeechPart, SpeechRequest, StopReason
from tools.spoken_wave import SpokenWave, whole_wave
from tools.utterance import Utterance
from train.model.generation.block_graph import record_cuda
from train.model.generation.engine import Engine

__all__ = ["GeneratedSpeech", "HiggsAudioInference", "SpeechPart", "SpeechRequest", "StopReason"]

log = logging.getLogger("speak")
KEPT_REFERENCES = 16  # encoded ones
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "auto": None}


class Settings(TypedDict, total=False):
    """What every request may say; units and defaults stand in `SpeechRequest`."""

    sample_rate: int
    temperature: float
    top_p: float
    top_k: int
    ras_win_len: int
    ras_win_max_num_repeat: int
    seed: int
    max_seconds: float | None
    part_chars: int


class HiggsAudioInference:
    """A loaded voice model."""

    def __init__(
        self,
        model_path: str | Path,
        device: str = "auto",
        torch_dtype: str | torch.dtype = "auto",
        *,
        adapter: str | Path | None = None,
        codec: str | Path | None = None,
        config: str | Path | None = None,
        num_slots: int = 1,
        cuda_graphs: bool = False,
    ) -> None:
        """Load `model_path`: a merged folder, a base model's folder or hub id. Raises PipelineError.

        device: "auto" takes CUDA where there is one; "cuda", "cuda:1", "cpu". torch_dtype: "auto" is bfloat16 on CUDA, float32
        on a CPU. adapter: a checkpoint's adapter folder, when model_path is a base. codec: its folder or hub id; else the one
        of `config`, else the one that the model remembers. config: a pipeline.toml; else ./pipeline.toml where it exists.
        num_slots: requests spoken at once. cuda_graphs: on a GPU, replay blocks of columns as CUDA graphs; the same codes.
        """
        if not isinstance(num_slots, int) or num_slots < 1:
            raise ConfigError(f"num_slots = {num_slots!r}: expected a whole number, 1 or more")
        settings = read_config(SpeakConfig, None if config is None else Path(config))
        if codec is not None:
            model = msgspec.structs.replace(settings.model, codec=str(codec), codec_revision="")
            settings = msgspec.structs.replace(settings, model=model)
        path = None if adapter is None else Path(adapter)
        speaker = load_speaker(Path(model_path), path, settings, known_device(device), known_dtype(torch_dtype))
        self._take(speaker, num_slots, cuda_graphs)

    @classmethod
    def of(cls, speaker: Speaker, num_slots: int = 1, cuda_graphs: bool = False) -> HiggsAudioInference:
        """Of a model that is loaded already."""
        made = cls.__new__(cls)
        made._take(speaker, num_slots, cuda_graphs)
        return made

    def _take(self, speaker: Speaker, num_slots: int, cuda_graphs: bool) -> None:
        where = speaker.model.audio_lm_head.weight.device
        if cuda_graphs and where.type != "cuda":
            raise ConfigError(
                f"cuda_graphs: expected a model on a GPU, got one on {where}; leave it out, or name a CUDA device"
            )
        self.speaker = speaker
        self.engine = Engine(speaker.model, num_slots, record=record_cuda if cuda_graphs else None)
        self.sample_rate = SAMPLE_RATE
        self._lock = threading.RLock()
        self._turnstile = threading.Lock()
        self._references: OrderedDict[tuple, Reference] = OrderedDict()

    def generate_speech(
        self,
        reference_audio: Any,
        target_text: str,
        reference_text: str | None = None,
        speaker_name: str | None = None,
        **settings: Unpack[Settings],
    ) -> GeneratedSpeech:
        """Say `target_text` in the voice of `reference_audio`.

        reference_audio: see `tools.reference.read_recordings`; sample_rate goes with an array. reference_text: what is said in
        it, exactly; clones are better with it. speaker_name: a label for the result, the model never sees it. settings:
        temperature (0 is greedy), top_p, top_k, ras_win_len, ras_win_max_num_repeat, seed, max_seconds (of all; None: only what
        the text can last), part_chars (longer texts are split). Raises PipelineError.
        """
        request = SpeechRequest(
            reference_audio=reference_audio,
            target_text=target_text,
            reference_text=reference_text,
            speaker_name=speaker_name,
            **settings,
        )
        return self.generate_batch([request])[0]

    def generate_batch(self, requests: Sequence[SpeechRequest]) -> list[GeneratedSpeech]:
        """Several at once, `num_slots` side by side; each says what it would say alone."""
        utterances: list[Utterance] = []
        try:
            for request in requests:
                utterances.append(self._begin(request))
            while not all(one.is_done for one in utterances):
                with self._turn():
                    self.engine.advance()
                    for one in utterances:
                        one.follow()
        finally:
            self._cancel(utterances)
        return [self._finish(one, request) for one, request in zip(utterances, requests, strict=True)]

    def stream_speech(
        self,
        reference_audio: Any,
        target_text: str,
        reference_text: str | None = None,
        speaker_name: str | None = None,
        first_chunk: int | None = None,
        **settings: Unpack[Settings],
    ) -> Generator[np.ndarray]:
        """The wave of `generate_speech` in pieces [S] float32 while it is spoken; close the iterator to cancel.

        The joined pieces are that wave, but for rounding. A piece comes 1.28 s behind its codes; with `first_chunk` (frames of
        40 ms, 2 or more) the first one comes at once, not quite as it will be.
        """
        request = SpeechRequest(
            reference_audio=reference_audio,
            target_text=target_text,
            reference_text=reference_text,
            speaker_name=speaker_name,
            **settings,
        )
        return self.stream_request(request, first_chunk)

    def stream_request(self, request: SpeechRequest, first_chunk: int | None = None) -> Generator[np.ndarray]:
        """As `stream_speech`, of a request that is made already."""
        CodecStream(self.speaker.codec, first_chunk)  # a wrong first_chunk is found now, not at the first piece
        stream = self._stream(self._begin(request), first_chunk)
        next(stream)  # into its try: a generator that never began would not run its `finally`, and keep its slot
        return stream

    def decode_codes(self, codes: np.ndarray) -> GeneratedSpeech:
        """The wave of given codes [8, T]. Raises DataError."""
        return decoded(self.speaker.codec, checked_codes(codes))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The lock, in turns. Python's is not fair: who releases it and asks again gets it before those that wait."""
        with self._turnstile:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _begin(self, request: SpeechRequest) -> Utterance:
        with self._turn():
            return Utterance(self.speaker, self.engine, self._reference(request), request)

    def _cancel(self, utterances: list[Utterance]) -> None:
        with self._lock:  # out of turn: a collected generator may come here while its thread holds the lock
            for one in utterances:
                one.cancel()

    def _reference(self, request: SpeechRequest) -> Reference:
        """The encoded reference; the latest ones are kept, found by what they hold."""
        recordings = read_recordings(request.reference_audio, request.sample_rate)
        text = request.reference_text
        if isinstance(text, (list, tuple)):
            text = " ".join(text)
        if text is None and not self.speaker.builder.reference_text_dropout:
            log.warning("no reference_text: clones are better with what is said in the reference, exactly")
        key = (text, *((one.measures.sample_rate, sha256(one.wave.tobytes()).digest()) for one in recordings))
        if key not in self._references:
            self._references[key] = self.speaker.reference(recordings, text)
        self._references.move_to_end(key)
        while len(self._references) > KEPT_REFERENCES:
            self._references.popitem(last=False)
        return self._references[key]

    def _finish(self, utterance: Utterance, request: SpeechRequest) -> GeneratedSpeech:
        wave = whole_wave(self.speaker.codec, utterance.parts)
        return GeneratedSpeech(wave, SAMPLE_RATE, utterance.parts, request.speaker_name, utterance.is_complete)

    def _stream(self, utterance: Utterance, first_chunk: int | None) -> Generator[np.ndarray]:
        spoken = SpokenWave(self.speaker.codec, utterance, first_chunk)
        try:
            yield np.zeros(0, np.float32)  # taken by stream_request
            while not utterance.is_done:
                with self._turn():
                    self.engine.advance()
                    spoken.follow()
                yield from spoken.waves()
        finally:
            self._cancel([utterance])


def decoded(codec: Codec, codes: np.ndarray) -> GeneratedSpeech:
    """Codes [8, T] as speech without a text."""
    return GeneratedSpeech(codec.decode(codes), SAMPLE_RATE, [SpeechPart("", codes, "end")])


def checked_codes(codes: Any) -> np.ndarray:
    """Codes [8, T] uint16, T at least 1. Raises DataError."""
    array = np.asarray(codes)
    if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[0] != NUM_CODEBOOKS or not array.shape[1]:
        raise DataError(f"codes: expected whole numbers [{NUM_CODEBOOKS}, T], got {array.dtype} {list(array.shape)}")
    if array.min() < 0 or array.max() >= CODEBOOK_SIZE:
        raise DataError(f"codes: expected 0 to {CODEBOOK_SIZE - 1}, got {array.min()} to {array.max()}")
    return array.astype(np.uint16)


def known_device(name: str) -> str:
    """Raises ConfigError for a device that is not here."""
    try:
        device = torch.device("cpu" if name == "auto" else name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device = {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"device = {name!r}: {torch.cuda.device_count()} CUDA devices here; device='auto' works on a CPU"
        )
    return name


def known_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None is "auto". Raises ConfigError."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"torch_dtype = {dtype!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]
