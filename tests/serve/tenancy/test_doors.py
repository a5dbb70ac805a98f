"""Several servers with one Redis or one database: limits, concurrency, and outages of Redis."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.tenancy.conftest import Clock, RedisServer, open_tenants
from veneer.serve.access import ResolvedModel
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, Usage
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.limits import DAY, MINUTE
from veneer.serve.tenancy.tenants import Tenants

ACME = Principal("tenant", "acme")
_numbers = itertools.count()


Open = Callable[..., Tenants]


@pytest.fixture
def door(where: str, quick: Path) -> Iterator[Open]:
    """Return a function that opens another server with the same database."""
    opened: list[Tenants] = []

    def make(redis: str | None = None) -> Tenants:
        opened.append(open_tenants(where, quick / f"journals-{len(opened)}", Clock(), redis))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


async def ask(door: Tenants, request: str, tokens: int = 10, *, used: int | None = None, hold: Any = None) -> None:
    model = ResolvedModel((), "support", "v1")
    async with door.admitted(ACME, model, request=request, prompt_tokens=tokens - 1, max_tokens=1) as bill:
        if hold is not None:
            await hold.wait()
        bill.used(Usage(tokens if used is None else used, 0, 0))


def limited(*doors: Tenants, **values: int) -> None:
    if "acme" not in doors[0].store.refresh().tenants:
        manage.add_tenant(doors[0].store, "acme", actor="me")
    manage.change_settings(doors[0].store, "acme", values, actor="me")
    for each in doors:
        each.store.refresh()


async def burst(doors: Any, number: int, **how: Any) -> list[int]:
    """Send requests to the doors in turn, all at once. Return the statuses."""

    async def one(n: int) -> int:
        try:
            await ask(doors[n % len(doors)], f"r{next(_numbers)}", **how)
            return 200
        except Refused as error:
            return error.status

    return await asyncio.gather(*(one(n) for n in range(number)))


@pytest.mark.fleet
def test_with_redis_limits_are_exact_for_all_servers_together(door: Open, redis_server: RedisServer) -> None:
    doors = [door(redis_server.url) for _ in range(3)]
    limited(*doors, requests_per_minute=20, tokens_per_minute=1000)
    assert sorted(asyncio.run(burst(doors, 90))) == [200] * 20 + [429] * 70
    limited(*doors, requests_per_minute=1000)  # 800 tokens are left
    assert asyncio.run(burst(doors, 90, tokens=100)).count(200) == 8


@pytest.mark.fleet
def test_with_redis_unused_tokens_return_and_refusals_count_nowhere(door: Open, redis_server: RedisServer) -> None:
    doors = [door(redis_server.url) for _ in range(2)]
    limited(*doors, tokens_per_minute=100, requests_per_day=3)

    async def work() -> None:
        await ask(doors[0], "a", 90, used=30)
        with pytest.raises(Refused, match="tokens a minute") as refused:
            await ask(doors[1], "b", 71)
        assert 50 < (refused.value.retry_after or 0) < 62
        await ask(doors[1], "c", 70, used=0)
        with pytest.raises(RuntimeError):
            async with doors[1].admitted(
                ACME, ResolvedModel((), "s", "v1"), request="d", prompt_tokens=60, max_tokens=9
            ):
                raise RuntimeError
        with pytest.raises(Refused, match="3 requests a day"):
            await ask(doors[0], "e", 1)
        with pytest.raises(Refused) as refused:
            await ask(doors[0], "f", 101)
        assert refused.value.status == 400

    asyncio.run(work())


class SlowProxy(socketserver.BaseRequestHandler):
    """Forwards to Redis at `port`; each answer takes 0.3 seconds."""

    port = 0

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as redis:
            while data := self.request.recv(1 << 16):
                redis.sendall(data)
                time.sleep(0.3)
                self.request.sendall(redis.recv(1 << 16))


@pytest.mark.fleet
def test_requests_do_not_queue_for_a_slow_redis(door: Open, redis_server: RedisServer) -> None:
    """Redis answers each command in time, but all of them together would take 12 seconds."""
    handler = type("Handler", (SlowProxy,), {"port": redis_server.port})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever).start()
        one = door(f"redis://:secret@127.0.0.1:{proxy.server_address[1]}/0")
        limited(one, requests_per_minute=100)
        began = time.monotonic()
        assert asyncio.run(burst([one], 40)) == [200] * 40
        assert time.monotonic() - began < 8
        proxy.shutdown()


@pytest.mark.fleet
def test_with_redis_a_dead_servers_requests_are_released(door: Open, redis_server: RedisServer) -> None:
    import redis

    doors = [door(redis_server.url) for _ in range(2)]
    limited(*doors, concurrency=2)

    async def work() -> None:
        hold = asyncio.Event()
        running = [asyncio.create_task(ask(each, f"r{n}", hold=hold)) for n, each in enumerate(doors)]
        while any(each.limits.redis.covered() == 0 for each in doors):
            await asyncio.sleep(0.01)
        with pytest.raises(Refused, match="2 requests running; 2 are allowed"):
            await ask(doors[0], "x")
        with redis.Redis.from_url(redis_server.url) as client:  # the second server's lease ends
            client.delete(f"{{veneer}}:server:{doors[1].limits.redis.server}")
        await ask(doors[0], "y")
        doors[1].limits.redis.beat().result()  # the second server was only slow
        with pytest.raises(Refused, match="2 requests running"):
            await ask(doors[0], "z")
        hold.set()
        await asyncio.gather(*running)
        await asyncio.gather(*(ask(doors[n], f"last-{n}") for n in range(2)))

    asyncio.run(work())


@pytest.mark.fleet
def test_an_outage_of_redis_refuses_no_good_request_and_lifts_no_limit(
    door: Open, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """During the outage, limits use the ledger; afterwards, Redis counts anew, and no usage is forgotten."""
    doors = [door(redis_server.url) for _ in range(2)]
    limited(*doors, requests_per_minute=10, concurrency=4)

    def exchange() -> None:
        for each in doors:
            assert each.ledger.flush()
        for each in doors:
            each.count_other_servers(MINUTE)
            each.count_other_servers(DAY)

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(burst(doors, 4)) == [200] * 4
        exchange()
        redis_server.stop()
        for n in range(4):
            asyncio.run(ask(doors[n % 2], f"away-{n}"))
            exchange()
        for each in doors:
            each.limits.redis.beat().result()
        assert sum("Redis does not answer" in record.message for record in caplog.records) == len(doors)
    redis_server.start()  # without its data
    for each in doors:
        each.limits.redis.beat().result()
    assert asyncio.run(burst(doors, 2)) == [200] * 2
    exchange()
    assert asyncio.run(burst(doors, 4)) == [429] * 4
    limited(*doors, requests_per_minute=1000)
    assert asyncio.run(burst(doors, 4)) == [200] * 4  # nothing runs, so concurrency is free
    assert "secret" not in caplog.text


@pytest.mark.parametrize("servers", [2, 3])
def test_without_redis_a_burst_exceeds_a_limit_by_what_others_admit_between_reads(door: Open, servers: int) -> None:
    """The bound of `docs/how-to/several-doors.md`: servers × limit in one burst, and nothing after the next read."""
    doors = [door() for _ in range(servers)]
    limited(*doors, requests_per_minute=5, tokens_per_day=1000)
    admitted = asyncio.run(burst(doors, 40)).count(200)
    assert 5 <= admitted <= 5 * servers
    for each in doors:
        assert each.ledger.flush()
    for each in doors:
        each.count_other_servers(MINUTE)
    assert asyncio.run(burst(doors, 40)) == [429] * 40


def test_without_redis_concurrency_counts_requests_of_live_servers(door: Open, where: str) -> None:
    from sqlalchemy import update

    from veneer.library.database import write_transaction
    from veneer.serve.tenancy.store import server_table

    doors = [door() for _ in range(2)]
    limited(*doors, concurrency=2)

    async def work() -> None:
        hold = asyncio.Event()
        running = [asyncio.create_task(ask(doors[0], f"r{n}", hold=hold)) for n in range(2)]
        await asyncio.sleep(0)
        while len(doors[0].limits.counters) == 0 or not all(c.running == 2 for c in doors[0].limits.counters.values()):
            await asyncio.sleep(0.01)
        assert await asyncio.to_thread(doors[0].ledger.flush)
        doors[1].count_other_servers(MINUTE)
        with pytest.raises(Refused, match="2 requests running; 2 are allowed"):
            await ask(doors[1], "x")
        with write_transaction(doors[0].store.engine) as c:  # the first server has not been seen for a while
            mine = server_table.c.server == doors[0].ledger.server
            c.execute(update(server_table).where(mine).values(seen=server_table.c.seen - 16))
        doors[1].count_other_servers(MINUTE)
        await ask(doors[1], "y")
        hold.set()
        await asyncio.gather(*running)

    asyncio.run(work())
