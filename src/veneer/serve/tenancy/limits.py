"""Limits: usage in the last minute and day, and the number of running requests.

A window has 60 slots, and a slot counts until all of it is older than the window. So any period of the
window's length admits at most the limit, even across a minute boundary; a token bucket can admit twice the
limit. In exchange, a slot's amount is released up to one slot late (one second, or 24 minutes for a day).

At admission, a request counts as one request, and as the tokens of its prompt plus its max_tokens. When the
request ends, its bill corrects the tokens in the same slot. A refused request does not count.

Several servers count together in two ways:

    with Redis       `redis_limits` checks and counts each request for all servers, exactly
    without Redis    each server counts its own requests, and adds those of the others as last read from the
                     ledger; so together they can exceed a limit by what the others admit between two reads

While Redis does not answer, or has not yet counted for the whole length of a window, the second way applies
to that window too. This module takes the time from the caller's clock.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from veneer.serve.request import Refused, invalid
from veneer.serve.tenancy.redis_limits import LEASE, RedisLimits, RedisRefusal
from veneer.serve.tenancy.store import ALL, EACH, Limit

MINUTE, DAY = 60.0, 86400.0
_SLOTS = 60
_SECONDS = {"requests_per_minute": MINUTE, "requests_per_day": DAY, "tokens_per_minute": MINUTE, "tokens_per_day": DAY}
_Scope = tuple[str, str]
"""(tenant, adapter), each of which can be ALL."""


class Window:
    """The amounts counted in the last `seconds`, divided into slots."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.width = seconds, seconds / _SLOTS
        self.slots: deque[list[int]] = deque()  # [slot, amount], oldest first
        self.sum = 0

    def used(self, now: float) -> int:
        """Return the sum of all amounts in the window."""
        while self.slots and self._ends(self.slots[0][0]) <= now:
            self.sum -= self.slots.popleft()[1]
        return self.sum

    def add(self, at: float, amount: int) -> int:
        """Add an amount at time `at`; return the slot. A negative amount is a refund."""
        slot = math.floor(at / self.width)
        self.put(slot, amount)
        return slot

    def put(self, slot: int, amount: int) -> None:
        """Add an amount to a slot. A negative amount for an expired slot is ignored."""
        for i in range(len(self.slots) - 1, -1, -1):
            if self.slots[i][0] == slot:
                self.slots[i][1] += amount
                self.sum += amount
                return
            if self.slots[i][0] < slot:
                break
        else:
            i = -1
        if amount > 0:
            self.slots.insert(i + 1, [slot, amount])
            self.sum += amount

    def free_in(self, now: float, amount: int) -> float:
        """Return the seconds until `amount` of the current usage has expired."""
        for slot, taken in self.slots:
            amount -= taken
            if amount <= 0:
                return max(0.0, self._ends(slot) - now)
        return self.seconds

    def _ends(self, slot: int) -> float:
        return (slot + 1) * self.width + self.seconds


@dataclass
class ScopeUsage:
    """The usage of one scope.

    `other_servers`, `running_elsewhere`: usage of other servers, as last read from the ledger.
    """

    windows: dict[str, Window] = field(default_factory=lambda: {name: Window(s) for name, s in _SECONDS.items()})
    other_servers: dict[str, Window] = field(default_factory=dict)
    running: int = 0
    running_elsewhere: int = 0


class LimitHold:
    """The reservation of one request, in all scopes that have a limit."""

    def __init__(self, owner: Limits, taken: list[tuple[ScopeUsage, dict[str, int]]], tokens: int) -> None:
        self._owner, self._taken, self._tokens, self._ended = owner, taken, tokens, False
        self.in_redis: Future[Any] | None = None

    def used(self, tokens: int) -> None:
        """Replace the reserved number of tokens with the number of tokens used."""
        with self._owner._lock:
            change, self._tokens = tokens - self._tokens, tokens
            self._change(change, 0)

    def end(self) -> None:
        with self._owner._lock:
            if self._ended:
                return
            self._ended = True
            for counter, _ in self._taken:
                counter.running -= 1
        if self.in_redis is not None and self._owner.redis is not None:
            self._owner.redis.end(self.in_redis)

    def cancel(self) -> None:
        """End a request that did not run, so that it counts nowhere."""
        self.end()
        with self._owner._lock:
            self._change(-self._tokens, -1)

    def _change(self, tokens: int, requests: int) -> None:
        for counter, slots in self._taken:
            for name, slot in slots.items():
                counter.windows[name].put(slot, tokens if name.startswith("tokens") else requests)
        if self.in_redis is not None and self._owner.redis is not None:
            self._owner.redis.change(self.in_redis, tokens, requests)


