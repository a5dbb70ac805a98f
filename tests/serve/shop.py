"""Helpers for tests of the adapter cache: adapters by digest, whose loads run only when a test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from veneer.core.adapter import Adapter, Pair
from veneer.serve.names.adapter_cache import AdapterCache, Lease
from veneer.serve.request import DigestMix, Refused, make_mix

UNIT = 64


@dataclass(eq=False)
class Thing:
    """A prepared adapter. `bytes`: the size of the adapter's tensors times the shop's `factor`."""

    name: str
    bytes: int


@dataclass
class Shop:
    """Adapters by digest. `sizes`: in units of 64 bytes. `jobs`: loads that have not run yet."""

    sizes: dict[str, int]
    factor: int = 1
    reads: list[str] = field(default_factory=list)
    freed: list[str] = field(default_factory=list)
    jobs: list[Callable[[], None]] = field(default_factory=list)
    broken: dict[str, Exception] = field(default_factory=dict)
    unpreparable: set[int] = field(default_factory=set)
    now: float = 0.0

    def read(self, digest: str) -> Adapter:
        self.reads.append(digest)
        if digest in self.broken:
            raise self.broken[digest]
        pair = Pair(torch.zeros(1, self.sizes[digest] * UNIT // 8), torch.zeros(self.sizes[digest] * UNIT // 8, 1), 1.0)
        adapter = Adapter({digest: pair})
        assert adapter.size_bytes() == self.sizes[digest] * UNIT
        return adapter

    def prepare(self, adapter: Adapter, digest: str) -> Thing:
        (name,) = adapter.pairs
        assert name == digest
        if self.sizes[name] in self.unpreparable:
            raise RuntimeError("no room on the device")
        return Thing(name, adapter.size_bytes() * self.factor)

    def residents(self, limit: int, patience: float = 1.0) -> AdapterCache[Thing]:
        how = {"patience": patience, "submit": self.jobs.append, "clock": lambda: self.now}
        how["freed"] = lambda thing: self.freed.append(thing.name)
        return AdapterCache(self.read, self.prepare, limit_bytes=limit * UNIT, **how)

    def run(self, n: int = 10**6) -> None:
        while self.jobs and n:
            self.jobs.pop(0)()
            n -= 1


class Asked:
    """A request: acquires a lease and records the results."""

    def __init__(self, residents: AdapterCache[Thing], *digests: str) -> None:
        self.mix: DigestMix = make_mix((d, 1.0) for d in digests)
        self.told: list[Lease[Thing] | Refused] = []
        self.at_once = residents.acquire(self.mix, self.ready)
        if self.at_once is not None:
            self.told.append(self.at_once)

    def ready(self, result: Lease[Thing] | Refused) -> None:
        self.told.append(result)

    @property
    def lease(self) -> Lease[Thing] | None:
        assert len(self.told) <= 1
        return self.told[0] if self.told and isinstance(self.told[0], Lease) else None

    @property
    def error(self) -> Refused | None:
        return self.told[0] if self.told and isinstance(self.told[0], Refused) else None

    def names(self) -> list[str]:
        return [thing.name for thing, _ in self.lease.parts]

    def end(self) -> None:
        self.lease.release()


LETTERS = dict.fromkeys("abcdefgh", 1)
