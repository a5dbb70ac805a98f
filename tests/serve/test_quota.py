"""Quotas per owner: amounts are taken and released, and errors name the limit."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest

from veneer.serve.quota import FairThreads, Quotas, current_owner
from veneer.serve.request import Refused
from veneer.serve.settings import QuotaLimits

SMALL = QuotaLimits(memory=100, disk=1000, files=3, descriptors=1, requests=2)


def test_an_amount_over_a_limit_names_the_limit() -> None:
    quotas = Quotas(SMALL)
    with quotas.take("a", memory=60):
        for amounts, status, code in (
            ({"memory": 101}, 413, "too_large"),
            ({"memory": 41}, 429, "overloaded"),
            ({"disk": 1001}, 413, "too_large"),
            ({"requests": 3}, 413, "too_large"),
        ):
            with pytest.raises(Refused, match=rf"limit \({next(iter(amounts))}\)") as error:
                quotas.take("a", **amounts)
            assert (error.value.status, error.value.code) == (status, code)
        quotas.take("a", memory=40).release()
        quotas.take("b", memory=100).release()
    quotas.take("a", memory=100)
    quotas.take("a", files=3)
    with pytest.raises(Refused) as error:
        quotas.take("a", files=1)
    assert (error.value.status, error.value.code, error.value.retry_after) == (400, "storage_full", None)


def test_a_refused_hold_takes_nothing() -> None:
    quotas = Quotas(SMALL)
    hold = quotas.take("a", memory=10)
    with pytest.raises(Refused):
        hold.add(requests=1, memory=95)
    assert (quotas.used("a", "memory"), quotas.used("a", "requests")) == (10, 0)
    hold.set(memory=300)
    assert not quotas.fits("a", memory=1)
    hold.release()
    hold.release()
    assert quotas.used("a", "memory") == 0


def test_concurrent_threads_never_exceed_a_limit() -> None:
    quotas = Quotas(QuotaLimits(requests=50))

    def take(_: int) -> bool:
        try:
            quotas.take("a", requests=1)
        except Refused:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(200))) == 50


def test_a_refused_change_leaves_a_hold_unchanged() -> None:
    quotas = Quotas(SMALL)
    hold, other = quotas.take("a", memory=60), quotas.take("a", memory=30)
    hold.change(memory=70)
    with pytest.raises(Refused) as error:
        hold.change(memory=71)
    assert (error.value.status, quotas.used("a", "memory")) == (429, 100)
    other.release()
    hold.change(memory=100)
    with pytest.raises(Refused) as error:
        hold.change(memory=101)
    assert error.value.status == 413


def test_a_tenant_leaves_threads_for_others() -> None:
    def everything() -> None:
        gate, ran = threading.Event(), threading.Event()
        with FairThreads(3, share=2) as pool:
            current_owner.set("a")
            slow = [pool.submit(gate.wait) for _ in range(9)]
            unwanted = pool.submit(ran.set)
            failing = pool.submit(lambda: 1 // 0)
            assert unwanted.cancel()
            for owner in ("b", ""):
                current_owner.set(owner)
                assert pool.submit(lambda: 7).result(5) == 7
            gate.set()
            assert [each.result(5) for each in slow] == [True] * 9
            with pytest.raises(ZeroDivisionError):
                failing.result(5)
        assert not ran.is_set()
        current_owner.set("a")
        with pytest.raises(RuntimeError):
            pool.submit(gate.wait).result(5)

    copy_context().run(everything)
