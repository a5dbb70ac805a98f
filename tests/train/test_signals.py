"""Signals inside the `signal_handler` block, and the previous handlers after the block."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from veneer.train.signals import signal_handler


class Pressed(Exception):
    """Raised by the previous signal handler."""


@pytest.fixture(autouse=True)
def before() -> Iterator[object]:
    def usual(number: int, frame: object) -> None:
        raise Pressed

    old = signal.signal(signal.SIGTERM, usual)
    yield usual
    signal.signal(signal.SIGTERM, old)


def test_signals_are_handled_inside_and_restored_afterwards(before: object) -> None:
    found: list[int] = []
    with signal_handler(found.append, signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert found == [signal.SIGTERM] * 2
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyError), signal_handler(found.append, signal.SIGTERM):
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_signal_runs_previous_handler_unless_immediate() -> None:
    """The `timeout` command sends its signal twice: to the process and to the process group."""
    found: list[int] = []
    with signal_handler(found.append, signal.SIGTERM, once=True):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(Pressed):
            signal.raise_signal(signal.SIGTERM)
    assert found == [signal.SIGTERM]


def test_outside_of_the_main_thread_nothing_changes(before: object) -> None:
    seen: list[object] = []

    def inside() -> None:
        with signal_handler(print, signal.SIGTERM):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join(timeout=60)
    assert seen == [before]
