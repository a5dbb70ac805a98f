"""Quotas: limits on the resources that one owner can use at a time.

    with quotas.take("acme", memory=size, requests=1):    before a body is unpacked or a file is stored
        ...

An owner is a tenant's name, or "" for the operator and for everyone on a server without tenants.
`QuotaLimits` sets the same limits for every owner. If a limit would be exceeded, `take` raises Refused and
takes nothing:

    413 too_large         the request's amount exceeds the limit, even if nothing else is in use
    400 storage_full      the owner's disk quota is used up: the owner has to delete something
    429 overloaded        memory, requests or open files, which other requests of the owner will release

Uploaded files and the library's adapters are counted in their databases; `check_stored` compares these counts
with the same limits. All blocking work runs in the executor `FairThreads`, which tenants share.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

from veneer.serve.engine.admission import FairPool
from veneer.serve.request import Refused
from veneer.serve.settings import QuotaLimits

_Resource = Literal["memory", "disk", "files", "descriptors", "requests"]

_WORDS = {
    "memory": "bytes in memory", "disk": "bytes on disk", "files": "files", "descriptors": "open files",
    "requests": "requests",
}  # fmt: skip
_STORED = ("disk", "files")


class Quotas:
    """The quotas of one server. Thread-safe; no method blocks."""

    def __init__(self, limits: QuotaLimits | None = None) -> None:
        self.limits = limits or QuotaLimits()
        self._lock = threading.Lock()
        self._used: dict[str, Counter[str]] = {}

    def take(self, owner: str, **amounts: int) -> QuotaHold:
        """Reserve resources for an owner.

        If any amount exceeds its limit, raises Refused and reserves nothing.
        """
        hold = QuotaHold(self, owner)
        hold.add(**amounts)
        return hold

    def fits(self, owner: str, **amounts: int) -> bool:
        """Return whether `take` would succeed now."""
        with self._lock:
            return self._refusal(owner, amounts, amounts) is None

    def check_stored(self, owner: str, **stored: tuple[int, int]) -> None:
        """Raise Refused (storage_full) if an addition would exceed a limit.

        `stored`: resource -> (measured amount in use, amount to add).
        """
        for name, (used, more) in stored.items():
            if used + more > getattr(self.limits, name):
                raise self._over(owner, name, used, more)

    def used(self, owner: str, resource: _Resource) -> int:
        with self._lock:
            return self._used.get(owner, Counter())[resource]

    def _refusal(self, owner: str, amounts: dict[str, int], total: dict[str, int]) -> Refused | None:
        """Return the error for adding `amounts` to a hold, or None if the quota allows it.

        `total`: the amounts that the request needs in all.
        """
        used = self._used.get(owner, Counter())
        for name, amount in amounts.items():
            most: int = getattr(self.limits, name)
            if total[name] > most:
                message = f"the request needs {total[name]:,} {_WORDS[name]}; the limit ({name}) is {most:,}"
                return Refused(message, status=413, code="too_large", fix="send less per request")
            if amount > 0 and used[name] + amount > most:
                return self._over(owner, name, used[name], amount)
        return None

    def _over(self, owner: str, name: str, used: int, more: int) -> Refused:
        who = f"tenant {owner}" if owner else "this server"
        message = f"{who} has {used:,} {_WORDS[name]}; {more:,} more would exceed the limit ({name}) of "
        message += f"{getattr(self.limits, name):,}"
        if name in _STORED:
            return Refused(message, status=400, code="storage_full", fix="delete data that is no longer needed")
        return Refused(message, status=429, code="overloaded", retry_after=5.0, fix="ask again later")

    def _change(self, owner: str, amounts: dict[str, int], total: dict[str, int] | None) -> None:
        """Add `amounts` to an owner's usage, or raise Refused.

        `total`: as in `_refusal`; None for a change that is never refused.
        """
        with self._lock:
            if total is not None and (refusal := self._refusal(owner, amounts, total)) is not None:
                raise refusal
            used = self._used.setdefault(owner, Counter())
            used.update(amounts)
            if not any(used.values()):
                del self._used[owner]


class QuotaHold:
    """The part of an owner's quota that one request or stored object uses.

    A context manager, which releases the hold at the end of its block.
    """

    def __init__(self, quotas: Quotas, owner: str) -> None:
        self._quotas, self.owner = quotas, owner
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    def __enter__(self) -> QuotaHold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def add(self, **amounts: int) -> None:
        """Reserve additional amounts. If this raises Refused, the hold is unchanged."""
        with self._lock:
            self._quotas._change(self.owner, amounts, amounts)
            self._held.update(amounts)

    def change(self, **amounts: int) -> None:
        """Set the named resources to these amounts. If this raises Refused, the hold is unchanged."""
        self._set(amounts, amounts)

    def set(self, **amounts: int) -> None:
        """Set the named resources to measured amounts.

        Never refused, because the amounts are already in use."""
        self._set(amounts, None)

    def _set(self, amounts: dict[str, int], total: dict[str, int] | None) -> None:
        with self._lock:
            more = {name: amount - self._held[name] for name, amount in amounts.items()}
            self._quotas._change(self.owner, more, total)
            self._held.update(more)

    def release(self) -> None:
        """Release everything. A second call does nothing."""
        self.set(**dict.fromkeys(self._held, 0))


# -- threads -----------------------------------------------------------------------------------------------------------

current_owner: ContextVar[str] = ContextVar("current_owner", default="")
"""The tenant for which the current task works; set when a request's key is checked."""


class FairThreads(FairPool):
    """An event loop's default executor, with a thread limit per tenant.

    A tenant can use `share` threads at a time. Work for "" (the server, the operator) can use all threads.
    """

    def __init__(self, threads: int, share: int) -> None:
        super().__init__(threads, "veneer-work", share)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.add(current_owner.get(), 1.0, 1, partial(fn, *args, **kwargs))

    def most(self, tenant: str) -> int:
        return self.share if tenant else self.threads
