"""Adapters in memory: which are there, who uses them, who goes when another must come.

    lease = residents.acquire(request.mix, ready)      at once where all of it is there; else None, then ready(lease)
    … lease.parts: what `prepare` made of each adapter, with its strength …
    lease.release()

Three places: disk, the adapter as it was read (host memory, `keep_bytes`), and what the runner made of it (on its
device, `limit_bytes`). On a CPU the last two are the same memory, so `keep_bytes` is 0 unless said otherwise: a reload
reads a file that the system has cached.

Nothing here waits but `load`. Reading and preparing happen on a few threads; requests for the same adapters wait in one
group, and groups get memory in the order they came. A group takes room for all of its mix or for nothing, so two cannot
hold half each. What has leases is never evicted. Where a group has waited longer than `patience` for memory that others
keep in use, the adapters that have been there longest are drained: they take no new requests until it has its room. So
with twice as many adapters in demand as fit, they take turns, and a turn lasts as long as `patience` at least.

Knows adapters and sizes; not models, not names.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, Literal, Protocol, TypeVar

from veneer.core.adapter import Adapter
from veneer.serve.outage import fault
from veneer.serve.request import Mix, Refused

__all__ = ["Lease", "Prepared", "ResidentStats", "Residents"]


class Prepared(Protocol):
    """What a runner makes of an adapter. `bytes`: what it takes of the memory that is limited."""

    @property
    def bytes(self) -> int: ...


T = TypeVar("T", bound=Prepared)


@dataclass(frozen=True)
class ResidentStats:
    """`hits`: acquired at once. `from_disk`, `from_memory`: loads and the seconds they took, reading and preparing."""

    limit: int
    bytes: int
    kept_bytes: int
    adapters: int
    pinned: int
    waiting: int
    hits: int
    misses: int
    evictions: int
    failures: int
    from_disk: tuple[int, float]
    from_memory: tuple[int, float]


class Lease(Generic[T]):
    """A mix that stays in memory until `release`, which may be called more than once."""

    def __init__(self, mix: Mix, parts: tuple[tuple[T, float], ...], release: Callable[[Mix], None]) -> None:
        self.mix, self.parts = mix, parts
        self._release: Callable[[Mix], None] | None = release

    def release(self) -> None:
        release, self._release = self._release, None
        self.parts = ()
        if release is not None:
            release(self.mix)


Ready = Callable[[Lease[T] | Refused], None]


@dataclass(eq=False)
class _Slot(Generic[T]):
    """One adapter that is there, on its way, or wanted. It counts with `size` while `held`."""

    digest: str
    size: int = 0
    adapter: Adapter | None = None
    thing: T | None = None
    job: Literal["", "read", "prepare"] = ""
    refs: int = 0
    pinned: bool = False
    doomed: bool = False
    draining: bool = False
    used: int = 0
    since: float = 0.0
    seconds: float = 0.0
    source: Literal["disk", "memory"] = "disk"

    @property
    def held(self) -> bool:
        return self.thing is not None or self.job == "prepare"


@dataclass(eq=False)
class _Group(Generic[T]):
    """Requests that wait for the same adapters. `claimed`: it has its room, and a reference to each."""

    slots: list[_Slot[T]]
    members: list[tuple[Mix, Ready[T]]] = field(default_factory=list)
    claimed: bool = False
    blocked: float | None = None


class Residents(Generic[T]):
    """`read`: digest -> adapter, from disk; raises Refused or any VeneerError. `prepare`: (adapter, digest) -> what the
    runner needs of it. Both are called on the threads of this object. `freed` is told what is no more, from any thread.
    `submit`: runs jobs elsewhere; by default `threads` threads do."""

    def __init__(
        self,
        read: Callable[[str], Adapter],
        prepare: Callable[[Adapter, str], T],
        *,
        limit_bytes: int,
        keep_bytes: int = 0,
        threads: int = 2,
        patience: float = 1.0,
        freed: Callable[[T], None] | None = None,
        submit: Callable[[Callable[[], None]], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._prepare, self._freed, self._clock = read, prepare, freed, clock
        self.limit, self.keep_limit, self.patience = limit_bytes, keep_bytes, patience
        self._pool = None if submit else ThreadPoolExecutor(threads, thread_name_prefix="adapters")
        self._submit = submit or self._pool.submit  # type: ignore[union-attr]
        self._ahead = 2 * threads
        self._lock = threading.Lock()
        self._calls: list[Callable[[], None]] = []
        self._slots: dict[str, _Slot[T]] = {}
        self._groups: OrderedDict[tuple[str, ...], _Group[T]] = OrderedDict()
        self._kept: OrderedDict[str, Adapter] = OrderedDict()
        self._kept_bytes = 0
        self._sizes: dict[str, int] = {}
        self._drainer: _Group[T] | None = None
        self._ticks = itertools.count()
        self._bytes = self._hits = self._misses = self._evictions = self._failures = 0
        self._loads = {"disk": (0, 0.0), "memory": (0, 0.0)}
        self._closed = False

    # -- for the engine's step: none of these waits --------------------------------------------------------------------

    def acquire(self, mix: Mix, ready: Ready[T]) -> Lease[T] | None:
        """The lease, where everything is there; else None, and `ready` is called once with a lease or the reason why
        there is none: from another thread, or within a later call of this object, so it only leaves a note."""
        with self._changing():
            slots = [self._slots.get(digest) for digest, _ in mix]
            there = [s for s in slots if s is not None and s.thing is not None and not s.draining]
            if len(there) == len(mix):
                self._hits += 1
                return self._lease(mix, there)
            self._misses += 1
            self._join(mix, ready)
        return None

    def withdraw(self, ready: Ready[T]) -> bool:
        """Wait no more. False where `ready` was called or is about to be: then it gets a lease, to be released."""
        with self._changing():
            found = [(k, g, m) for k, g in self._groups.items() for m in g.members if m[1] == ready]
            if not found:
                return False
            key, group, member = found[0]
            group.members.remove(member)
            if not group.members:
                self._leave(key, group)
            self._advance()
        return True

    # -- for whoever loads and unloads -------------------------------------------------------------------------------

    def load(self, digest: str, adapter: Adapter | None = None, *, pinned: bool = False, timeout: float = 60.0) -> None:
        """Bring an adapter into memory and wait until it is there; `adapter` where it has been read already.

        Raises Refused where it cannot be prepared or can never fit; overloaded (503) where running requests leave no
        room within `timeout` and it is to be pinned. Otherwise it then stays where it is until it is asked for."""
        told: SimpleQueue[Lease[T] | Refused] = SimpleQueue()
        with self._changing():
            slot = self._slot(digest)
            slot.doomed = False
            if adapter is not None and not slot.held and slot.adapter is None and not slot.job:
                self._stage(slot, adapter, "memory")
            self._join(((digest, 1.0),), told.put)
        try:
            result = told.get(timeout=timeout)
        except Empty as late:
            if self.withdraw(told.put):
                if pinned:
                    raise Refused("requests use all memory for adapters", status=503, code="overloaded") from late
                return
            result = told.get()
        if isinstance(result, Refused):
            raise result
        if pinned:
            self.pin(digest)
        result.release()

    def pin(self, digest: str) -> None:
        """Keep what is in memory until `unpin` or a later `drop`. Raises KeyError for what is not there."""
        with self._changing():
            slot = self._slots[digest]
            slot.pinned, slot.doomed = True, False

    def unpin(self, digest: str) -> None:
        self._let_go(digest, drop=False)

    def drop(self, digest: str) -> None:
        """Nobody names it any more: it is freed when its last lease is gone, now where there is none."""
        self._let_go(digest, drop=True)

    def _let_go(self, digest: str, drop: bool) -> None:
        with self._changing():
            slot = self._slots.get(digest)
            if drop:
                self._sizes.pop(digest, None)
                if (kept := self._kept.pop(digest, None)) is not None:
                    self._kept_bytes -= kept.size_bytes()
            if slot is not None:
                slot.pinned, slot.doomed = False, slot.doomed or drop
                self._tidy([slot])
            self._advance()

    def close(self) -> None:
        """Refuse what waits, and end the threads."""
        with self._changing():
            self._closed = True
            error = Refused("the server is shutting down", status=503, code="shutting_down")
            for key, group in list(self._groups.items()):
                self._leave(key, group, error)
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    # -- what is there -----------------------------------------------------------------------------------------------

    def stats(self) -> ResidentStats:
        with self._changing():
            there = [s for s in self._slots.values() if s.thing is not None]
            waiting = sum(len(g.members) for g in self._groups.values())
            return ResidentStats(
                self.limit, self._bytes, self._kept_bytes, len(there), sum(s.pinned for s in there), waiting,
                self._hits, self._misses, self._evictions, self._failures, self._loads["disk"], self._loads["memory"],
            )  # fmt: skip

    def resident(self) -> dict[str, int]:
        """Digest -> bytes of what is prepared, the least recently used first."""
        with self._changing():
            there = sorted((s for s in self._slots.values() if s.thing is not None), key=lambda s: s.used)
            return {s.digest: s.size for s in there}

    # -- under the lock ----------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Under the lock; what is to be told to others is told without it."""
        with self._lock:
            yield
            calls, self._calls = self._calls, []
        for call in calls:
            call()

    def _slot(self, digest: str) -> _Slot[T]:
        return self._slots.setdefault(digest, _Slot(digest))

    def _lease(self, mix: Mix, slots: Iterable[_Slot[T]]) -> Lease[T]:
        parts = []
        for (_, strength), slot in zip(mix, slots, strict=True):
            assert slot.thing is not None
            slot.refs += 1
            slot.used = next(self._ticks)
            parts.append((slot.thing, strength))
        return Lease(mix, tuple(parts), self._release)

    def _release(self, mix: Mix) -> None:
        with self._changing():
            slots = [self._slots[digest] for digest, _ in mix]
            for slot in slots:
                slot.refs -= 1
                slot.used = next(self._ticks)
            self._tidy(slots)
            if self._groups:
                self._advance()

    def _join(self, mix: Mix, ready: Ready[T]) -> None:
        if self._closed:
            error = Refused("the server is shutting down", status=503, code="shutting_down")
            self._calls.append(partial(ready, error))
            return
        key = tuple(digest for digest, _ in mix)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group([self._slot(digest) for digest in key])
        group.members.append((mix, ready))
        self._advance()

    def _leave(self, key: tuple[str, ...], group: _Group[T], error: Refused | None = None) -> None:
        """A group that waits no more, whatever came of it; those of it that still do get the error."""
        if error is not None:
            self._calls += [partial(ready, error) for _, ready in group.members]
        del self._groups[key]
        if group.claimed:
            for slot in group.slots:
                slot.refs -= 1
        if group is self._drainer:
            self._drainer = None
            for slot in self._slots.values():
                slot.draining = False
        self._tidy(group.slots)

    def _advance(self) -> None:
        """All that can go on as things are now."""
        staged = sum(s.job == "read" or (s.adapter is not None and not s.held) for s in self._slots.values())
        first, queue = True, False  # whether no group, and whether one, before this one waits; the latter for memory
        for key, group in list(self._groups.items()):
            if not group.claimed:
                new = [s for s in group.slots if not s.held]
                for slot in new:
                    if slot.adapter is None and not slot.job and (first or staged < self._ahead):
                        staged += 1
                        self._begin(slot)
                if not new:
                    group.claimed = not any(s.draining for s in group.slots) or not queue
                elif not queue and all(s.adapter is not None for s in new):
                    if error := self._never(group):
                        self._leave(key, group, error)
                        continue
                    group.claimed = self._room(sum(s.size for s in new), group)
                    queue = not group.claimed
                    if queue:
                        self._drain(group)
                if group.claimed:
                    self._claim(group, new)
                first = first and group.claimed
            if group.claimed and all(s.thing is not None for s in group.slots):
                self._calls += [partial(ready, self._lease(mix, group.slots)) for mix, ready in group.members]
                self._leave(key, group)

    def _claim(self, group: _Group[T], new: list[_Slot[T]]) -> None:
        for slot in group.slots:
            slot.refs += 1
            slot.used = next(self._ticks)
        for slot in new:
            self._bytes += slot.size
            slot.job = "prepare"
            self._submit(partial(self._make, slot))

    def _never(self, group: _Group[T]) -> Refused | None:
        """Why a mix can have no room, however long it waits."""
        need = sum(s.size for s in group.slots)
        pinned = sum(s.size for s in self._slots.values() if s.pinned and s not in group.slots)
        if need + pinned <= self.limit:
            return None
        beside = f" beside {pinned:,} of adapters that are pinned" if pinned else ""
        what = f"too_large: {need:,} bytes{beside}; the limit for adapters in memory is {self.limit:,}"
        return Refused(what, status=400, code="adapter_unusable")

    def _room(self, need: int, group: _Group[T] | None) -> bool:
        """Evict what is not in use, the least recently used first, if that makes room; else nothing."""
        free = self.limit - self._bytes
        if free >= need:
            return True
        own = set(group.slots) if group else set()
        idle = [s for s in self._slots.values() if s.thing is not None and not s.refs and not s.pinned]
        idle = sorted((s for s in idle if s not in own), key=lambda s: s.used)
        if free + sum(s.size for s in idle) < need:
            return False
        for slot in idle:
            if self.limit - self._bytes >= need:
                break
            self._evictions += 1
            self._free(slot)
        return True

    def _drain(self, group: _Group[T]) -> None:
        now = self._clock()
        group.blocked = now if group.blocked is None else group.blocked
        if now - group.blocked < self.patience:
            return
        self._drainer = group
        need = sum(s.size for s in group.slots if not s.held) - (self.limit - self._bytes)
        others = [s for s in self._slots.values() if s.thing is not None and not s.pinned and s not in group.slots]
        for slot in sorted(others, key=lambda s: (not s.draining, s.since)):
            if need <= 0:
                break
            slot.draining = True
            need -= slot.size

    def _tidy(self, slots: Iterable[_Slot[T]]) -> None:
        """Forget slots that nobody needs."""
        for slot in slots:
            needed = slot.refs or slot.job or (slot.thing is not None and not slot.doomed)
            if not needed and not self._wanted(slot):
                self._free(slot)

    def _wanted(self, slot: _Slot[T]) -> bool:
        return any(slot in group.slots for group in self._groups.values())

    def _free(self, slot: _Slot[T]) -> None:
        if slot.thing is not None:
            self._bytes -= slot.size
            if self._freed is not None:
                self._calls.append(partial(self._freed, slot.thing))
        slot.thing = slot.adapter = None
        slot.draining = False
        if not self._wanted(slot):
            self._slots.pop(slot.digest, None)

    # -- jobs: on the threads ------------------------------------------------------------------------------------------

    def _begin(self, slot: _Slot[T]) -> None:
        kept = self._kept.get(slot.digest)
        if kept is not None:
            self._kept.move_to_end(slot.digest)
            self._stage(slot, kept, "memory")
        else:
            slot.job = "read"
            self._submit(partial(self._fetch, slot))

    def _stage(self, slot: _Slot[T], adapter: Adapter, source: Literal["disk", "memory"]) -> None:
        slot.adapter, slot.source = adapter, source
        slot.size = self._sizes.get(slot.digest) or adapter.size_bytes()
        if not slot.doomed:
            self._keep(slot.digest, adapter)

    def _fetch(self, slot: _Slot[T]) -> None:
        began = self._clock()
        try:
            adapter = self._read(slot.digest)
        except Exception as error:
            self._fail(slot, error)
            return
        with self._changing():
            slot.job, slot.seconds = "", self._clock() - began
            self._stage(slot, adapter, "disk")
            self._tidy([slot])
            self._advance()

    def _make(self, slot: _Slot[T]) -> None:
        began, adapter = self._clock(), slot.adapter
        assert adapter is not None
        try:
            thing = self._prepare(adapter, slot.digest)
        except Exception as error:
            self._fail(slot, error)
            return
        with self._changing():
            slot.job = ""
            self._bytes -= slot.size
            slot.size = self._sizes[slot.digest] = thing.bytes
            if self._room(slot.size, None):
                self._bytes += slot.size
                slot.thing, slot.adapter, slot.since = thing, None, self._clock()
                n, seconds = self._loads[slot.source]
                self._loads[slot.source] = (n + 1, seconds + slot.seconds + slot.since - began)
                slot.seconds = 0.0
            else:  # larger than its tensors, and all the rest is in use: its groups go on waiting, better informed
                for group in self._groups.values():
                    if group.claimed and slot in group.slots:
                        group.claimed = False
                        for own in group.slots:
                            own.refs -= 1
            del thing
            self._tidy([slot])
            self._advance()

    def _keep(self, digest: str, adapter: Adapter) -> None:
        if digest in self._kept or adapter.size_bytes() > self.keep_limit:
            return
        self._kept[digest] = adapter
        self._kept_bytes += adapter.size_bytes()
        while self._kept_bytes > self.keep_limit:
            self._kept_bytes -= self._kept.popitem(last=False)[1].size_bytes()

    def _fail(self, slot: _Slot[T], error: Exception) -> None:
        """A load that failed fails those who wanted it, and nobody else."""
        refused = error if isinstance(error, Refused) else fault(f"adapter {slot.digest}", error)
        with self._changing():
            self._failures += 1
            if slot.job == "prepare":
                self._bytes -= slot.size
            slot.job, slot.adapter = "", None
            for key, group in list(self._groups.items()):
                if slot in group.slots:
                    self._leave(key, group, refused)
            self._tidy([slot])
            self._advance()
