"""The adapter cache: leases, limits, eviction and invariants, also when used by several threads."""

from __future__ import annotations

import pytest

from tests.serve.shop import LETTERS, UNIT, Asked, Shop, Thing
from veneer.errors import AdapterError
from veneer.serve.names.adapter_cache import AdapterCache, Lease
from veneer.serve.request import Refused


def test_the_first_request_waits_and_the_next_does_not() -> None:
    shop = Shop(LETTERS)
    residents = shop.residents(4)
    first = Asked(residents, "a", "b")
    assert first.told == []
    shop.run()
    assert first.names() == ["a", "b"]
    second = Asked(residents, "b")
    assert second.at_once
    assert second.names() == ["b"]
    stats = residents.stats()
    assert (stats.bytes, stats.adapters, sorted(shop.reads)) == (2 * UNIT, 2, ["a", "b"])


def test_a_lease_has_the_mixes_strengths() -> None:
    shop = Shop(LETTERS)
    got: list[Lease[Thing] | Refused] = []
    residents = shop.residents(4)
    residents.acquire((("a", 0.5), ("b", -2.0)), got.append)
    residents.acquire((("a", 1.5), ("b", 3.0)), got.append)
    shop.run()
    assert [[s for _, s in lease.parts] for lease in got if isinstance(lease, Lease)] == [[0.5, -2.0], [1.5, 3.0]]


def test_memory_is_granted_in_order_of_requests() -> None:
    shop = Shop({**LETTERS, "large": 2})
    residents = shop.residents(2)
    running = [Asked(residents, "a"), Asked(residents, "b")]
    shop.run()
    large, small = Asked(residents, "large"), Asked(residents, "c")
    shop.run()
    running[0].end()
    shop.run()
    assert (large.told, small.told) == ([], [])  # the small adapter fits, but does not overtake the large one
    running[1].end()
    shop.run()
    assert large.lease
    assert small.told == []
    large.end()
    shop.run()
    assert small.lease


def test_twice_as_many_as_fit_take_turns() -> None:
    """All adapters are served about equally and with few loads, although each one always has a request."""
    shop = Shop({str(i): 1 for i in range(8)})
    residents = shop.residents(4)
    served = dict.fromkeys(shop.sizes, 0)
    asked = {name: (Asked(residents, name), 0) for name in served}
    for tick in range(2000):
        shop.now += 0.05
        shop.run(1)
        for name, (request, ends) in list(asked.items()):
            if request.lease and not ends:
                asked[name] = (request, tick + 3)
            elif request.lease and tick >= ends:
                served[name] += 1
                follower = Asked(residents, name)  # acquired before the earlier lease ends: the adapter is never idle
                request.end()
                asked[name] = (follower, 0)
    assert min(served.values()) > 0.6 * max(served.values()) > 50, served
    assert len(shop.reads) < sum(served.values()) / 4


def test_an_adapter_that_never_fits_is_refused_at_once() -> None:
    shop = Shop({**LETTERS, "giant": 9})
    residents = shop.residents(4)
    giant, small = Asked(residents, "giant"), Asked(residents, "a")
    shop.run()
    assert (giant.error.status, giant.error.code) == (400, "adapter_unusable")
    assert small.lease
    assert set(residents.resident()) == {"a"}


def test_an_adapter_that_grows_when_prepared() -> None:
    shop = Shop(LETTERS, factor=2)
    residents = shop.residents(4)
    running = [Asked(residents, "a")]
    shop.run()
    assert residents.stats().bytes == 2 * UNIT
    waiting = [Asked(residents, "b"), Asked(residents, "c")]  # one unit each by file size, but two once loaded
    shop.run()
    assert residents.stats().bytes == 4 * UNIT
    assert sum(bool(w.lease) for w in waiting) == 1
    running[0].end()
    shop.run()
    assert all(w.lease for w in waiting)


@pytest.mark.parametrize("error", [AdapterError("half a file"), OSError("gone"), RuntimeError("?")])
def test_a_failed_load_fails_its_requests(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop(LETTERS, broken={"b": error})
    residents = shop.residents(4)
    asked = [Asked(residents, "a"), Asked(residents, "b"), Asked(residents, "a", "b"), Asked(residents, "c")]
    shop.run()
    assert [bool(a.lease) for a in asked] == [True, False, False, True]
    for failed in asked[1:3]:
        assert (failed.error.status, failed.error.code) == (500, "internal")
        assert str(error) not in str(failed.error), "a caller never sees a driver's text"
        assert f"{type(error).__name__}: {error}" in caplog.text
    del shop.broken["b"]
    again = Asked(residents, "b")
    shop.run()
    assert again.lease, "and can be tried again"


def test_an_error_of_the_reader_is_passed_on() -> None:
    refused = Refused("wrong_base: no", status=422, code="adapter_unusable")
    shop = Shop(LETTERS, broken={"b": refused})
    asked = Asked(shop.residents(4), "b")
    shop.run()
    assert asked.error is refused


def test_a_failed_preparation_takes_no_memory() -> None:
    shop = Shop({**LETTERS, "odd": 3}, unpreparable={3})
    residents = shop.residents(4)
    odd = Asked(residents, "odd", "a")
    shop.run()
    assert odd.error.status == 500
    assert residents.stats().bytes == UNIT  # adapter a stays cached for other requests
    for name in "bcd":
        Asked(residents, name)
    shop.run()
    assert residents.stats().bytes == 4 * UNIT


def test_an_evicted_adapter_is_loaded_again() -> None:
    shop = Shop(LETTERS)
    residents = AdapterCache(shop.read, shop.prepare, limit_bytes=4 * UNIT)
    residents.load("a")
    lease = residents.acquire((("a", 1.0),), lambda result: None)
    residents.drop("a")
    residents.load("a")
    lease.release()
    assert {each.digest: each.bytes for each in residents.resident().values()} == {"a": UNIT}
    assert shop.reads == ["a"]
    residents.close()


def test_load_uses_a_read_adapter_and_waits() -> None:
    shop = Shop(LETTERS)
    residents = AdapterCache(shop.read, shop.prepare, limit_bytes=4 * UNIT)
    residents.load("a", shop.read("a"))
    assert shop.reads == ["a"]
    assert {each.digest: each.bytes for each in residents.resident().values()} == {"a": UNIT}
    shop.broken["b"] = AdapterError("no")
    with pytest.raises(Refused):
        residents.load("b")
    lease = residents.acquire((("a", 1.0),), lambda result: None)
    shop.sizes["full"] = 4
    residents.load("full", timeout=0.05)  # the cache is full, so the adapter loads on its first request
    lease.release()
    residents.close()
    with pytest.raises(Refused):
        residents.load("c")


def test_closing_fails_waiting_requests() -> None:
    shop = Shop(LETTERS)
    residents = shop.residents(4)
    one = Asked(residents, "a")
    residents.close()
    assert one.error.code == "shutting_down"
    shop.run()
