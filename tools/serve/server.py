"""The process: a listening socket, uvicorn, and an end that answers everybody.

In: an application and its queue. Out: the exit status. SIGTERM and Ctrl-C first refuse what waits and what still comes (503),
speak what is being spoken to its end, at most `grace_s`, and only then close the socket: whoever was let in gets an answer. A
second signal ends at once. uvicorn's own handler would close the socket first and let the queue run dry behind it.
"""

from __future__ import annotations

import socket
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from shards.errors import ConfigError, PipelineError
from shards.terminal import print_line
from tools.serve.connection import Patience, make_protocol
from tools.serve.guard import LOOPBACK
from tools.serve.speech_queue import SpeechQueue

if TYPE_CHECKING:
    import uvicorn

QUIET_S = 0.5  # of an idle queue before the socket closes: who has connected already is still answered
BACKLOG = 512


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}; name another") from None
    listener.listen(BACKLOG)
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    return host in LOOPBACK or host.startswith("127.")


def run_server(app: Any, queue: SpeechQueue, listener: socket.socket, grace_s: float) -> None:
    """Serve until a signal comes. Raises PipelineError where the model cannot be loaded, and its fault later."""
    server = make_server(app, queue, grace_s, address_of(listener))
    queue.start()
    try:
        server.run(sockets=[listener])
    finally:
        queue.end()
    if isinstance(queue.fault, (PipelineError, OSError)):
        raise queue.fault
    if queue.fault is not None:
        raise PipelineError(f"the model failed: {type(queue.fault).__name__}: {queue.fault}") from queue.fault


def make_server(
    app: Any, queue: SpeechQueue, grace_s: float, address: str, patience: Patience | None = None
) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        stop_at = 0.0
        idle_since = 0.0
        has_said_where = False

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """In the main thread, anywhere: only marks are set here."""
            if self.stop_at:
                self.should_exit = self.force_exit = True
            self.stop_at = time.monotonic() + grace_s

        async def on_tick(self, counter: int) -> bool:
            if not self.has_said_where and queue.state == "ready":
                self.has_said_where = True
                print_line(f"serving at {address}")
            if queue.state == "failed" and not self.stop_at:
                self.stop_at = time.monotonic()
            if self.stop_at:
                self.should_exit = self.should_exit or self._is_over()
            return await super().on_tick(counter)

        def _is_over(self) -> bool:
            queue.stop()
            now = time.monotonic()
            if now >= self.stop_at:
                queue.end(5.0)
                return True
            if not queue.is_idle or queue.state == "loading":
                self.idle_since = 0.0
                return False
            self.idle_since = self.idle_since or now
            return now - self.idle_since >= QUIET_S

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=10,
        h11_max_incomplete_event_size=64 << 10,
        http=make_protocol(patience or Patience()),
        ws="none",
        lifespan="off",
        backlog=BACKLOG,
    )
    return Server(config)
