"""Limits: usage in the last minute and day, and the number of running requests.

A window has 60 slots, and a slot counts until all of it is older than the window. So any period of the
window's length admits at most the limit, even across a minute boundary; a token bucket can admit twice the
limit. In exchange, a slot's amount is released up to one slot late (one second, or 24 minutes for a day).

At admission, a request counts as one request, and as the tokens of its prompt plus its max_tokens. When the
request ends, its bill corrects the tokens in the same slot. A refused request does not count.

The `limits` package is not used: its windows handle one amount at a time, cannot take from several scopes
atomically, cannot correct an amount later or count other servers and earlier runs, and read the system clock.

This module uses no database, and takes the time from the caller's clock.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from veneer.serve.request import Refused, invalid
from veneer.serve.tenancy.store import ALL, EACH, Limit

MINUTE, DAY = 60.0, 86400.0
_SLOTS = 60
_WINDOWS = (
    ("requests_per_minute", MINUTE, "requests a minute"),
    ("requests_per_day", DAY, "requests a day"),
    ("tokens_per_minute", MINUTE, "tokens a minute"),
    ("tokens_per_day", DAY, "tokens a day"),
)
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
    """The usage of one scope. `other_servers`: usage of other servers, as last read from the ledger."""

    windows: dict[str, Window] = field(default_factory=lambda: {name: Window(s) for name, s, _ in _WINDOWS})
    other_servers: dict[str, Window] = field(default_factory=dict)
    running: int = 0


class LimitHold:
    """The reservation of one request, in all scopes that have a limit."""

    def __init__(self, owner: Limits, taken: list[tuple[ScopeUsage, dict[str, int]]], tokens: int) -> None:
        self._owner, self._taken, self._tokens, self._ended = owner, taken, tokens, False

    def used(self, tokens: int) -> None:
        """Replace the reserved number of tokens with the number of tokens used."""
        with self._owner._lock:
            change, self._tokens = tokens - self._tokens, tokens
            for counter, slots in self._taken:
                for name in ("tokens_per_minute", "tokens_per_day"):
                    counter.windows[name].put(slots[name], change)

    def end(self) -> None:
        with self._owner._lock:
            if not self._ended:
                self._ended = True
                for counter, _ in self._taken:
                    counter.running -= 1


def _scopes(tenant: str, adapters: Iterable[str]) -> list[_Scope]:
    """Return a request's scopes: the server and the tenant, each overall and per adapter."""
    of_tenant = [ALL] if tenant == ALL else [ALL, tenant]
    return [(t, a) for a in dict.fromkeys((ALL, *adapters)) for t in of_tenant]


class Limits:
    """The counters of one server. Thread-safe; no method blocks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self._lock = clock, threading.Lock()
        self.counters: dict[_Scope, ScopeUsage] = {}

    def take(
        self, limits: Mapping[_Scope, Limit], tenant: str, adapters: Iterable[str], prompt: int, completion: int
    ) -> LimitHold:
        """Reserve one request in all scopes that have a limit, or in none.

        Raises Refused (rate_limited), with the time after which to retry.
        """
        tokens = prompt + completion
        with self._lock:
            now = self.clock()
            checked = []
            for scope in _scopes(tenant, adapters) if limits else ():
                if limit := _limit(limits, scope):  # scopes without a limit are not counted
                    checked.append(self._counter(scope))
                    _check(scope, limit, checked[-1], tokens, now)
            taken = []
            for counter in checked:
                counter.running += 1
                amounts = {name: tokens if name.startswith("tokens") else 1 for name, _, _ in _WINDOWS}
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
                windows = by_scope.setdefault(scope, {n: Window(s) for n, s, _ in _WINDOWS if s == window})
                for name, window_of_scope in windows.items():
                    window_of_scope.add(now - ago, tokens if name.startswith("tokens") else requests)
        with self._lock:
            for scope in {*self.counters, *(s for s in by_scope if _limit(limits, s))}:
                counter = self._counter(scope)
                for name, length, _ in _WINDOWS:
                    if length == window:
                        counter.other_servers[name] = by_scope.get(scope, {}).get(name) or Window(window)

    def _counter(self, scope: _Scope) -> ScopeUsage:
        return self.counters.setdefault(scope, ScopeUsage())


def _limit(limits: Mapping[_Scope, Limit], scope: _Scope) -> Limit | None:
    limit = limits.get(scope)
    return limit if limit is not None or scope[0] == ALL else limits.get((EACH, scope[1]))


def _check(scope: _Scope, limit: Limit, counter: ScopeUsage, tokens: int, now: float) -> None:
    owner = f"tenant {scope[0]}" if scope[0] else "the server"
    owner += f" with adapter {scope[1]}" if scope[1] else ""
    if limit.concurrency is not None and counter.running >= limit.concurrency:
        message = f"{owner} has {counter.running} requests running; {limit.concurrency} are allowed"
        raise Refused(message, status=429, code="rate_limited", retry_after=1.0)
    for name, _, words in _WINDOWS:
        maximum, amount = getattr(limit, name), tokens if name.startswith("tokens") else 1
        if maximum is None:
            continue
        if amount > maximum:
            message = f"the prompt and max_tokens are {amount:,} tokens; the limit of {owner} is {maximum:,} {words}"
            raise invalid(message, "max_tokens", "a shorter prompt or a smaller max_tokens")
        here, remote = counter.windows[name], counter.other_servers.get(name)
        over = here.used(now) + (remote.used(now) if remote else 0) + amount - maximum
        if over > 0:
            message, wait = f"{owner} has used up its {maximum:,} {words}", _wait(here, remote, now, over)
            raise Refused(message, status=429, code="rate_limited", retry_after=wait)


def _wait(local: Window, remote: Window | None, now: float, over: int) -> float:
    """Return the seconds until the sum of both windows has fallen by `over`."""
    both = Window(local.seconds)
    for window in (local, remote):
        for slot, amount in window.slots if window else ():
            both.put(slot, amount)
    return max(0.001, both.free_in(now, over))
