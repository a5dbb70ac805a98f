"""File downloads, read in chunks in a thread, so that a slow disk blocks no other request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import IO

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from veneer.library.store import CHUNK


def file_response(
    source: IO[bytes],
    size: int,
    disposition: str,
    *,
    headers: Mapping[str, str] | None = None,
    after: Callable[[], object] | None = None,
) -> Response:
    """Return a response that sends a file.

    `size`: bytes in `source`. `disposition`: the Content-Disposition header with the file's name. After the
    last byte or a disconnect, a thread closes the source and calls `after`.
    """

    async def chunks() -> AsyncIterator[bytes]:
        while chunk := await asyncio.to_thread(source.read, CHUNK):
            yield chunk

    async def end() -> None:
        source.close()
        if after is not None:
            await asyncio.to_thread(after)

    head = {
        "content-type": "application/octet-stream",
        "content-length": str(size),
        "content-disposition": disposition,
        **(headers or {}),
    }

    return _Download(chunks(), end, head)


class _Download(StreamingResponse):
    """A response that always calls `end`, even if the client disconnects at once."""

    def __init__(self, chunks: AsyncIterator[bytes], end: Callable[[], Awaitable[None]], head: dict[str, str]) -> None:
        super().__init__(chunks, headers=head)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()
