"""Fixtures: an empty database for tenants on each kind of database server, and a clock that tests advance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.library.conftest import postgres, quick  # noqa: F401
from veneer.serve.settings import LedgerSettings
from veneer.serve.tenancy import manage
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


@pytest.fixture
def tenants(where: str, quick: Path, clock: Clock) -> Iterator[Tenants]:  # noqa: F811
    kept = LedgerSettings(folder=quick / "journals", room=1 << 20)
    opened = Tenants(where, ledger=kept, clock=clock, wall=lambda: 1_800_000_000.0 + clock(), watch=False)
    yield opened
    opened.close()
