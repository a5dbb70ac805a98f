"""What a signal does for a while: a run is asked to stop, a trace ends, the processes of a run are told."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def heard(handle: Callable[[int], None], *numbers: int, once: bool = False) -> Iterator[None]:
    """While inside, each of these signals calls `handle` with its number; after it, they do what they did before.

    `once`: that they do again as soon as the first of them has come, so that a second one acts as usual. Outside of the
    main thread nothing changes: Python runs handlers there alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def come(number: int, frame: object) -> None:
        if once:
            put_back()
        handle(number)

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, come)
    try:
        yield
    finally:
        put_back()
