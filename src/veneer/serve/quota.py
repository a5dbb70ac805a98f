"""Quotas: what one owner may use of a server at a time.

    with quotas.take("acme", memory=size, requests=1):     before a body is unpacked, a file is stored, work is begun
        ...
    quotas.spend("acme", 2.5)                              seconds that a helper worked for the owner

An owner is a tenant's name, or "" for the operator and for everybody on a server without tenants. The limits are those
of `QuotaLimits`, the same for every owner. `take` raises Refused and takes nothing where a limit would be passed, and
`check_helpers` raises the last of these:

    413 too_large         the amount alone is over the limit: it can never be taken
    400 storage_full      no room on disk: the owner has to remove something
    429 overloaded        memory, requests or open files that other requests of the owner give back
    429 rate_limited      the seconds of helpers of the last ten minutes are used up

Threads are shared too: `FairThreads` is the executor in which a server does everything that blocks, whoever asked.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

from veneer.serve.request import Refused
from veneer.serve.settings import QuotaLimits
from veneer.serve.tenancy.limits import Window

_Resource = Literal["memory", "disk", "files", "descriptors", "requests"]

_WORDS = {
    "memory": "bytes in memory", "disk": "bytes on disk", "files": "files", "descriptors": "open files",
    "requests": "requests",
}  # fmt: skip
_STORED = ("disk", "files")
_WINDOW = 600.0
"""Seconds over which the seconds of helpers are counted."""


class Quotas:
    """The quotas of one server. Thread-safe; nothing here waits. `clock`: seconds that only grow."""

    def __init__(self, limits: QuotaLimits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.clock = limits or QuotaLimits(), clock
        self._lock = threading.Lock()
        self._used: dict[str, Counter[str]] = {}
        self._helpers: dict[str, Window] = {}

    def take(self, owner: str, **amounts: int) -> QuotaHold:
        """Reserve amounts of resources for an owner: all of them, or Refused and none."""
        hold = QuotaHold(self, owner)
        hold.add(**amounts)
        return hold

    def fits(self, owner: str, **amounts: int) -> bool:
        """Whether `take` would succeed now."""
        with self._lock:
            return self._refusal(owner, amounts, amounts) is None

    def used(self, owner: str, resource: _Resource) -> int:
        with self._lock:
            return self._used.get(owner, Counter())[resource]

    def spend(self, owner: str, seconds: float) -> None:
        """Count seconds that a helper (a process or a thread of its own) worked for an owner."""
        with self._lock:
            window = self._helpers.setdefault(owner, Window(_WINDOW))
            window.add(self.clock(), round(seconds * 1000))

    def check_helpers(self, owner: str) -> None:
        """Raises Refused (429 rate_limited) where the owner has no seconds of helpers left."""
        most = round(self.limits.helper_seconds * 1000)
        with self._lock:
            window, now = self._helpers.get(owner), self.clock()
            over = window.used(now) - most if window else -1
            wait = window.free_in(now, over + 1) if window and over >= 0 else 0.0
            for idle in [other for other, each in self._helpers.items() if not each.used(now)]:
                del self._helpers[idle]
        if over >= 0:
            what = f"{_owner(owner)} has used its {self.limits.helper_seconds:,.0f} helper seconds"
            raise Refused(
                f"{what} (helper_seconds) in the last {_WINDOW / 60:.0f} minutes", status=429, code="rate_limited",
                retry_after=wait,
            )  # fmt: skip

    def _refusal(self, owner: str, amounts: dict[str, int], whole: dict[str, int]) -> Refused | None:
        """Of taking `amounts`, so that a hold has `whole`."""
        used = self._used.get(owner, Counter())
        for name, amount in amounts.items():
            most: int = getattr(self.limits, name)
            if whole[name] > most:
                return Refused(
                    f"the request needs {whole[name]:,} {_WORDS[name]}; the limit ({name}) is {most:,}", status=413,
                    code="too_large", fix="send less per request",
                )  # fmt: skip
            if amount > 0 and used[name] + amount > most:
                what = f"{_owner(owner)} has {used[name]:,} {_WORDS[name]}; {amount:,} more would exceed the limit "
                what += f"({name}) of {most:,}"
                if name in _STORED:
                    fix = "delete files that are no longer needed"
                    return Refused(what, status=400, code="storage_full", fix=fix)
                return Refused(what, status=429, code="overloaded", retry_after=5.0, fix="ask again later")
        return None

    def _change(self, owner: str, amounts: dict[str, int], whole: dict[str, int] | None) -> None:
        """`whole`: as `_refusal` has it; None for a change that is never refused."""
        with self._lock:
            if whole is not None and (refusal := self._refusal(owner, amounts, whole)) is not None:
                raise refusal
            used = self._used.setdefault(owner, Counter())
            used.update(amounts)
            if not any(used.values()):
                del self._used[owner]


class QuotaHold:
    """What one request, or one thing that is kept, holds of its owner's quota. A context manager that releases it."""

    def __init__(self, quotas: Quotas, owner: str) -> None:
        self._quotas, self.owner = quotas, owner
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    def __enter__(self) -> QuotaHold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def add(self, **amounts: int) -> None:
        """Hold more. Raises Refused, and holds then what it held before."""
        with self._lock:
            self._quotas._change(self.owner, amounts, amounts)
            self._held.update(amounts)

    def change(self, **amounts: int) -> None:
        """Hold these amounts of the resources named. Raises Refused, and holds then what it held before."""
        with self._lock:
            more = {name: amount - self._held[name] for name, amount in amounts.items()}
            self._quotas._change(self.owner, more, amounts)
            self._held.update(more)

    def set(self, **amounts: int) -> None:
        """Hold these amounts of the resources named, as they were measured. Never refused: what is there counts."""
        with self._lock:
            more = {name: amount - self._held[name] for name, amount in amounts.items()}
            self._quotas._change(self.owner, more, None)
            self._held.update(more)

    def release(self) -> None:
        """Give everything back. A second call does nothing."""
        self.set(**dict.fromkeys(self._held, 0))


# -- threads -----------------------------------------------------------------------------------------------------------

current_owner: ContextVar[str] = ContextVar("current_owner", default="")
"""For whom the running task works: set where a request's key is checked."""


class FairThreads(ThreadPoolExecutor):
    """An event loop's default executor, of whose threads each tenant can have `share` at a time. Work for "" (the
    server, the operator) can have all of them."""

    def __init__(self, threads: int, share: int) -> None:
        super().__init__(threads, thread_name_prefix="veneer-work")
        self.share = share
        self._order = threading.Lock()
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        owner = current_owner.get()
        if not owner:
            return super().submit(fn, *args, **kwargs)
        future: Future[Any] = Future()
        with self._order:
            self._waiting.setdefault(owner, deque()).append((future, partial(fn, *args, **kwargs)))
        self._next(owner)
        return future

    def _next(self, owner: str) -> None:
        with self._order:
            if owner not in self._waiting or self._running[owner] >= self.share:
                return
            future, work = self._waiting[owner].popleft()
            if not self._waiting[owner]:
                del self._waiting[owner]
            self._running[owner] += 1
        try:
            super().submit(self._run, owner, future, work)
        except RuntimeError as error:  # the server ends
            future.set_exception(error)

    def _run(self, owner: str, future: Future[Any], work: Callable[[], Any]) -> None:
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        finally:
            with self._order:
                self._running[owner] -= 1
                if not self._running[owner]:
                    del self._running[owner]
            self._next(owner)


def _owner(owner: str) -> str:
    return f"tenant {owner}" if owner else "this server"
