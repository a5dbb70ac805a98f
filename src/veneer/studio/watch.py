"""Pages that follow what changes beneath them: others write to the library and the jobs, too.

on_change(page.studio.library_mark, 1.0, refill)         asks for the mark each second; `refill` when it is another
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui

from veneer.studio.access import VISITORS


def on_change(mark: Callable[[], Any], every: float, changed: Callable[[], Awaitable[None] | None]) -> ui.timer:
    """`mark`: what is compared with what it was; it is called in a thread. `changed`: called on the loop, where parts
    may be drawn anew. It ends with the view that it was called in; `.deactivate()` ends it before."""
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
