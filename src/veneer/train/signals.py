"""Temporary signal handlers: stop a run or a trace, notify a run's processes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ECHO = 0.2
"""Seconds within which a repeated signal counts as the same one.

`timeout` and batch systems signal a process and its group, and the second signal would kill a run that is
saving its state."""


@contextmanager
def signal_handler(handle: Callable[[int], None], *numbers: int, once: bool = False) -> Iterator[None]:
    """Call `handle` with the number of each of these signals inside the with-block.

    The previous handlers are restored afterwards. `once`: only for the first signal; a second one acts as
    usual, unless it is an echo of the first. Outside the main thread nothing changes, because Python runs
    handlers only there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def put_back() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    first: float | None = None

    def come(number: int, frame: object) -> None:
        nonlocal first
        if not once or first is None:
            first = time.monotonic()
            handle(number)
        elif time.monotonic() - first > _ECHO:
            put_back()
            signal.raise_signal(number)

    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, come)
    try:
        yield
    finally:
        put_back()
