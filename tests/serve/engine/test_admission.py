"""Admission: tenants share limits fairly, and worker threads serve the least-served tenant first."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.serve.engine.admission import Admission, FairPool, SharedQuantity
from veneer.serve.request import Refused


def flood(share: SharedQuantity, tenant: str, weight: float = 1.0, amount: int = 1) -> int:
    """Return the amount that a tenant acquires before the first refusal."""
    got, said = 0, None
    while said is None:
        try:
            share.take(tenant, weight, amount)
            got += amount
        except Refused as error:
            said = error
    assert (said.status, said.code) == (429, "overloaded")
    assert said.retry_after
    return got


@pytest.mark.parametrize("n", [1, 2, 5])
def test_flooding_tenants_leave_others_an_equal_share(n: int) -> None:
    share = SharedQuantity("things", 1200)
    for _ in range(200):  # tenants release and acquire amounts until all hold about the same amount
        for i in range(n):
            flood(share, f"t{i}")
        for i in range(n):
            share.give(f"t{i}", share.by[f"t{i}"] // 20)
    for i in range(n):
        flood(share, f"t{i}")
    free = share.total - share.in_use
    assert 0.8 * 1200 / (n + 1) < free
    assert all(abs(held - free) < 0.25 * free for held in share.by.values())
    assert flood(share, "new") >= free // 2 - 1


def test_a_flooding_tenant_gets_half_or_more_with_weight() -> None:
    assert flood(SharedQuantity("things", 1000), "a") == 500
    assert 600 < flood(SharedQuantity("things", 1000), "a", weight=2.0) < 700
    assert flood(SharedQuantity("things", 1000), "") == 1000  # "": the tenant on servers without tenants
    light = SharedQuantity("answers", 1024)
    light.take("a", 0.01, 256)  # one full-size request is admitted even at a tiny weight


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.booleans()), max_size=80))
def test_released_amounts_are_available_again(steps: list[tuple[str, int, bool]]) -> None:
    admission = Admission(bodies=100, answers=10, texts=10)
    places = {name: admission.enter(name) for name in "abc"}
    for name, amount, leaves in steps:
        with suppress(Refused):
            places[name].reserve("bodies", amount)
        if leaves:
            places[name].leave()
        share = admission.shares["bodies"]
        assert share.in_use == sum(p.reserved["bodies"] for p in places.values()) <= 100
    for place in places.values():
        place.leave()
    assert share_is_empty(admission)


def share_is_empty(admission: Admission) -> bool:
    return all(share.in_use == 0 and not share.by for share in admission.shares.values())


def test_the_tenant_that_received_least_gets_the_thread() -> None:
    order: list[str] = []

    async def everything() -> None:
        pool, gate = FairPool(1, "test"), threading.Event()
        first = asyncio.create_task(pool.run("a", 1.0, 1, gate.wait))
        await asyncio.sleep(0.01)
        work = [asyncio.create_task(pool.run("a", 1.0, 10, lambda: order.append("a"))) for _ in range(20)]
        await asyncio.sleep(0)
        work += [asyncio.create_task(pool.run("b", 1.0, 10, lambda: order.append("b"))) for _ in range(3)]
        work += [asyncio.create_task(pool.run("c", 3.0, 10, lambda: order.append("c"))) for _ in range(9)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *work)

    asyncio.run(everything())
    assert len(order) == 32
    assert "b" in order[:3]  # tenant b does not wait for the twenty earlier requests
    seen = Counter(order[:12])
    assert seen["c"] >= 2 * seen["b"] >= 2  # by weight


def test_a_share_of_threads_stays_free_for_others() -> None:
    async def everything() -> None:
        pool, gate = FairPool(3, "test", share=2), threading.Event()
        slow = [asyncio.create_task(pool.run("a", 1.0, 1, gate.wait)) for _ in range(9)]
        await asyncio.sleep(0.01)
        assert await asyncio.wait_for(pool.run("b", 1.0, 1, lambda: 7), 5) == 7
        gate.set()
        assert await asyncio.gather(*slow) == [True] * 9

    asyncio.run(everything())


def test_short_tasks_never_wait_for_long_tasks() -> None:
    async def everything() -> float:
        admission, gate = Admission(bodies=1, answers=1, texts=1 << 24), threading.Event()
        place = admission.enter("a")
        long = [asyncio.create_task(place.work(1 << 20, gate.wait)) for _ in range(4)]
        await asyncio.sleep(0.01)
        began = time.monotonic()
        assert await admission.enter("b").work(100, lambda: 7) == 7
        took = time.monotonic() - began
        ran: list[int] = []
        left = asyncio.create_task(place.work(1 << 20, lambda: ran.append(1)))
        await asyncio.sleep(0.01)
        left.cancel()
        await asyncio.sleep(0)  # the event loop delivers a cancellation on its next turn
        gate.set()
        await asyncio.gather(*long)
        await asyncio.sleep(0.01)
        assert not ran
        with pytest.raises(ZeroDivisionError):
            await place.work(1, lambda: 1 // 0)
        assert share_is_empty(admission)
        return took

    assert asyncio.run(everything()) < 1.0
