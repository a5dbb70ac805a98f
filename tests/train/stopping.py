"""How tests of resumed runs stop a run."""

from __future__ import annotations

import os
import signal

from veneer.train.events import Event, Listener, Stepped


def interrupt_at(step: int) -> Listener:
    """A listener that sends Ctrl-C to this process after `step`."""

    def listen(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return listen
