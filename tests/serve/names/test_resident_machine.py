"""Adapters in memory, under any sequence of requests, completions, loads and drops."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.serve.shop import LETTERS, UNIT, Asked, Shop
from veneer.core.adapter import Adapter
from veneer.errors import AdapterError
from veneer.serve.names.adapter_cache import AdapterCache


class Freed(list[str]):
    """A list of the adapters released so far; runs a check at each release."""

    def __init__(self, check: Callable[[str], None]) -> None:
        self.check = check

    def append(self, digest: str) -> None:
        self.check(digest)
        super().append(digest)


class Machine(RuleBasedStateMachine):
    """The adapter cache and its invariants, under any sequence of requests, completions, loads and drops."""

    SIZES: ClassVar = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 3, "f": 4}
    LIMIT = 6

    def __init__(self) -> None:
        super().__init__()
        self.shop = Shop(dict(self.SIZES))
        self.shop.freed = Freed(self.gone)
        self.residents = self.shop.residents(self.LIMIT)
        self.waiting: list[Asked] = []
        self.running: list[Asked] = []

    def gone(self, digest: str) -> None:
        """Assert that a released adapter is not in use."""
        used = [r.lease for r in (*self.waiting, *self.running) if r.lease is not None]
        assert digest not in {thing.name for lease in used for thing, _ in lease.parts}

    @rule(digests=st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=3, unique=True))
    def ask(self, digests: list[str]) -> None:
        order = list(self.residents.resident())
        asked = Asked(self.residents, *digests)
        self.waiting.append(asked)
        if asked.at_once:
            assert set(digests) <= set(order)

    @rule(n=st.integers(1, 5))
    def work(self, n: int) -> None:
        self.shop.run(n)

    @rule(seconds=st.sampled_from([0.01, 0.5, 2.0]))
    def time(self, seconds: float) -> None:
        self.shop.now += seconds

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.running)).end()
        self.running = [r for r in self.running if r.lease and r.lease.parts]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.waiting))
        if not one.told:
            assert self.residents.withdraw(one.ready)
            self.waiting.remove(one)

    @rule(digest=st.sampled_from(sorted(SIZES)))
    def drop(self, digest: str) -> None:
        self.residents.drop(digest)

    @rule(digest=st.sampled_from(sorted(SIZES)), fails=st.booleans())
    def damage(self, digest: str, fails: bool) -> None:
        self.shop.broken.pop(digest, None)
        if fails:
            self.shop.broken[digest] = AdapterError("damaged")

    @invariant()
    def sound(self) -> None:
        for asked in [w for w in self.waiting if w.told]:
            self.waiting.remove(asked)
            if asked.lease:
                assert asked.names() == [d for d, _ in asked.mix]
                self.running.append(asked)
        there = self.residents.resident()
        stats = self.residents.stats()
        assert stats.bytes == sum(each.bytes for each in there.values()) <= self.LIMIT * UNIT
        assert stats.waiting == len(self.waiting)
        used = {d for r in self.running for d, _ in r.mix}
        assert used <= set(there)
        for digest, each in there.items():
            assert each.leases == sum(digest in dict(r.mix) for r in self.running)

    def teardown(self) -> None:
        """Assert that every waiting request is served once the running requests have ended."""
        for _ in range(500):
            self.shop.run()
            self.sound()
            for one in self.running:
                one.end()
            self.running.clear()
            if not self.waiting:
                break
        assert not self.waiting
        self.sound()
        for digest in self.SIZES:
            self.residents.drop(digest)
        assert self.residents.stats().bytes == 0
        assert not self.residents.resident()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_adapters_are_evicted_in_order_of_use() -> None:
    rng = random.Random(3)
    shop = Shop({str(i): 1 for i in range(9)})
    residents = shop.residents(5)
    recent: list[str] = []
    for _ in range(300):
        name = str(rng.randrange(9))
        one = Asked(residents, name)
        shop.run()
        one.end()
        recent = [n for n in recent if n != name] + [name]
        assert list(residents.resident()) == recent[-5:]


def test_memory_is_released() -> None:
    """Neither the loaded adapter nor its prepared weights outlive the last lease."""
    shop, made = Shop(LETTERS), list[weakref.ref[object]]()

    def read(digest: str) -> Adapter:
        adapter = shop.read(digest)
        made.extend([weakref.ref(adapter), weakref.ref(adapter.pairs[digest].A)])
        return adapter

    residents = AdapterCache(read, shop.prepare, limit_bytes=4 * UNIT)
    residents.load("a")
    gc.collect()
    assert [ref() for ref in made] == [None, None], "on a CPU only what was prepared stays"
    lease = residents.acquire((("a", 1.0),), lambda result: None)
    thing = weakref.ref(lease.parts[0][0])
    residents.drop("a")
    assert thing() is not None
    lease.release()
    gc.collect()
    assert thing() is None
    residents.close()
