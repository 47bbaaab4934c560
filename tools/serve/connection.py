"""Patience with one connection, where uvicorn has none of its own: how long a head may come in, and how long nobody may read.

In: uvicorn's protocol. Out: the same, ended by a clock. A head that comes byte by byte would hold a descriptor for ever, and a
client that reads nothing the speech that was made for it. What is ended for not reading is reset, because a polite end would
wait for the same reader. Bodies have their clock in the guard, where they can still be answered.
"""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True)
class Patience:
    head_s: float = 20.0  # from the connection, or from the first byte of a later request, to the end of its head
    unread_s: float = 60.0  # with more waiting to be read than the buffers hold


def make_protocol(patience: Patience) -> type[H11Protocol]:
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol as Base

    class Protocol(Base):
        head_timer: TimerHandle | None = None
        unread_timer: TimerHandle | None = None

        def connection_made(self, transport: Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().connection_made(transport)
            self.head_timer = self.loop.call_later(patience.head_s, self.timeout_keep_alive_handler)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            is_in_head = self.conn.their_state is h11.IDLE
            if self.head_timer is not None and not is_in_head:
                self.head_timer.cancel()
                self.head_timer = None
            elif self.head_timer is None and is_in_head and not self.transport.is_closing():
                self.head_timer = self.loop.call_later(patience.head_s, self.timeout_keep_alive_handler)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.unread_timer = self.loop.call_later(patience.unread_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.unread_timer is not None:
                self.unread_timer.cancel()
                self.unread_timer = None

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            if self.transport.get_write_buffer_size():
                self.loop.call_later(patience.unread_s, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self.head_timer, self.unread_timer):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

    return Protocol
