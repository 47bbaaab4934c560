"""One codec process per GPU, served to the CPU workers over a socket; it hosts the Whisper encoder too, if asked.

CPU workers decode, check and make mels; waves are sent here and codes come back. Whatever requests wait are encoded
together if their lengths are equal: batches of equal length give the codes of single clips, zero-padded ones do not
(`shards/encoders/codec.py`). A worker that dies takes only its own connection with it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import defaultdict
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.child_process import start_child
from preprocess.features import WhisperEncoder
from shards.encoders.codec import Codec, load_codec, pad_to_frames
from shards.errors import ConfigError, PipelineError
from shards.manifest import Precision
from shards.sequence import SAMPLE_RATE
from shards.terminal import print_traceback

MAX_BATCH_S = 240  # seconds of audio encoded at once: about 10 GB of activations at full size, an estimate


class RemoteCodec:
    """The worker's end: looks like a `Codec`, encodes elsewhere."""

    def __init__(self, addresses: list[str], key: bytes) -> None:
        address = addresses[os.getpid() % len(addresses)]
        try:
            self._connection: Connection = Client(address, authkey=key)
        except (ConnectionError, FileNotFoundError) as error:
            raise PipelineError(f"the codec process is gone ({error}); the same command continues this job") from None

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """wave [S] float32 at 24 kHz -> codes [8, ceil(S / 960)] uint16."""
        return self.ask(wave)

    def ask(self, request: Any) -> np.ndarray:
        try:
            self._connection.send(request)
            return self._connection.recv()
        except (EOFError, ConnectionError):
            raise PipelineError(
                "the codec process is gone; its error stands above; the same command continues this job"
            ) from None


class RemoteWhisper:
    """The worker's end of the Whisper encoder, over the codec's connection."""

    def __init__(self, codec: RemoteCodec) -> None:
        self._codec = codec

    def encode(self, frames: np.ndarray, floor: float, num_samples: int) -> np.ndarray:
        """Stored mel frames [128, Tm] -> hidden states [W, d] float16."""
        return self._codec.ask((frames, floor, num_samples))


class CodecServers:
    """The parent's end: one server process per device, ended with the job."""

    def __init__(
        self, codec_dir: str, devices: list[str], whisper_dir: str | None = None, precision: Precision = "fp32"
    ) -> None:
        self.key = os.urandom(16)
        self.addresses: list[str] = []
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []  # a server lives as long as ours
        for device in devices:
            process, pipe = start_child(_serve, codec_dir, whisper_dir, device, precision, self.key)
            self._processes.append(process)
            self._pipes.append(pipe)
            try:
                self.addresses.append(pipe.recv())
            except EOFError:
                self.close()
                raise PipelineError(f"the codec process on {device} did not start; its error stands above") from None

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


def cuda_devices() -> list[str]:
    """All visible GPUs. Raises ConfigError without one."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is visible; use --device cpu, or see what nvidia-smi says")
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def _serve(
    parent: Connection, codec_dir: str, whisper_dir: str | None, device: str, precision: Precision, key: bytes
) -> None:
    try:
        codec = load_codec(Path(codec_dir), device, precision)
        whisper = WhisperEncoder(Path(whisper_dir), device) if whisper_dir else None
        listener = Listener(authkey=key)
        parent.send(listener.address)
        clients = _Clients(listener, parent)
        while True:
            requests = clients.requests()
            _answer_mels(whisper, [request for request in requests if isinstance(request[1], tuple)])
            _answer_waves(codec, [request for request in requests if not isinstance(request[1], tuple)])
    except _ParentGone:
        os._exit(0)
    except Exception:
        print_traceback(*sys.exc_info())
        os._exit(1)  # the accepting thread must not keep a dead server alive


class _ParentGone(Exception):
    """Killed, most likely; nobody is left to answer."""


class _Clients:
    """Connections that come and go; the parent's stays."""

    def __init__(self, listener: Listener, parent: Connection) -> None:
        self._listener = listener
        self._parent = parent
        self._connections: list[Connection] = []
        wake_reader, self._wake = multiprocessing.Pipe(duplex=False)
        self._wake_reader = wake_reader
        threading.Thread(target=self._accept, daemon=True).start()

    def requests(self) -> list[tuple[Connection, Any]]:
        """Wait for requests and return all that are there: (connection, wave or mel). Raises _ParentGone."""
        waiting: list[tuple[Connection, Any]] = []
        for connection in wait([self._parent, self._wake_reader, *self._connections]):
            assert isinstance(connection, Connection)
            if connection is self._parent:
                raise _ParentGone  # it sends nothing, so its end has closed
            try:
                message = connection.recv()
            except (EOFError, ConnectionError):
                self._connections.remove(connection)
                continue
            if connection is not self._wake_reader:
                waiting.append((connection, message))
        return waiting

    def _accept(self) -> None:
        while True:
            try:
                self._connections.append(self._listener.accept())
            except (multiprocessing.AuthenticationError, EOFError, ConnectionError):
                continue  # somebody who is not a worker of this job, or one that died while connecting
            self._wake.send(None)  # so that requests() waits for the new one too


def _answer_waves(codec: Codec, requests: list[tuple[Connection, np.ndarray]]) -> None:
    """Encode what waits, equal lengths together."""
    by_length: dict[int, list[tuple[Connection, np.ndarray]]] = defaultdict(list)
    for connection, wave in requests:
        padded = pad_to_frames(wave)
        by_length[len(padded)].append((connection, padded))
    for length, group in by_length.items():
        size = max(1, MAX_BATCH_S * SAMPLE_RATE // length)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            codes = codec.encode_batch(np.stack([wave for _, wave in part]))
            for (connection, _), answer in zip(part, codes, strict=True):
                _send(connection, answer)


def _answer_mels(whisper: WhisperEncoder | None, requests: list[tuple[Connection, Any]]) -> None:
    for connection, (frames, floor, num_samples) in requests:
        assert whisper, "a worker asked for Whisper states, but the job has no encoder"
        _send(connection, whisper.encode(frames, floor, num_samples))


def _send(connection: Connection, answer: np.ndarray) -> None:
    try:
        connection.send(answer)
    except (BrokenPipeError, ConnectionResetError):
        return  # the worker died; its shard is made again by another one
