# ruff: noqa: F811
"""Cost and revenue of adapters equal figures calculated by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from tests.jobs.conftest import library, postgres, quick, store  # noqa: F401
from veneer.cli.economics import economics
from veneer.errors import ConfigError
from veneer.jobs.store import JobStore
from veneer.library.database import write_transaction
from veneer.serve.request import Usage
from veneer.serve.tenancy.entry import LedgerEntry, LedgerLine, OwedEntry
from veneer.serve.tenancy.ledger import post
from veneer.serve.tenancy.store import Price, Store

UNIT = 1_000_000
START = 1_793_491_200.0  # 2026-11-01 00:00 UTC
DAY = 86400.0


def owed_entry(tenant: str, adapter: str, number: int, prefill: float, decode: float, price: int) -> OwedEntry:
    """Return a ledger entry for a request with 1,000 completion tokens.

    `price`: units per 1,000 tokens."""
    lines = (LedgerLine(f"d-{adapter}", adapter, 1.0, Price(0, 0, price * 1000 * UNIT)),)
    entry = LedgerEntry(f"{tenant}{adapter}{number}", tenant, "word", START + number, 0, 1000, lines)
    return OwedEntry(entry, "done", START + number + 9, Usage(0, 0, 1000, 5.0, prefill, decode))


@pytest.fixture
def tenants(quick: Path) -> Store:
    """A ledger with four requests by acme, at 30 each, and one by globex, at 20.

    acme's requests take 3 s and 27 s, and use two versions of an adapter. globex's request takes 40 s."""
    store = Store(str(quick / "tenants.sqlite"))
    owed = [owed_entry("acme", f"acme/support@{1 + n % 2}", n, 3.0, 27.0, 30) for n in range(4)]
    owed += [owed_entry("globex", "base", 0, 40.0, 0.0, 20)]
    with write_transaction(store.engine) as c:
        post(c, "00112233aabbccdd", owed, START)
    return store


def billed(store: JobStore, tenant: str, name: str, state: str, seconds: float, cost: int, at: float = START) -> None:
    job = store.create(tenant, {"base": "tiny"}, name=name)
    values = {"job": job.id, "tenant": tenant, "name": job.name, "state": state, "seconds": seconds, "cost": cost}
    with write_transaction(store.engine) as c:
        c.execute(
            text(
                "INSERT INTO job_bills (job, tenant, name, day, state, at, seconds, tokens, price, cost) "
                "VALUES (:job, :tenant, :name, '2026-11-01', :state, :at, :seconds, 0, 0, :cost)"
            ),
            values | {"at": at},
        )


def test_economics_equal_hand_arithmetic(store: JobStore, tenants: Store) -> None:
    billed(store, "acme", "support", "succeeded", 5400.0, 4 * UNIT)
    billed(store, "acme", "support", "failed", 1800.0, 0)
    billed(store, "globex", "draft", "succeeded", 3600.0, 9 * UNIT)
    prices = {"dedicated": UNIT, "training": 32 * UNIT}
    result = economics(tenants, store, 2 * UNIT, **prices, now=START + 2 * DAY)
    # 48 h at 2 cost 96. The requests take 4 · 30 s + 40 s = 160 s; three quarters of that are acme's.
    # acme: 72 for 4 requests, so 18 each; acme pays 30 each, a margin of 12. 2 h of training at 32 cost 64,
    #     of which acme paid 4; it takes 60/12 = 5 requests to earn the other 60.
    # A dedicated hour costs 1, so 24 a day, the cost of 24/18 shared requests.
    acme = ["acme", "acme/support", 2, 7200.0, 64 * UNIT, 4 * UNIT, 4, 120.0, 72 * UNIT, 120 * UNIT, 48 * UNIT]
    acme += [18_000 * UNIT, 12_000 * UNIT, 2, 5]
    # globex's only request costs 24 and earns 20; no request used globex's draft.
    base = ["globex", "base", 0, 0.0, 0, 0, 1, 40.0, 24 * UNIT, 20 * UNIT, 48 * UNIT]
    base += [24_000 * UNIT, 48_000 * UNIT, 1, 0]
    draft = ["globex", "globex/draft", 1, 3600.0, 32 * UNIT, 9 * UNIT, 0, 0.0, 0, 0, 48 * UNIT, None, None, None, None]
    assert (result["since"], result["hours"]) == ("2026-11-01", 48.0)
    assert [list(row.values()) for row in result["rows"]] == [acme, base, draft]
    of_acme = economics(tenants, store, 2 * UNIT, **prices, tenant="acme", now=START + 2 * DAY)
    # other tenants' use of the machine still counts
    assert [list(row.values()) for row in of_acme["rows"]] == [acme]


def test_economics_use_the_given_hours_and_days(store: JobStore, tenants: Store) -> None:
    rows = economics(tenants, None, 2 * UNIT, hours=10.0)["rows"]
    assert sum(row["serving"] for row in rows) == 20 * UNIT
    day = economics(tenants, None, 2 * UNIT, since="2026-11-01", until="2026-11-01", now=START + 30 * DAY)
    assert day["hours"] == 24.0
    assert economics(tenants, None, 2 * UNIT, since="2026-11-01", now=START + DAY / 4)["hours"] == 6.0
    later = economics(tenants, store, 2 * UNIT, since="2026-11-02", now=START + 3 * DAY)
    assert (later["hours"], later["rows"]) == (48.0, [])
    free = economics(tenants, None, 0, now=START + DAY)["rows"][0]
    assert (free["serving"], free["dedicated_from"], free["paid_back_after"]) == (0, None, 0)


def test_invalid_days_and_prices_are_refused(tenants: Store) -> None:
    for options in ({"since": "yesterday"}, {"until": "2026-13-01", "since": "2026-11-01"}):
        with pytest.raises(ConfigError, match=r"day|date"):
            economics(tenants, None, 1, **options)
    with pytest.raises(ConfigError, match="an hour costs -1"):
        economics(tenants, None, -1)
