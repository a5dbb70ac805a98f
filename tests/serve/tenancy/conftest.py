"""Fixtures: an empty database for tenants on each kind of database server, and a clock that tests advance."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.library.conftest import postgres, quick  # noqa: F401
from tests.serve.http.toy import free_port, wait_for
from veneer.serve.settings import LedgerSettings
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.limits import DAY, MINUTE
from veneer.serve.tenancy.store import Store
from veneer.serve.tenancy.tenants import Tenants


@dataclass
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


def set_price(store: Store, prompt: int, cached: int, completion: int, tenant: str = "", adapter: str = "") -> None:
    """Set the prices per million tokens."""
    values = {"prompt_price": prompt, "cached_price": cached, "completion_price": completion}
    manage.change_settings(store, tenant, values, adapter=adapter, actor="test")


def new_tenant(store: Store, name: str, adapters: Sequence[str] = (), **more: Any) -> str:
    """Add a tenant. Return a new key for the tenant."""
    manage.add_tenant(store, name, adapters=adapters, actor="test", **more)
    return manage.make_tenant_key(store, name, actor="test")[1]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, quick: Path) -> str:  # noqa: F811
    """Return the URL of an empty database."""
    return str(quick / "tenants.sqlite") if request.param == "sqlite" else request.getfixturevalue("postgres")()


@pytest.fixture
def store(where: str) -> Iterator[Store]:
    opened = Store(where)
    yield opened
    opened.close()


def open_tenants(where: str, folder: Path, clock: Clock, redis: str | None = None) -> Tenants:
    kept, wall = LedgerSettings(folder=folder, room=1 << 20), lambda: 1_800_000_000.0 + clock()
    return Tenants(where, ledger=kept, clock=clock, wall=wall, watch=False, redis=redis)


class Doors:
    """Two servers with one database; each request goes to a random one.

    Before a request is admitted, the servers read each other's usage, as they do once a second.
    """

    def __init__(self, doors: Sequence[Tenants]) -> None:
        self.doors, self.pick, self.ledger = doors, random.Random(0), Ledgers([each.ledger for each in doors])
        self.door = doors[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.door, name)

    async def authenticate(self, *key: Any) -> Any:
        self.door = self.pick.choice(self.doors)
        return await self.door.authenticate(*key)

    @asynccontextmanager
    async def admitted(self, *request: Any, **more: Any) -> AsyncIterator[Any]:
        assert self.ledger.flush()
        for door in self.doors:
            door.store.refresh()
            door.count_other_servers(MINUTE)
            door.count_other_servers(DAY)
        async with self.pick.choice(self.doors).admitted(*request, **more) as bill:
            yield bill

    def close(self) -> None:
        for door in self.doors:
            door.close()


class Ledgers:
    def __init__(self, ledgers: Sequence[Any]) -> None:
        self.ledgers = ledgers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ledgers[0], name)

    def flush(self) -> bool:
        return min([each.flush() for each in self.ledgers])  # flushes all


@pytest.fixture
def one_door(where: str, quick: Path, clock: Clock) -> Iterator[Tenants]:  # noqa: F811
    opened = open_tenants(where, quick / "journals", clock)
    yield opened
    opened.close()


@pytest.fixture(params=["one door", "two doors"])
def tenants(request: pytest.FixtureRequest, where: str, quick: Path, clock: Clock) -> Iterator[Any]:  # noqa: F811
    """Yield a server, or two servers behind a random choice."""
    folders = ["journals"] if request.param == "one door" else ["one", "two"]
    doors = [open_tenants(where, quick / folder, clock) for folder in folders]
    opened: Any = doors[0] if len(doors) == 1 else Doors(doors)
    yield opened
    opened.close()


class RedisServer:
    """Debian's redis-server on a free port, which tests stop and start."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        assert program, "apt-get install redis-server"
        self.port = free_port()
        self.command = [program, "--port", str(self.port), "--save", "", "--dir", str(folder)]
        self.command += ["--bind", "127.0.0.1", "--requirepass", "secret"]
        self.url = f"redis://:secret@127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        import redis

        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)

        def answers() -> bool:
            with redis.Redis.from_url(self.url) as client:
                try:
                    return bool(client.ping())
                except redis.RedisError:
                    return False

        wait_for(answers)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()
