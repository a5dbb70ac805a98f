"""Answers of shadows: computed behind the requests of a route, compared, counted, logged; never sent.

A shadow's answer is the operator's: in the ledger under the shadow's own name, and in nobody's turn of the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

from veneer.serve.access import SHADOWS, Bill, Served, ShadowAnswer, Tenancy
from veneer.serve.http.metrics import Metrics
from veneer.serve.request import Refused

log = logging.getLogger("veneer.serve")


class Shadows:
    """`most`: answers of shadows that may be computed at a time; beyond them requests go without."""

    def __init__(self, tenancy: Tenancy, metrics: Metrics, most: int) -> None:
        self.tenancy, self.metrics, self.most = tenancy, metrics, most
        self.running: set[asyncio.Task[None]] = set()

    def follow(self, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Whether `work` now runs behind a request: it does unless as many do already as may."""
        if len(self.running) >= self.most:
            return False
        task = asyncio.create_task(work())
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return True

    def admitted(self, served: Served, *, request: str, prompt: int, most: int) -> AbstractAsyncContextManager[Bill]:
        """Room under the limits for the answer of a route's shadow, and its bill. Raises Refused where it cannot be."""
        assert served.shadow is not None
        name, mix = served.shadow
        if isinstance(mix, Refused):
            raise mix
        own = Served(mix, served.name, name, adapters=(name,) if mix else ())
        return self.tenancy.admitted(SHADOWS, own, request=request, prompt_tokens=prompt, max_tokens=most)

    def answered(self, answer: ShadowAnswer) -> None:
        """A shadow has answered, or failed: it is counted, and the tenancy keeps how the two compare."""
        self.metrics.shadow(answer.name, answer.shadow, answer.outcome)
        if answer.error:  # nothing was compared: the log of shadows has that it failed, this one why
            log.warning("the shadow %s of %s failed (%s): %s", answer.shadow, answer.name, answer.request, answer.error)
        self.tenancy.note_shadow(answer)
