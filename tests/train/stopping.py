"""Interruption of runs at a given step, for tests of resuming."""

from __future__ import annotations

import os
import signal

from veneer.train.events import Event, Listener, Stepped


def interrupt_at(step: int) -> Listener:
    """Return a listener that sends SIGINT to this process after `step`."""

    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return listen
