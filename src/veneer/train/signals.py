"""What a signal does for a while: a run is asked to stop, a trace ends, the processes of a run are told."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ECHO = 0.2
"""Seconds within which a signal that comes again is the same one: `timeout` and batch systems send it to a process and
to its group, and the second would kill a run that is about to save its state."""


@contextmanager
def heard(handle: Callable[[int], None], *numbers: int, once: bool = False) -> Iterator[None]:
    """While inside, each of these signals calls `handle` with its number; after it, they do what they did before.

    `once`: the first of them alone; a second one acts as usual, unless it is an echo of the first. Outside of the main
    thread nothing changes: Python runs handlers there alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def put_back() -> None:
        for number, handler in before.items():
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

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, come)
    try:
        yield
    finally:
        put_back()
