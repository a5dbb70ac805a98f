"""A stream and its source are closed when the client disconnects or stops reading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from veneer.serve.http.sse import EventStream, data


class Source:
    """An endless source of events, one per turn of the event loop. `made`: number of events yielded."""

    def __init__(self) -> None:
        self.made, self.closed = 0, False

    async def lines(self) -> AsyncIterator[bytes]:
        while self.made < 10_000:
            self.made += 1
            await asyncio.sleep(0)
            yield data({"n": self.made})

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("turns", range(6))
def test_a_disconnect_during_a_write_ends_the_stream(turns: int) -> None:
    """uvicorn can resume a paused write at the moment it reports the disconnect. Whichever comes first, the
    source yields no more events."""

    async def run() -> None:
        source, gone = Source(), asyncio.Event()
        paused = asyncio.Event()

        async def send(message: dict[str, Any]) -> None:
            if source.made >= 3 and not gone.is_set():
                paused.set()
                await gone.wait()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            for _ in range(turns):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        stream = EventStream(source.lines(), source, lambda error: data(str(error)), 60.0)
        running = asyncio.create_task(stream({"type": "http"}, receive, send))
        await paused.wait()
        gone.set()
        await asyncio.wait_for(running, 10)
        assert source.closed
        assert source.made < 100

    asyncio.run(run())


def test_a_client_that_does_not_read_ends_the_stream() -> None:
    async def run() -> None:
        source = Source()

        async def never(*_: Any) -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        await asyncio.wait_for(EventStream(source.lines(), source, lambda error: b"", 0.05)({}, never, never), 10)
        assert source.closed

    asyncio.run(run())
