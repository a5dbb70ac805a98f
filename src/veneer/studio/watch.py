"""Polling for changes by others, such as new adapters and job events.

on_change(page.studio.library_mark, 1.0, refill)         polls the mark each second; calls `refill` on a change
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui

from veneer.studio.access import VISITORS


def on_change(mark: Callable[[], Any], every: float, changed: Callable[[], Awaitable[None] | None]) -> ui.timer:
    """Call `changed` whenever the value of `mark` changes; return the timer.

    `mark` runs in a thread; `changed` runs on the event loop and can draw. `every`: seconds between polls.
    The timer ends with the current view; `.deactivate()` ends it earlier."""
    last: list[Any] = []
    visitor = VISITORS[ui.context.client]

    async def look() -> None:
        now = await asyncio.to_thread(mark)
        if last and now != last[0]:
            await visitor.again()
            if inspect.isawaitable(made := changed()):
                await made
        last[:] = [now]

    return ui.timer(every, look)
