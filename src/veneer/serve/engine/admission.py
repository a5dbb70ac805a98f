"""Admission: how much one server takes on at once, and how much of that may be one tenant's, before any work is done.

    place = admission.enter(tenant, weight)      a request is at the door
    place.take("bodies", bytes)                  before its body is read
    place.take("answers", prompts · n)           before anything is made of it
    await place.work(size, tokenise)             in threads of their own, the tenant that was given least next
    place.leave()                                it has ended: all of it is given back

A tenant may hold as much of each as is still free, times its weight (dynamic thresholds: Choudhury and Hahne, IEEE/ACM
Transactions on Networking 6, 1998). Alone it gets half, two that flood get a third each, n of them 1/(n + 1), and what
is left then is for whoever comes next: nobody fills a queue. Where there are no tenants, everything is for everybody.
All of it runs on one event loop; nothing here waits but `work`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from veneer.serve.request import Refused

T = TypeVar("T")

_LONG = 64 << 10
"""Size from which work counts as long: long work has a thread of its own, so that short never waits for it."""
LEAST, MOST = 0.5, 4.0
"""A weight counts as one of these at least and at most here: a small share is still room for a whole request."""


class SharedQuantity:
    """`total` units of something, of which each tenant may hold a part. `what`: what error messages call it."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.held = what, total, 0
        self.by: dict[str, int] = {}

    def take(self, tenant: str, weight: float, amount: int) -> None:
        """Raises Refused (overloaded, 429)."""
        own, free = self.by.get(tenant, 0), self.total - self.held - amount
        alpha = min(max(weight, LEAST), MOST)
        if free < 0 or (tenant and own + amount > alpha * free):
            what = f"too many {self.what} at once" + (" from this tenant" if free >= 0 else "")
            raise Refused(what, status=429, code="overloaded", retry_after=1.0)
        self.held += amount
        self.by[tenant] = own + amount

    def give(self, tenant: str, amount: int) -> None:
        self.held -= amount
        self.by[tenant] -= amount
        if not self.by[tenant]:
            del self.by[tenant]


@dataclass
class _Work:
    weight: float
    size: int
    do: Callable[[], Any]
    result: Future[Any] = field(default_factory=Future)


class FairPool(ThreadPoolExecutor):
    """A pool of threads that tenants share fairly: a free thread takes work of the tenant that was given least so far,
    by weight. A tenant that waits for nothing earns nothing. `share`: the most threads that one tenant can use at a
    time, for long work that must not block other tenants; by default all."""

    def __init__(self, threads: int, name: str, share: int | None = None) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self.threads, self.share = threads, share or threads
        self._order = threading.Lock()
        self._busy: Counter[str] = Counter()
        self._waiting: dict[str, deque[_Work]] = {}
        self._given: dict[str, float] = {}

    async def run(self, tenant: str, weight: float, size: int, do: Callable[[], T]) -> T:
        """Call `do` in a thread; returns what it returns, raises what it raises. `size`: of the work."""
        result: T = await asyncio.wrap_future(self.add(tenant, weight, size, do))
        return result

    def close(self) -> None:
        self.shutdown(wait=False, cancel_futures=True)

    def add(self, tenant: str, weight: float, size: int, do: Callable[[], Any]) -> Future[Any]:
        """Queue work; returns the future of its result."""
        work = _Work(weight, max(1, size), do)
        with self._order:
            self._given.setdefault(tenant, min(self._given.values(), default=0.0))
            self._waiting.setdefault(tenant, deque()).append(work)
        self._start()
        return work.result

    def most(self, tenant: str) -> int:
        """Return how many threads a tenant can use at a time."""
        return self.share

    def _start(self) -> None:
        """Give waiting work to free threads."""
        while (found := self._take()) is not None:
            try:
                super().submit(self._do, *found)
            except RuntimeError as error:  # the pool was shut down
                found[1].result.set_exception(error)
                self._end(found[0])

    def _take(self) -> tuple[str, _Work] | None:
        with self._order:
            while self._busy.total() < self.threads:
                ready = [tenant for tenant in self._waiting if self._busy[tenant] < self.most(tenant)]
                if not ready:
                    break
                tenant = min(ready, key=self._given.__getitem__)
                work = self._waiting[tenant].popleft()
                if not self._waiting[tenant]:
                    del self._waiting[tenant]
                if work.result.set_running_or_notify_cancel():  # False: the caller has left
                    self._given[tenant] += work.size / work.weight
                    self._busy[tenant] += 1
                    return tenant, work
            if not self._busy.total():
                self._given.clear()
            return None

    def _end(self, tenant: str) -> None:
        with self._order:
            self._busy[tenant] -= 1
            if not self._busy[tenant]:
                del self._busy[tenant]

    def _do(self, tenant: str, work: _Work) -> None:
        try:
            work.result.set_result(work.do())
        except BaseException as error:
            work.result.set_exception(error)
        finally:
            self._end(tenant)
            self._start()


class Admission:
    """Limits of one server. `bodies`: bytes of request bodies in memory; `answers`: answers that run or wait; `texts`:
    characters that wait to be tokenised."""

    def __init__(self, *, bodies: int, answers: int, texts: int) -> None:
        self.shares: Mapping[str, SharedQuantity] = {
            "bodies": SharedQuantity("bytes of requests", bodies),
            "answers": SharedQuantity("requests", answers),
            "texts": SharedQuantity("characters to be tokenised", texts),
        }
        # One thread each: it tokenises megabytes a second, and a second one would keep the interpreter's lock from the
        # engine, whose step takes it dozens of times, for twice as long.
        self._short, self._long = FairPool(1, "short"), FairPool(1, "long")

    def enter(self, tenant: str = "", weight: float = 1.0) -> AdmittedRequest:
        return AdmittedRequest(self, tenant, weight)

    def pool(self, size: int) -> FairPool:
        return self._short if size < _LONG else self._long

    def close(self) -> None:
        self._short.close()
        self._long.close()


@dataclass(eq=False)
class AdmittedRequest:
    """What one request holds of each quantity, until it leaves."""

    admission: Admission
    tenant: str = ""
    weight: float = 1.0
    held: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def take(self, what: str, amount: int) -> None:
        """Raises Refused (overloaded, 429) where there is no room for it."""
        self.admission.shares[what].take(self.tenant, self.weight, amount)
        self.held[what] += amount

    def give(self, what: str, amount: int) -> None:
        self.admission.shares[what].give(self.tenant, amount)
        self.held[what] -= amount

    async def work(self, size: int, do: Callable[[], T]) -> T:
        """Call `do`, work on `size` characters or bytes, in a thread. They count among the texts meanwhile."""
        self.take("texts", size)
        try:
            return await self.admission.pool(size).run(self.tenant, self.weight, size, do)
        finally:
            self.give("texts", size)

    def leave(self) -> None:
        for what, amount in self.held.items():
            if amount:
                self.admission.shares[what].give(self.tenant, amount)
        self.held.clear()
