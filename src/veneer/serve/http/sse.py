"""Server-sent events to one client.

Events are sent until the source ends, the client disconnects, or the client stops reading. In every case, the
source is closed, which cancels all of its running work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from veneer.serve.http.errors import as_refused, json_bytes, log
from veneer.serve.request import Refused


def data(content: Any, *, tight: bool = False) -> bytes:
    """Return one event. `tight`: omit the space after the colon, as TGI does."""
    body = content.encode() if isinstance(content, str) else json_bytes(content)
    return (b"data:" if tight else b"data: ") + body + b"\n\n"


def typed(event: Mapping[str, Any]) -> bytes:
    """Return one event whose name is its `type`."""
    return f"event: {event['type']}\n".encode() + data(event)


class EventStream(Response):
    """A stream of server-sent events.

    `lines`: the events as bytes, made from `source`. `format_error`: formats an error that occurs after the
    status was sent. `stall`: seconds after which a client that has not read is disconnected.
    """

    def __init__(
        self,
        lines: AsyncIterator[bytes],
        source: AsyncGenerator[Any, None],
        format_error: Callable[[Refused], bytes],
        stall: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers=headers)
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # otherwise nginx buffers the events
        del self.headers["content-length"]
        self.lines, self.source, self.format_error, self.stall = lines, source, format_error, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(client_left(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)
            if isinstance(self.lines, AsyncGenerator):
                await self.lines.aclose()
            await self.source.aclose()

    async def _write(self, send: Send) -> None:
        async def send_timed(message: dict[str, Any]) -> None:
            async with asyncio.timeout(self.stall):  # not asyncio.wait_for, which can lose a cancellation
                await send(message)

        try:
            await send_timed({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for line in self.lines:
                    await send_timed({"type": "http.response.body", "body": line, "more_body": True})
            except (TimeoutError, OSError):
                raise
            except Exception as error:
                await send_timed(
                    {"type": "http.response.body", "body": self.format_error(as_refused(error)), "more_body": True}
                )
            await send_timed({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.info("a stream was not read for %g s and is cancelled", self.stall)
        except OSError:
            pass  # the client has disconnected


async def client_left(receive: Receive) -> None:
    """Return once the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
