"""The one thread that has the model: a bounded queue in front of the engine's slots.

In: jobs from the request handlers. Out: their events, called in this thread. Everything that touches the device runs here, block
by block; other work for it (a voice's codes) is done between two blocks. A job leaves at the next block after `cancel`. Its sound
waits in memory for a slow client, at most what `max_speech_s` allows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shards.sequence import SAMPLE_RATE
from tools.serve.api_errors import ApiError, as_api_error, full, unavailable
from tools.serve.metrics import Metrics
from tools.serve.speech_job import Ended, Failed, Job, Sound, Started, stop_reason

if TYPE_CHECKING:
    from tools.speaker import Speaker

log = logging.getLogger("serve")
State = Literal["loading", "ready", "stopping", "stopped", "failed"]
MAX_FAULTS = 3  # in a row: then it is the device or the model, and /health says so
RETRY_S = 2  # for one place in the queue
NO_SOUND = "the model ended before its first sound; try another seed or a lower temperature"


class SpeechQueue:
    def __init__(
        self, load: Callable[[], Speaker], num_slots: int, max_waiting: int, metrics: Metrics | None = None
    ) -> None:
        """`load` is called in the thread, so that /health answers meanwhile."""
        self.state: State = "loading"
        self.fault: BaseException | None = None  # why it is "failed"
        self.speaker: Speaker | None = None
        self.num_slots = num_slots
        self.metrics = metrics or Metrics()
        self._load = load
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._errands: deque[tuple[Callable[[Speaker], Any], Future]] = deque()
        self._spoken: list[Job] = []
        self._faults = 0
        self._must_end = False
        self._thread = threading.Thread(target=self._run, name="speech", daemon=True)
        self.metrics.gauge("slots", lambda: self.num_slots)
        self.metrics.gauge("slots_busy", lambda: len(self._spoken))
        self.metrics.gauge("waiting", lambda: len(self._waiting))
        self.metrics.gauge("ready", lambda: self.state == "ready")

    def start(self) -> None:
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        with self._changed:
            return not (self._waiting or self._spoken or self._errands)

    def submit(self, job: Job) -> None:
        """Raises ApiError: 503 where nothing is spoken, 429 where the queue is full."""
        with self._changed:
            self._check_open()
            free = self.num_slots - len(self._spoken)
            if len(self._waiting) >= self._max_waiting + max(0, free):
                self.metrics.count("speech_total", ended="refused")
                raise full(RETRY_S * (1 + len(self._waiting) // self.num_slots))
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody listens any more; from any thread, as often as one likes, also when it is over."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self.metrics.count("speech_total", ended="left")
            job.is_cancelled = True
            self._changed.notify_all()

    def ask(self, errand: Callable[[Speaker], Any]) -> Future:
        """Do this in the thread, between two blocks. Raises ApiError."""
        future: Future = Future()
        with self._changed:
            self._check_open()
            if len(self._errands) >= self._max_waiting + self.num_slots:
                raise full(RETRY_S)
            self._errands.append((errand, future))
            self._changed.notify_all()
        return future

    def stop(self) -> None:
        """Take nothing more; who waits is refused now, who is being spoken is spoken to the end."""
        with self._changed:
            if self.state in ("ready", "loading"):
                self.state = "stopping"
            refused, self._waiting = list(self._waiting), deque()
            self._changed.notify_all()
        for job in refused:
            self._fail(job, unavailable("the server is stopping"), "refused")

    def end(self, timeout_s: float = 30.0) -> None:
        """`stop`, give up what is still being spoken, and wait for the thread."""
        self.stop()
        with self._changed:
            self._must_end = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _check_open(self) -> None:
        if self.state == "loading":
            raise unavailable("the model is being loaded")
        if self.state in ("stopping", "stopped"):
            raise unavailable("the server is stopping")
        if self.state == "failed":
            raise unavailable("the model cannot speak any more; the server's log says why", 60)

    def _run(self) -> None:
        try:
            self.speaker = self._load()
            from train.model.generation.engine import Engine

            self._engine = Engine(self.speaker.model, self.num_slots)
            warm(self.speaker, self._engine)
        except BaseException as error:
            self.fault = error
            with self._changed:
                self.state = "failed"
            return
        with self._changed:
            if self.state == "loading":
                self.state = "ready"
        try:
            while self._turn():
                pass
        except BaseException as error:  # of this file: no client may wait for it for ever
            log.exception("the speech queue has a fault of its own")
            self.fault = error
        finally:
            with self._changed:
                self.state = "failed" if self.fault else "stopped"
            self._abandon(unavailable("the server has stopped"))

    def _turn(self) -> bool:
        """One block for all; False when it is over."""
        with self._changed:
            while not (self._waiting or self._spoken or self._errands or self._must_end):
                self._changed.wait()
            if self._must_end:
                return False
            errands, self._errands = list(self._errands), deque()
        for errand, future in errands:
            self._do(errand, future)
        for job in [one for one in self._spoken if one.is_cancelled]:
            assert job.utterance is not None
            job.utterance.cancel()
            self._leave(job, "left")
        self._admit()
        if self._spoken:
            self._speak()
        return True

    def _do(self, errand: Callable[[Speaker], Any], future: Future) -> None:
        if not future.set_running_or_notify_cancel():
            return
        assert self.speaker is not None
        try:
            future.set_result(errand(self.speaker))
        except Exception as error:
            future.set_exception(error)

    def _admit(self) -> None:
        """As many as there are free slots; each keeps its slot until its last part is spoken."""
        from tools.spoken_wave import SpokenWave
        from tools.utterance import Utterance

        assert self.speaker is not None
        while True:
            with self._changed:
                if len(self._spoken) >= self.num_slots or not self._waiting:
                    return
                job = self._waiting.popleft()
                self._spoken.append(job)
            if job.is_cancelled:
                self._leave(job, "left")
                continue
            try:
                reference = job.reference(self.speaker)
                job.utterance = Utterance(self.speaker, self._engine, reference, job.request)
                job.spoken = SpokenWave(self.speaker.codec, job.utterance, whole_parts=not job.in_windows)
            except Exception as error:
                self._fail(job, as_api_error(error), "failed")
                self._leave(job)

    def _speak(self) -> None:
        try:
            self._engine.advance()
        except Exception as error:  # out of memory, or the device is gone
            self._faults += 1
            log.exception("a block could not be spoken (%d in a row)", self._faults)
            for job in list(self._spoken):
                assert job.utterance is not None
                job.utterance.cancel()
                self._fail(job, ApiError(500, f"the model has a fault: {type(error).__name__}"), "failed")
                self._leave(job)
            if self._faults >= MAX_FAULTS:
                raise
            return
        self._faults = 0
        for job in list(self._spoken):
            try:
                self._follow(job)
            except Exception as error:
                if job.utterance is not None:
                    job.utterance.cancel()
                self._fail(job, as_api_error(error), "failed")
                self._leave(job)

    def _follow(self, job: Job) -> None:
        utterance, spoken = job.utterance, job.spoken
        if utterance is None or spoken is None or job.is_cancelled:
            return
        is_first = not utterance.parts and not job.has_sound
        spoken.follow()
        waves = spoken.waves()
        if is_first:
            job.deliver(Started())
        for wave in waves:
            if not job.has_sound:
                job.has_sound = True
                self.metrics.observe("first_sound_seconds", time.monotonic() - job.accepted)
            self.metrics.count("audio_seconds_total", len(wave) / SAMPLE_RATE)
            job.deliver(Sound(wave))
        if utterance.is_done:
            if not job.has_sound:
                self._fail(job, ApiError(500, NO_SOUND, code="no_sound"), "failed")
                self._leave(job)
                return
            self.metrics.observe("speech_seconds", time.monotonic() - job.accepted)
            ended = Ended(utterance.parts, utterance.is_complete)
            job.deliver(ended)
            self._leave(job, stop_reason(ended))

    def _leave(self, job: Job, ended: str | None = None) -> None:
        with self._changed:
            self._spoken.remove(job)
        if ended:
            self.metrics.count("speech_total", ended=ended)

    def _fail(self, job: Job, error: ApiError, ended: str) -> None:
        self.metrics.count("speech_total", ended=ended)
        job.deliver(Failed(error))

    def _abandon(self, error: ApiError) -> None:
        with self._changed:
            jobs, self._waiting, self._spoken = [*self._spoken, *self._waiting], deque(), []
            errands, self._errands = list(self._errands), deque()
        for job in jobs:
            self._fail(job, error, "refused")
        for _, future in errands:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def warm(speaker: Speaker, engine: Any) -> None:
    """Speak a second in a made-up voice: kernels are loaded and memory is taken before the first request."""
    from shards.delay_pattern import CODEBOOK_SIZE, NUM_CODEBOOKS
    from tools.reference import read_recordings
    from train.model.generation.request import Request

    rng = np.random.default_rng(0)
    wave = (0.1 * rng.standard_normal(SAMPLE_RATE)).astype(np.float32)
    reference = speaker.reference(read_recordings((wave, SAMPLE_RATE)), None)
    engine.submit(Request(speaker.prompt(reference, "نعم"), 25))
    for _ in engine.run():
        pass
    speaker.codec.decode(rng.integers(0, CODEBOOK_SIZE, (NUM_CODEBOOKS, 40)).astype(np.uint16))