def _scopes(tenant: str, adapters: Iterable[str]) -> list[_Scope]:
    """Return a request's scopes: the server and the tenant, each overall and per adapter."""
    of_tenant = [ALL] if tenant == ALL else [ALL, tenant]
    return [(t, a) for a in dict.fromkeys((ALL, *adapters)) for t in of_tenant]


class Limits:
    """The counters of one server. Thread-safe; no method blocks."""

    def __init__(self, clock: Callable[[], float], redis: RedisLimits | None = None) -> None:
        self.clock, self.redis, self._lock = clock, redis, threading.Lock()
        self.counters: dict[_Scope, ScopeUsage] = {}

    async def reserve(
        self, limits: Mapping[_Scope, Limit], tenant: str, adapters: Sequence[str], prompt: int, completion: int
    ) -> LimitHold:
        """Reserve one request on all servers. Raises as `take`, which counts on this server."""
        redis, request = self.redis, (limits, tenant, adapters, prompt, completion)
        if redis is None or redis.away:
            return self.take(*request)
        covered = redis.covered()
        hold = self.take(*request, covered=covered)
        scopes = [(scope, limit) for scope in _scopes(tenant, adapters) if (limit := _limit(limits, scope))]
        if not scopes:
            return hold
        asked = [_redis_scope(scope, limit, prompt + completion) for scope, limit in scopes]
        hold.in_redis = redis.take(asked)
        try:
            answer = await asyncio.shield(asyncio.wrap_future(hold.in_redis))
            if isinstance(answer, RedisRefusal):
                scope, limit = scopes[answer.scope]
                if answer.window is None:
                    raise _busy(scope, answer.used, limit)
                name = _windows(limit)[answer.window]
                raise _used_up(scope, name, limit, answer.retry_after)
        except BaseException:
            hold.cancel()
            raise
        if answer is None and covered:  # Redis has just stopped answering, so the check here left out windows
            hold.cancel()
            return self.take(*request)
        return hold

    def take(
        self,
        limits: Mapping[_Scope, Limit],
        tenant: str,
        adapters: Iterable[str],
        prompt: int,
        completion: int,
        *,
        covered: float = 0.0,
    ) -> LimitHold:
        """Reserve one request in all scopes that have a limit, or in none.

        `covered`: length of the windows that are checked elsewhere. Raises Refused (rate_limited), with the
        time after which to retry.
        """
        tokens = prompt + completion
        with self._lock:
            now = self.clock()
            checked = []
            for scope in _scopes(tenant, adapters) if limits else ():
                if limit := _limit(limits, scope):  # scopes without a limit are not counted
                    checked.append(self._counter(scope))
                    _check(scope, limit, checked[-1], tokens, now, covered)
            taken = []
            for counter in checked:
                counter.running += 1
                amounts = {name: tokens if name.startswith("tokens") else 1 for name in _SECONDS}
                taken.append((counter, {name: counter.windows[name].add(now, n) for name, n in amounts.items()}))
        return LimitHold(self, taken, tokens)

    def set_other_servers(
        self, limits: Mapping[_Scope, Limit], window: float, rows: Iterable[tuple[str, str, float, int, int]]
    ) -> None:
        """Replace the usage of other servers in all windows of this length.

        rows: (tenant, adapter or ALL for whole requests, seconds ago, requests, tokens)
        """
        by_scope: dict[_Scope, dict[str, Window]] = {}
        now = self.clock()
        for tenant, adapter, ago, requests, tokens in sorted(rows, key=lambda row: -row[2]):
            for scope in [(ALL, adapter)] if tenant == ALL else [(ALL, adapter), (tenant, adapter)]:
                windows = by_scope.setdefault(scope, {n: Window(s) for n, s in _SECONDS.items() if s == window})
                for name, window_of_scope in windows.items():
                    window_of_scope.add(now - ago, tokens if name.startswith("tokens") else requests)
        with self._lock:
            for scope in {*self.counters, *(s for s in by_scope if _limit(limits, s))}:
                counter = self._counter(scope)
                for name, length in _SECONDS.items():
                    if length == window:
                        counter.other_servers[name] = by_scope.get(scope, {}).get(name) or Window(window)

    def set_running_elsewhere(self, limits: Mapping[_Scope, Limit], rows: Iterable[tuple[str, str, int]]) -> None:
        """Replace the numbers of requests that run on other servers. rows: (tenant, adapter or ALL, requests)"""
        running: Counter[_Scope] = Counter()
        for tenant, adapter, count in rows:
            for scope in {(ALL, adapter), (tenant, adapter)}:
                running[scope] += count
        with self._lock:
            for scope in {*self.counters, *(s for s in running if _limit(limits, s))}:
                self._counter(scope).running_elsewhere = running[scope]

    def _counter(self, scope: _Scope) -> ScopeUsage:
        return self.counters.setdefault(scope, ScopeUsage())


