"""Limits on HTTP connections: their number, and how long they can wait.

    head      a request's head must arrive within `head_time`, on new and on reused connections
    body      see app.AuthMiddleware; data still sent after a response must end within `body_time`
    idle      a connection is kept for `idle` seconds after a response
    unread    a client that does not read for `stall` seconds is disconnected and its requests are cancelled
    many      above `connections`, the server closes the oldest WebSocket (pages reconnect); without
              WebSockets, the connection that has waited longest for a request

Each connection has one timer for its head and body limits.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from veneer.serve.settings import HttpSettings

_OTHER_FILES = 512
"""Number of open files besides connections: libraries, databases, logs."""


def protocols_of(settings: HttpSettings, sockets: bool) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol] | str]:
    """Return uvicorn's protocol classes with these limits, for `http` and `ws` of its Config.

    `sockets`: whether WebSockets are allowed.
    """
    all = _All()
    http = type("Connection", (_Connection,), {"settings": settings, "all": all})
    if not sockets:
        return http, "none"
    from uvicorn.protocols.websockets.websockets_sansio_impl import (
        WebSocketsSansIOProtocol,
    )  # imported late, because this module needs an extra

    class Socket(WebSocketsSansIOProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            all.sockets[self] = None

        def connection_lost(self, exc: Exception | None) -> None:
            all.sockets.pop(self, None)
            super().connection_lost(exc)

    return http, Socket


def raise_file_limit(count: int) -> None:
    """Raise this process's limit on open files to fit `count` connections, but not above the hard limit."""
    with suppress(ImportError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        need = count + _OTHER_FILES
        if soft != resource.RLIM_INFINITY and soft < need:
            most = need if hard == resource.RLIM_INFINITY else min(need, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@dataclass
class _All:
    """All open connections.

    `waiting`: connections that wait for a request -> when the wait started, oldest first. `sockets`:
    WebSockets, oldest first.
    """

    waiting: dict[_Connection, float] = field(default_factory=dict)
    sockets: dict[Any, None] = field(default_factory=dict)


class _Connection(H11Protocol):
    settings: HttpSettings
    all: _All
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._await_head()
        if len(self.connections) > self.settings.connections:
            if socket := next(iter(self.all.sockets), None):
                del self.all.sockets[socket]
                socket.shutdown()
            else:
                next(iter(self.all.waiting)).timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        self._restart_timer(None)
        self._cancel_stall_timer()
        self.all.waiting.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            if self._timer is None:
                self._await_head()
        elif self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            if self._timer is None:  # the response is complete, but the client is still sending
                self._restart_timer(self.settings.body_time)
        else:
            self.all.waiting.pop(self, None)
            self._restart_timer(None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._mark_waiting()

    def _await_head(self) -> None:
        self._mark_waiting()
        self._restart_timer(self.settings.head_time)

    def _mark_waiting(self) -> None:
        self.all.waiting.pop(self, None)
        self.all.waiting[self] = self.loop.time()

    def _restart_timer(self, seconds: float | None) -> None:
        """Restart the timer, which closes the connection after `seconds`; None stops the timer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection."""
        self.all.waiting.pop(self, None)
        super().timeout_keep_alive_handler()
        if self._unread is None:
            self.pause_writing()  # start the stall timeout for data that is already written

    # -- slow readers --------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.settings.stall, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stall_timer()

    def _cancel_stall_timer(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
