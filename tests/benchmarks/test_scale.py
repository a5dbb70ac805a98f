"""The simulation of many GPUs agrees with theory, answers every request, and shows what each router costs."""

from __future__ import annotations

import random
from types import ModuleType

import pytest

from tests.benchmarks.runs import benchmark_module


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark_module(monkeypatch, "scale")


@pytest.mark.parametrize(("seats", "load"), [(1, 0.5), (4, 0.8), (32, 0.9)])
def test_waits_equal_those_of_a_queue_with_several_servers(scale: ModuleType, seats: int, load: float) -> None:
    """Erlang C gives the mean wait of an M/M/c queue."""
    fleet = scale.Fleet(
        gpus=1, adapters=1, cold=0.0, seats=seats, service=1.0, load=load, zones=1, fair=False, router="random",
        seconds=60_000 / (seats * load),
    )  # fmt: skip
    waits = [scale.simulate(scale.replace(fleet, seed=seed)).waits for seed in range(3)]
    mean = sum(wait for found in waits for _, _, wait in found) / sum(map(len, waits))
    assert mean == pytest.approx(scale.erlang_wait(seats, load, 1.0), rel=0.15)


@pytest.mark.parametrize(("count", "exponent", "size"), [(1000, 1.0, 100), (10_000, 0.8, 500), (10_000, 1.2, 50)])
def test_cold_requests_equal_those_of_a_cache_under_zipfs_law(
    scale: ModuleType, count: int, exponent: float, size: int
) -> None:
    """Che's approximation gives the hit rate of a cache that keeps the items used last."""
    fleet = scale.Fleet(
        gpus=1, adapters=count, resident=size, zipf=exponent, zones=1, cold=0.0, load=0.1, service=1.0, router="random",
        seconds=30_000 / (0.1 * 32),
    )  # fmt: skip
    found = scale.simulate(fleet)
    expected = 1 - scale.che_hit_rate(count, exponent, size)
    assert found.cold / len(found.waits) == pytest.approx(expected, abs=0.02)


def test_popularity_follows_zipfs_law(scale: ModuleType) -> None:
    draws = scale.zipf(100, 1.0, random.Random(0))
    names = [next(draws) for _ in range(50_000)]
    assert names.count(0) / names.count(9) == pytest.approx(10, rel=0.15)


@pytest.mark.parametrize("router", ["random", "least", "affinity"])
def test_every_request_is_answered_though_a_zone_fails(scale: ModuleType, router: str) -> None:
    fleet = scale.Fleet(gpus=6, seconds=60, fails=30, away=10, router=router, load=0.5)
    found = scale.simulate(fleet)
    assert found.retried > 0
    assert found.requests == len(found.waits) > 1000


def test_affinity_loads_fewer_adapters(scale: ModuleType) -> None:
    cold = {
        router: scale.simulate(scale.Fleet(gpus=10, seconds=60, adapters=2000, router=router)).cold
        for router in scale.ROUTERS
    }
    assert cold["affinity"] < 0.6 * min(cold["random"], cold["least"])


def test_a_flood_of_one_tenant_does_not_delay_the_others(scale: ModuleType) -> None:
    waits = []
    for fair in (False, True):
        fleet = scale.Fleet(gpus=2, heavy=0.6, load=1.1, fair=fair, router="least", seconds=120, adapters=50)
        waits.append(scale.simulate(fleet).wait(0.95, lambda at, tenant: tenant > 0))
    assert waits[1] < waits[0] / 3
