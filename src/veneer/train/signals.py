"""Install signal handlers temporarily, to stop a run or a trace, or to notify a run's processes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ECHO = 0.2
"""Seconds within which a repeated signal is ignored.

`timeout` and batch systems send the same signal to a process and to its group. Without this rule, the second
signal would kill a run that is saving its state."""


@contextmanager
def signal_handler(handle: Callable[[int], None], *numbers: int, once: bool = False) -> Iterator[None]:
    """Handle the given signals inside the context, by calling `handle` with the signal's number.

    The previous handlers are restored afterwards. Outside the main thread, nothing changes, because Python
    runs signal handlers only in the main thread.

    once: handle only the first signal. A second signal has its previous effect, unless it arrives within
    `_ECHO` seconds of the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def restore_handlers() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    first: float | None = None

    def receive(number: int, frame: object) -> None:
        nonlocal first
        if not once or first is None:
            first = time.monotonic()
            handle(number)
        elif time.monotonic() - first > _ECHO:
            restore_handlers()
            signal.raise_signal(number)

    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, receive)
    try:
        yield
    finally:
        restore_handlers()
