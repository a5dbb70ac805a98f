"""Temporary signal handlers, which stop a run or a trace, or notify the processes of a run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ECHO = 0.2
"""Seconds within which a repeated signal is ignored.

`timeout` and batch systems signal both a process and its group. Without this rule, the second signal would
kill a run that is saving its state."""


@contextmanager
def signal_handler(handle: Callable[[int], None], *numbers: int, once: bool = False) -> Iterator[None]:
    """Call `handle` with the number of each of these signals inside the context.

    The previous handlers are restored afterwards. Outside the main thread, nothing changes, because Python
    runs handlers in the main thread only.

    once: handle only the first signal. A second one has its usual effect, except for a repetition of the
    first within `_ECHO`."""
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