def _limit(limits: Mapping[_Scope, Limit], scope: _Scope) -> Limit | None:
    limit = limits.get(scope)
    return limit if limit is not None or scope[0] == ALL else limits.get((EACH, scope[1]))


def _windows(limit: Limit) -> list[str]:
    """Return the names of the windows that the limit limits."""
    return [name for name in _SECONDS if getattr(limit, name) is not None]


def _redis_scope(scope: _Scope, limit: Limit, tokens: int) -> dict[str, Any]:
    windows = []
    for name in _windows(limit):
        unit, maximum = name.partition("_")[0], getattr(limit, name)
        amount = tokens if unit == "tokens" else 1
        windows.append({"seconds": int(_SECONDS[name]), "unit": unit, "maximum": maximum, "amount": amount})
    concurrency = {} if limit.concurrency is None else {"concurrency": limit.concurrency}
    return {"name": "|".join(scope), "windows": windows} | concurrency


def _owner(scope: _Scope) -> str:
    owner = f"tenant {scope[0]}" if scope[0] else "the server"
    return owner + (f" with adapter {scope[1]}" if scope[1] else "")


def _busy(scope: _Scope, running: int, limit: Limit) -> Refused:
    message = f"{_owner(scope)} has {running} requests running; {limit.concurrency} are allowed"
    return Refused(message, status=429, code="rate_limited", retry_after=1.0)


def _used_up(scope: _Scope, name: str, limit: Limit, wait: float) -> Refused:
    message = f"{_owner(scope)} has used up its {getattr(limit, name):,} {name.replace('_per_', ' a ')}"
    return Refused(message, status=429, code="rate_limited", retry_after=max(0.001, wait))


def _check(scope: _Scope, limit: Limit, counter: ScopeUsage, tokens: int, now: float, covered: float) -> None:
    running = counter.running + counter.running_elsewhere
    if covered < LEASE and limit.concurrency is not None and running >= limit.concurrency:
        raise _busy(scope, running, limit)
    for name in _windows(limit):
        maximum, amount = getattr(limit, name), tokens if name.startswith("tokens") else 1
        if amount > maximum:
            words = f"{amount:,} tokens; the limit of {_owner(scope)} is {maximum:,} {name.replace('_per_', ' a ')}"
            fix = "a shorter prompt or a smaller max_tokens"
            raise invalid(f"the prompt and max_tokens are {words}", "max_tokens", fix)
        if _SECONDS[name] <= covered:
            continue
        here, remote = counter.windows[name], counter.other_servers.get(name)
        over = here.used(now) + (remote.used(now) if remote else 0) + amount - maximum
        if over > 0:
            raise _used_up(scope, name, limit, _wait(here, remote, now, over))


def _wait(local: Window, remote: Window | None, now: float, over: int) -> float:
    """Return the seconds until the sum of both windows has fallen by `over`."""
    both = Window(local.seconds)
    for window in (local, remote):
        for slot, amount in window.slots if window else ():
            both.put(slot, amount)
    return both.free_in(now, over)
