"""Connections that nobody uses do not stay: time limits of one HTTP connection, and of how many there are.

    head      a request's first line and headers have to come within `head_time`, on a new connection and on a kept one
    body      see app.Door; what is still sent after an answer has to end within `body_time`
    idle      a connection is kept for `idle` seconds after an answer
    unread    a client that reads nothing for `stall` seconds is cut off, and what still runs for it is cancelled
    many      beyond `connections` the one that has waited longest for a request is closed for the new one

An event loop's timers are cheap: each connection has one, for whichever of these it is in.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from veneer.serve.http.house import HttpSettings

__all__ = ["connection_of", "many_files"]


def connection_of(settings: HttpSettings) -> type[asyncio.Protocol]:
    """uvicorn's protocol with these limits, for its Config's `http`."""
    return type("Connection", (_Connection,), {"settings": settings, "waiting": {}})


def many_files(wanted: int) -> None:
    """Let this process have so many connections, as far as its hard limit goes."""
    with suppress(ImportError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        need = wanted + 512
        if soft != resource.RLIM_INFINITY and soft < need:
            most = need if hard == resource.RLIM_INFINITY else min(need, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Connection(H11Protocol):
    settings: HttpSettings
    waiting: dict[_Connection, None]
    """Those that wait for a request, of all, the longest first."""
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        if len(self.connections) > self.settings.connections and self.waiting:
            next(iter(self.waiting))._close()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest(None)
        self._read()
        self.waiting.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            if self._timer is None:
                self._await_head()
        elif self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE:
            if self._timer is None:  # its request is answered, and it still sends
                self._rest(self.settings.body_time)
        else:
            self.waiting.pop(self, None)
            self._rest(None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.waiting[self] = None

    def _await_head(self) -> None:
        self.waiting[self] = None
        self._rest(self.settings.head_time)

    def _rest(self, seconds: float | None) -> None:
        """Close in so many seconds, unless something else is said before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._close)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _close(self) -> None:
        self.waiting.pop(self, None)
        super().timeout_keep_alive_handler()
        if self._unread is None:
            self.pause_writing()  # what was written before has to be read, too

    # -- who does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.settings.stall, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read()

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
