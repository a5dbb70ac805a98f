"""Responses that clients continue or fetch, in this process's memory.

Each tenant has at most `LARGEST` bytes of responses, each for at most `LIFETIME` seconds. A new response replaces
the tenant's oldest ones. All tenants together have at most `TOTAL` bytes: beyond, the tenant with the most bytes
loses its oldest response. The bytes count against the tenant's quota of memory until the response is deleted.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from veneer.serve.quota import QuotaHold, Quotas

LIFETIME = 24 * 3600.0
LARGEST, TOTAL = 100_000_000, 1 << 30
_OVERHEAD = 1024
"""Bytes that are counted for each response beyond its JSON."""


@dataclass(frozen=True)
class _Stored:
    data: bytes
    at: float
    size: int
    hold: QuotaHold


class StoredResponses:
    """The responses of one server, used only on its event loop. `clock`: returns seconds; never goes back."""

    def __init__(self, quotas: Quotas, clock: Callable[[], float] = time.monotonic) -> None:
        self.quotas, self.clock = quotas, clock
        self._of: dict[str, dict[str, _Stored]] = {}  # owner -> id -> response, oldest first
        self._bytes: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, owner: str, id: str, data: bytes) -> bool:
        """Store a response's JSON, and delete older responses to make room; return whether there is room."""
        self.expire()
        size = len(data) + _OVERHEAD
        if size > LARGEST:
            return False
        while self._bytes[owner] + size > LARGEST or not self.quotas.fits(owner, memory=size):
            if not self._bytes[owner]:
                return False  # the quota is used up by other requests
            self.delete(owner, next(iter(self._of[owner])))
        while self._bytes.total() + size > TOTAL:
            most = max(self._bytes, key=self._bytes.__getitem__)
            self.delete(most, next(iter(self._of[most])))
        hold = self.quotas.take(owner, memory=size)
        self._of.setdefault(owner, {})[id] = _Stored(data, self.clock(), size, hold)
        self._bytes[owner] += size
        self._wait()
        return True

    def get(self, owner: str, id: str) -> bytes | None:
        self.expire()
        stored = self._of.get(owner, {}).get(id)
        return None if stored is None else stored.data

    def delete(self, owner: str, id: str) -> bool:
        """Delete a response; return whether the owner had it."""
        stored = self._of.get(owner, {}).pop(id, None)
        if stored is None:
            return False
        stored.hold.release()
        self._bytes[owner] -= stored.size
        if not self._of[owner]:
            del self._of[owner], self._bytes[owner]
        return True

    def expire(self) -> None:
        """Delete the responses that are older than `LIFETIME`."""
        before = self.clock() - LIFETIME
        for owner in list(self._of):
            while owner in self._of and next(iter(self._of[owner].values())).at <= before:
                self.delete(owner, next(iter(self._of[owner])))

    def _wait(self) -> None:
        """Start the timer that deletes the next responses to expire, unless it runs."""
        if self._timer is None and self._of:
            oldest = min(next(iter(stored.values())).at for stored in self._of.values())
            wait = max(1.0, oldest + LIFETIME - self.clock())
            self._timer = asyncio.get_running_loop().call_later(wait, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.expire()
        self._wait()
