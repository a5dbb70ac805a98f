"""Files as answers: sent in pieces that a thread reads, so that no other request waits for a disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import IO

from starlette.responses import Response, StreamingResponse

from veneer.library.store import CHUNK


def file_response(
    source: IO[bytes], size: int, disposition: str, *, headers: Mapping[str, str] | None = None,
    after: Callable[[], object] | None = None,
) -> Response:  # fmt: skip
    """`size`: the bytes that `source` has. `disposition`: by which the client calls the file. The source is closed,
    and `after` called in a thread, when all was sent or the client is gone."""

    async def chunks() -> AsyncIterator[bytes]:
        try:
            while chunk := await asyncio.to_thread(source.read, CHUNK):
                yield chunk
        finally:
            source.close()
            if after is not None:
                await asyncio.to_thread(after)

    head = {"content-length": str(size), "content-disposition": disposition, **(headers or {})}
    return StreamingResponse(chunks(), media_type="application/octet-stream", headers=head)
