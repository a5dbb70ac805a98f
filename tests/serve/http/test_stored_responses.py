"""Stored responses: room is made by deleting the oldest, within the tenant's quota."""

from __future__ import annotations

import asyncio

import pytest

from veneer.serve.http import stored_responses
from veneer.serve.http.stored_responses import StoredResponses
from veneer.serve.quota import Quotas
from veneer.serve.settings import QuotaLimits


def fill(stored: StoredResponses, owner: str, *ids: str, size: int = 10_000) -> None:
    async def put() -> None:
        for id in ids:
            assert stored.put(owner, id, bytes(size))

    asyncio.run(put())


def found(stored: StoredResponses, owner: str, ids: str) -> str:
    return "".join(id for id in ids if stored.get(owner, id) is not None)


def test_the_oldest_response_of_the_same_tenant_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_responses, "LARGEST", 35_000)
    quotas = Quotas()
    stored = StoredResponses(quotas, lambda: 0.0)
    fill(stored, "acme", *"abc")
    fill(stored, "other", "x")
    fill(stored, "acme", "d")
    assert found(stored, "acme", "abcd") == "bcd"
    assert found(stored, "other", "x") == "x"
    assert quotas.used("acme", "memory") <= 35_000
    assert not asyncio.run(put_one(stored, "acme", 35_001))
    assert found(stored, "acme", "bcd") == "bcd"
    for id in "bcd":
        assert stored.delete("acme", id)
    assert not stored.delete("acme", "b")
    assert quotas.used("acme", "memory") == 0


async def put_one(stored: StoredResponses, owner: str, size: int) -> bool:
    return stored.put(owner, "one", bytes(size))


def test_the_largest_tenant_makes_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_responses, "TOTAL", 45_000)
    stored = StoredResponses(Quotas(), lambda: 0.0)
    fill(stored, "acme", *"abc")
    fill(stored, "other", *"xy")
    assert found(stored, "acme", "abc") == "bc"
    assert found(stored, "other", "xy") == "xy"


def test_responses_leave_room_for_other_uses_of_the_quota() -> None:
    quotas = Quotas(QuotaLimits(memory=40_000))
    stored = StoredResponses(quotas, lambda: 0.0)
    fill(stored, "acme", *"ab")
    with quotas.take("acme", memory=15_000):
        fill(stored, "acme", "c")
        assert found(stored, "acme", "abc") == "bc"
    with quotas.take("acme", memory=15_000), quotas.take("acme", memory=40_000 - 15_000 - 2 * 11_024):
        assert not asyncio.run(put_one(stored, "acme", 30_000))


def test_responses_are_deleted_when_they_expire_even_if_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_responses, "LIFETIME", 0.05)
    quotas = Quotas()

    async def wait() -> None:
        stored = StoredResponses(quotas)
        assert stored.put("acme", "a", b"{}")
        for _ in range(3000):
            if not quotas.used("acme", "memory"):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the response is still there")

    asyncio.run(wait())
