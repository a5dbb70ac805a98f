"""Admission control: limits a server's work in progress, in total and per tenant.

    place = admission.enter(tenant, weight)         a request arrives
    place.reserve("bodies", bytes)                  before its body is read
    place.reserve("answers", prompts · n)           before any work on the request
    await place.work(size, tokenize)                in a thread pool; the least served tenant runs next
    place.leave()                                   the request has ended: release everything

A tenant can hold as much of each quantity as is still free, times the tenant's weight (dynamic thresholds:
Choudhury and Hahne, IEEE/ACM Transactions on Networking 6, 1998). With weights of 1, one flooding tenant gets
half, two get a third each, and n get 1/(n + 1) each. The rest stays free for a new tenant, so no tenant can
fill the queue. Without tenants, all requests share the whole quantity. Runs on one event loop; only `work`
waits.
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
"""Size (characters or bytes) from which work counts as long.

Long work has its own thread, so that short work never waits for it."""
LEAST, MOST = 0.5, 4.0
"""Bounds on a tenant's weight at admission, so that even a low weight admits a whole request."""


class SharedQuantity:
    """A resource of `total` units, of which each tenant can hold a part.

    `label`: the resource's name in error messages."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.in_use = label, total, 0
        self.by: dict[str, int] = {}

    def take(self, tenant: str, weight: float, amount: int) -> None:
        """Reserve `amount` units for a tenant. Raises Refused (overloaded, 429)."""
        used, free = self.by.get(tenant, 0), self.total - self.in_use - amount
        alpha = min(max(weight, LEAST), MOST)
        if free < 0 or (tenant and used + amount > alpha * free):
            message = f"too many {self.label} at once" + (" from this tenant" if free >= 0 else "")
            raise Refused(message, status=429, code="overloaded", retry_after=1.0)
        self.in_use += amount
        self.by[tenant] = used + amount

    def give(self, tenant: str, amount: int) -> None:
        self.in_use -= amount
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
    """A thread pool that tenants share fairly, by weight.

    A free thread runs the next work of the least served tenant. Being idle earns a tenant no credit. `share`:
    maximum threads that one tenant can use at once, so that long work does not block other tenants; by
    default all threads.
    """

    def __init__(self, threads: int, name: str, share: int | None = None) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self.threads, self.share = threads, share or threads
        self._order = threading.Lock()
        self._busy: Counter[str] = Counter()
        self._waiting: dict[str, deque[_Work]] = {}
        self._served: dict[str, float] = {}

    async def run(self, tenant: str, weight: float, size: int, do: Callable[[], T]) -> T:
        """Call `do` in a thread; return its result or raise its error. `size`: cost of the call."""
        result: T = await asyncio.wrap_future(self.add(tenant, weight, size, do))
        return result

    def add(self, tenant: str, weight: float, size: int, do: Callable[[], Any]) -> Future[Any]:
        """Queue a call of `do`; return the future of its result."""
        work = _Work(weight, max(1, size), do)
        with self._order:
            self._served.setdefault(tenant, min(self._served.values(), default=0.0))
            self._waiting.setdefault(tenant, deque()).append(work)
        self._start()
        return work.result

    def most(self, tenant: str) -> int:
        """Return the maximum number of threads that a tenant can use at once."""
        return self.share

    def _start(self) -> None:
        """Submit waiting work until no thread is free."""
        while (work := self._next_work()) is not None:
            try:
                super().submit(self._do, *work)
            except RuntimeError as error:  # the pool has been shut down
                work[1].result.set_exception(error)
                self._end(work[0])

    def _next_work(self) -> tuple[str, _Work] | None:
        with self._order:
            while self._busy.total() < self.threads:
                ready = [tenant for tenant in self._waiting if self._busy[tenant] < self.most(tenant)]
                if not ready:
                    break
                tenant = min(ready, key=self._served.__getitem__)
                work = self._waiting[tenant].popleft()
                if not self._waiting[tenant]:
                    del self._waiting[tenant]
                if work.result.set_running_or_notify_cancel():  # False if the caller has cancelled the work
                    self._served[tenant] += work.size / work.weight
                    self._busy[tenant] += 1
                    return tenant, work
            if not self._busy.total():
                self._served.clear()
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
    """Admission limits of one server.

    `bodies`: bytes of request bodies in memory. `answers`: completions that run or wait. `texts`: characters
    that wait to be tokenized.
    """

    def __init__(self, *, bodies: int, answers: int, texts: int) -> None:
        self.shares: Mapping[str, SharedQuantity] = {
            "bodies": SharedQuantity("bytes of requests", bodies),
            "answers": SharedQuantity("requests", answers),
            "texts": SharedQuantity("characters to be tokenized", texts),
        }
        # One thread each: a thread tokenizes megabytes per second, and a second thread would double the time
        # for which the engine waits for the GIL, which each step acquires dozens of times.
        self.short, self.long = FairPool(1, "short"), FairPool(1, "long")

    def enter(self, tenant: str = "", weight: float = 1.0) -> AdmittedRequest:
        return AdmittedRequest(self, tenant, weight)


@dataclass(eq=False)
class AdmittedRequest:
    """One request's reservations, until `leave` releases them."""

    admission: Admission
    tenant: str = ""
    weight: float = 1.0
    reserved: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def reserve(self, resource: str, amount: int) -> None:
        """Reserve `amount` units. Raises Refused (overloaded, 429) if too few units are free."""
        self.admission.shares[resource].take(self.tenant, self.weight, amount)
        self.reserved[resource] += amount

    def release(self, resource: str, amount: int) -> None:
        self.admission.shares[resource].give(self.tenant, amount)
        self.reserved[resource] -= amount

    async def work(self, size: int, do: Callable[[], T]) -> T:
        """Call `do` in a thread; return its result.

        `size`: characters or bytes that `do` works on; counts against `texts` until the call has ended.
        """
        self.reserve("texts", size)
        pool = self.admission.short if size < _LONG else self.admission.long
        try:
            return await pool.run(self.tenant, self.weight, size, do)
        finally:
            self.release("texts", size)

    def leave(self) -> None:
        for resource, amount in self.reserved.items():
            if amount:
                self.admission.shares[resource].give(self.tenant, amount)
        self.reserved.clear()
