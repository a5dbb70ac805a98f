"""Adapters in memory: loading, leases, and eviction.

    lease = residents.acquire(request.mix, ready)   if all are in memory; otherwise None, then ready(lease)
    … lease.parts: the prepared adapters with their strengths …
    lease.release()

Each adapter has one entry, whose states are wanted → loading → loaded → resident. A few threads load adapters
(read and prepare them). Requests that wait for the same adapters form a group. Groups get memory in order of
arrival. A group gets memory for all its adapters or for none, so that two mixes cannot block each other, each
with half of its adapters in memory. Leased adapters are never evicted. When a group has waited for memory
longer than `patience`, the adapters that became resident first are drained: they get no new requests until
the group fits. So if requests need twice as many adapters as fit, adapters take turns of at least `patience`.

Only `load` blocks. Adapters that are loaded but not yet resident use memory beyond the limit. At most as many
of these exist as there are threads, unless the next group needs more. This module is independent of models
and of the names of adapters.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, Literal, Protocol, TypeVar

from veneer.core.adapter import Adapter
from veneer.serve.request import DigestMix, Refused, shutting_down
from veneer.serve.transient import internal_error


class Sized(Protocol):
    """A prepared adapter. `bytes`: memory that counts against the limit."""

    @property
    def bytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


@dataclass(frozen=True)
class ResidentStats:
    """Counters.

    `waiting`: requests that wait for adapters. `slots`: number of adapters that fit in the memory for adapters,
    at the mean size of those loaded; 0 while none is loaded.
    """

    bytes: int
    adapters: int
    waiting: int
    evictions: int
    slots: int = 0


@dataclass(frozen=True)
class ResidentAdapter:
    """An adapter in memory. `leases`: number of running requests that use it."""

    digest: str
    bytes: int
    leases: int


class Lease(Generic[T]):
    """A claim that keeps the adapters of a mix in memory until `release`.

    `release` can be called more than once.
    """

    def __init__(
        self, mix: DigestMix, parts: tuple[tuple[T, float], ...], release: Callable[[DigestMix], None]
    ) -> None:
        self.mix, self.parts = mix, parts
        self._release: Callable[[DigestMix], None] | None = release

    def release(self) -> None:
        release, self._release = self._release, None
        self.parts = ()
        if release is not None:
            release(self.mix)


_Ready = Callable[[Lease[T] | Refused], None]


@dataclass(eq=False)
class _Entry(Generic[T]):
    """The state of one adapter.

    `adapter`: an adapter that was passed to `load`, until it is prepared. `prepared`: the prepared adapter,
    once loaded. `dropped`: whether no name refers to the adapter any more. `used`: tick of the last use;
    larger is later. `since`: time at which the adapter became resident.
    """

    digest: str
    state: Literal["wanted", "loading", "loaded", "resident"] = "wanted"
    adapter: Adapter | None = None
    prepared: T | None = None
    leases: int = 0
    dropped: bool = False
    draining: bool = False
    used: int = 0
    since: float = 0.0

    @property
    def size(self) -> int:
        return 0 if self.prepared is None else self.prepared.bytes


@dataclass(eq=False)
class _Group(Generic[T]):
    """Requests that wait for the same adapters.

    `blocked`: time at which the group started to wait for memory; None if the group does not wait for memory.
    """

    entries: list[_Entry[T]]
    members: list[tuple[DigestMix, _Ready[T]]] = field(default_factory=list)
    blocked: float | None = None


class AdapterCache(Generic[T]):
    """A cache that loads adapters and evicts idle ones.

    `read`: digest -> adapter, from disk; raises Refused or any VeneerError. `prepare`: (adapter, digest) ->
    the object that the runner needs. Both run on the cache's threads. `freed`: called with each evicted
    object, from any thread. `submit`: runs a job in the background; by default on `threads` threads.
    """

    def __init__(
        self,
        read: Callable[[str], Adapter],
        prepare: Callable[[Adapter, str], T],
        *,
        limit_bytes: int,
        threads: int = 2,
        patience: float = 1.0,
        freed: Callable[[T], None] | None = None,
        submit: Callable[[Callable[[], None]], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._prepare, self._freed, self._clock = read, prepare, freed, clock
        self.limit, self.patience, self._ahead = limit_bytes, patience, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="adapters")
        self._submit = submit or (lambda job: self._pool.submit(copy_context().run, job))
        self._lock = threading.Lock()
        self._calls: list[Callable[[], None]] = []
        self._entries: dict[str, _Entry[T]] = {}
        self._groups: dict[tuple[str, ...], _Group[T]] = {}
        self._drainer: _Group[T] | None = None
        self._ticks = itertools.count()
        self._bytes = self._evictions = 0
        self._closed = False

    # -- for the engine's step: none of these block --------------------------------------------------------------------

    def acquire(self, mix: DigestMix, ready: _Ready[T]) -> Lease[T] | None:
        """Return a lease if all adapters are in memory; otherwise return None.

        If None was returned, `ready` is called once, later, with a lease or an error. The call comes from
        another thread, or from within a later call of one of this object's methods, so `ready` must only post
        a message.
        """
        with self._changing():
            entries = [self._entries.get(digest) for digest, _ in mix]
            resident = [e for e in entries if e is not None and e.state == "resident" and not e.draining]
            if len(resident) == len(mix):
                return self._lease(mix, resident)
            self._enter_group(mix, ready)
        return None

    def withdraw(self, ready: _Ready[T]) -> bool:
        """Stop waiting; return whether `ready` will never be called.

        If False, `ready` was or will be called, and the caller must release the lease.
        """
        with self._changing():
            waiting = [(k, g, m) for k, g in self._groups.items() for m in g.members if m[1] == ready]
            if not waiting:
                return False
            key, group, member = waiting[0]
            group.members.remove(member)
            if not group.members:
                self._leave(key)
            self._advance()
        return True

    # -- loading and unloading -----------------------------------------------------------------------------------------

    def load(self, digest: str, adapter: Adapter | None = None, *, timeout: float = 60.0) -> None:
        """Load an adapter and wait until it is in memory.

        After `timeout` seconds, stop waiting; the adapter is then loaded on demand. `adapter`: the adapter,
        if already read. Raises Refused if the adapter cannot be prepared or can never fit.
        """
        answers: SimpleQueue[Lease[T] | Refused] = SimpleQueue()
        with self._changing():
            entry = self._entry(digest)
            entry.dropped = False
            if entry.state == "wanted":
                entry.adapter = adapter
            self._enter_group(((digest, 1.0),), answers.put)
        try:
            result = answers.get(timeout=timeout)
        except Empty:
            if self.withdraw(answers.put):
                return
            result = answers.get()
        if isinstance(result, Refused):
            raise result
        result.release()

    def drop(self, digest: str) -> None:
        """Free an adapter that no name refers to, now or when its last lease is released."""
        with self._changing():
            if (entry := self._entries.get(digest)) is not None:
                entry.dropped = True
                self._tidy([entry])
            self._advance()

    def close(self) -> None:
        """Fail waiting requests, and stop the threads."""
        with self._changing():
            self._closed = True
            for key in list(self._groups):
                self._leave(key, shutting_down())
        self._pool.shutdown(wait=True, cancel_futures=True)

    # -- status --------------------------------------------------------------------------------------------------------

    def stats(self) -> ResidentStats:
        adapters = len(self.resident())
        with self._changing():
            waiting = sum(len(group.members) for group in self._groups.values())
            slots = max(adapters, self.limit * adapters // self._bytes) if self._bytes else 0
            return ResidentStats(self._bytes, adapters, waiting, self._evictions, slots)

    def resident(self) -> dict[str, ResidentAdapter]:
        """Return digest -> adapter in memory, least recently used first."""
        with self._changing():
            entries = sorted((e for e in self._entries.values() if e.state == "resident"), key=lambda e: e.used)
            return {e.digest: ResidentAdapter(e.digest, e.size, e.leases) for e in entries}

    # -- with the lock held --------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock during the block; then release the lock and run the queued callbacks."""
        with self._lock:
            yield
            calls, self._calls = self._calls, []
        for call in calls:
            call()

    def _entry(self, digest: str) -> _Entry[T]:
        return self._entries.setdefault(digest, _Entry(digest))

    def _lease(self, mix: DigestMix, entries: Iterable[_Entry[T]]) -> Lease[T]:
        parts = []
        for (_, strength), entry in zip(mix, entries, strict=True):
            assert entry.prepared is not None
            entry.leases += 1
            entry.used = next(self._ticks)
            parts.append((entry.prepared, strength))
        return Lease(mix, tuple(parts), self._release)

    def _release(self, mix: DigestMix) -> None:
        with self._changing():
            entries = [self._entries[digest] for digest, _ in mix]
            for entry in entries:
                entry.leases -= 1
                entry.used = next(self._ticks)
            self._tidy(entries)
            if self._groups:
                self._advance()

    def _enter_group(self, mix: DigestMix, ready: _Ready[T]) -> None:
        if self._closed:
            self._calls.append(partial(ready, shutting_down()))
            return
        key = tuple(digest for digest, _ in mix)
        if key not in self._groups:
            self._groups[key] = _Group([self._entry(digest) for digest in key])
        self._groups[key].members.append((mix, ready))
        self._advance()

    def _leave(self, key: tuple[str, ...], error: Refused | None = None) -> None:
        """Remove a group from the queue; fail its remaining members if `error` is given."""
        group = self._groups.pop(key)
        if error is not None:
            self._calls += [partial(ready, error) for _, ready in group.members]
        if group is self._drainer:
            self._drainer = None
            for entry in self._entries.values():
                entry.draining = False
        self._tidy(group.entries)

    def _advance(self) -> None:
        """Start loads for the next groups, and admit groups that fit."""
        loaded = sum(e.state in ("loading", "loaded") for e in self._entries.values())
        first, blocked = True, False  # first: no earlier group waits; blocked: an earlier group waits for memory
        for key, group in list(self._groups.items()):
            new = [e for e in group.entries if e.state != "resident"]
            for entry in new:
                if entry.state == "wanted" and (first or loaded < self._ahead):
                    loaded += 1
                    entry.state = "loading"
                    self._submit(partial(self._load, entry))
            if all(e.state == "loaded" for e in new):
                if (need := sum(e.size for e in group.entries)) > self.limit:
                    self._leave(key, _over_limit(need, self.limit))
                    continue
                overtakes = not new and not any(e.draining for e in group.entries)
                if overtakes or (not blocked and self._make_room(new, group)):
                    self._admit(key, group, new)
                    continue
                if not blocked:
                    self._drain(group, new)
                blocked = True
            first = False

    def _admit(self, key: tuple[str, ...], group: _Group[T], new: list[_Entry[T]]) -> None:
        for entry in new:
            self._make_resident(entry)
        self._calls += [partial(ready, self._lease(mix, group.entries)) for mix, ready in group.members]
        self._leave(key)

    def _make_resident(self, entry: _Entry[T]) -> None:
        entry.state, entry.since = "resident", self._clock()
        self._bytes += entry.size

    def _make_room(self, new: Iterable[_Entry[T]], group: _Group[T]) -> bool:
        """Evict idle adapters, least recently used first, to make room for `new`.

        If the idle adapters do not free enough memory, evict none and return False.
        """
        need = sum(e.size for e in new) + self._bytes - self.limit
        idle = [e for e in self._entries.values() if e.state == "resident" and not e.leases]
        idle = sorted((e for e in idle if e not in group.entries), key=lambda e: e.used)
        if need > sum(e.size for e in idle):
            return False
        for entry in idle:
            if need <= 0:
                break
            need -= entry.size
            self._evictions += 1
            self._free(entry)
        return True

    def _drain(self, group: _Group[T], new: Iterable[_Entry[T]]) -> None:
        now = self._clock()
        group.blocked = now if group.blocked is None else group.blocked
        if now - group.blocked < self.patience:
            return
        self._drainer = group
        need = sum(e.size for e in new) + self._bytes - self.limit
        others = [e for e in self._entries.values() if e.state == "resident" and e not in group.entries]
        for entry in sorted(others, key=lambda e: (not e.draining, e.since)):
            if need <= 0:
                break
            entry.draining = True
            need -= entry.size

    def _tidy(self, entries: Iterable[_Entry[T]]) -> None:
        """Free unused entries; a loaded adapter becomes resident instead if it fits."""
        for entry in entries:
            if entry.leases or entry.state == "loading" or self._is_wanted(entry):
                continue
            if entry.state == "loaded" and not entry.dropped and self._bytes + entry.size <= self.limit:
                self._make_resident(entry)
            if entry.state != "resident" or entry.dropped:
                self._free(entry)

    def _is_wanted(self, entry: _Entry[T]) -> bool:
        return any(entry in group.entries for group in self._groups.values())

    def _free(self, entry: _Entry[T]) -> None:
        if entry.state == "resident":
            self._bytes -= entry.size
        if entry.prepared is not None and self._freed is not None:
            self._calls.append(partial(self._freed, entry.prepared))
        entry.state, entry.prepared, entry.adapter, entry.draining = "wanted", None, None, False
        if not self._is_wanted(entry):
            self._entries.pop(entry.digest, None)

    # -- jobs, on the threads ------------------------------------------------------------------------------------------

    def _load(self, entry: _Entry[T]) -> None:
        """Load an adapter; a failure fails only the groups that need it."""
        try:
            adapter, entry.adapter = entry.adapter or self._read(entry.digest), None
            if (size := adapter.size_bytes()) > self.limit:
                raise _over_limit(size, self.limit)
            prepared = self._prepare(adapter, entry.digest)
        except Exception as error:
            refused = error if isinstance(error, Refused) else internal_error(f"adapter {entry.digest}", error)
            with self._changing():
                entry.state = "wanted"
                for key, group in list(self._groups.items()):
                    if entry in group.entries:
                        self._leave(key, refused)
                self._tidy([entry])
                self._advance()
            return
        with self._changing():
            entry.state, entry.prepared = "loaded", prepared
            del prepared, adapter
            self._tidy([entry])
            self._advance()


def _over_limit(need: int, limit: int) -> Refused:
    message = f"too_large: {need:,} bytes; the limit for adapters in memory is {limit:,}"
    return Refused(message, status=400, code="adapter_unusable")
