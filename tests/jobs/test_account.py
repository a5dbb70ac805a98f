"""Jobs and Tinker clients share one training budget."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.jobs.fakes import PLAN, FixedTerms, queued, taken
from tests.jobs.small import small_config
from tests.library.conftest import quick  # noqa: F401
from veneer.jobs.account import TrainingAccount, trained_name
from veneer.jobs.store import JobStore, OverBudget
from veneer.jobs.validate import validate_job
from veneer.library.database import write_transaction
from veneer.plan.tables import cpu_device
from veneer.serve.request import Refused, Usage
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.entry import LedgerEntry, LedgerLine, OwedEntry
from veneer.serve.tenancy.ledger import post
from veneer.serve.tenancy.store import Price, Store, TrainingTerms

UNIT = 1_000_000
in_sqlite = pytest.mark.parametrize("library", ["sqlite"], indirect=True)


@pytest.fixture
def tenants(quick: Path) -> Store:  # noqa: F811
    return Store(str(quick / "tenants.sqlite"))


def billed(tenants: Store, adapter: str, units: int, tenant: str = "acme", ago: float = 0.0) -> None:
    """Add a request with this cost to the ledger."""
    at = time.time() - ago
    line = LedgerLine("digest", adapter, 1.0, Price(UNIT, 0, 0))
    entry = LedgerEntry(f"{tenant}{adapter}{units}{ago}", tenant, "word", at, units * UNIT, 0, (line,))
    with write_transaction(tenants.engine) as c:
        post(c, "00112233aabbccdd", [OwedEntry(entry, "done", at, Usage(units * UNIT, 0, 0))], at)


@in_sqlite
def test_job_budget_counts_tinker_clients(store: JobStore, tenants: Store, tmp_path: Path) -> None:
    """A job's cost and the spending of clients must fit the budget together.

    Inference, other tenants and earlier months do not count."""
    for adapter, units, tenant, ago in (
        (trained_name("acme/tinker-a-0"), 3, "acme", 0.0),
        (trained_name("acme/tinker-b-0"), 1, "acme", 0.0),
        ("acme/tinker-a-0@1", 50, "acme", 0.0),
        (trained_name("best/tinker-a-0"), 60, "best", 0.0),
        (trained_name("acme/tinker-a-0"), 70, "acme", 32 * 86400.0),
    ):
        billed(tenants, adapter, units, tenant, ago)
    account = TrainingAccount(store, tenants)
    assert account.spent("acme") == 4 * UNIT
    manage.add_tenant(tenants, "acme", actor="test")
    config = small_config(tmp_path)
    for price, state in ((UNIT * UNIT, "failed"), (1, "queued")):
        terms = {"training_price": price, "training_budget": 4 * UNIT + 1000}
        manage.change_settings(tenants, "acme", terms, actor="test")
        store.create("acme", config, name="support")
        lease = taken(store, state="validating")
        job = validate_job(store, lease, account, cpu_device())
        assert job.state == state, job.error
    assert (store.jobs("acme")[0][1].error or {})["kind"] == "overbudget"
    store.create("acme", config, name="support")
    lease = taken(store, state="validating")
    with pytest.raises(OverBudget, match=r"of this month's budget of 9\.00, only 3\.00 is left"):
        store.queue(lease, PLAN, price=5 * UNIT, budget=9 * UNIT, spent=6 * UNIT)


@in_sqlite
def test_client_budget_counts_jobs_and_concurrent_clients(store: JobStore, tenants: Store) -> None:
    """The budget is 9. Jobs plan to spend 3 and the ledger records 2, so 4 requests that cost 1 each fit.

    A failed request returns its cost to the budget. Amounts that the ledger records later are not counted
    twice."""
    queued(store, price=3 * UNIT)
    billed(tenants, trained_name("acme/tinker-a-0"), 2)
    account = FixedTerms(store, tenants, price=UNIT, budget=9 * UNIT)

    def took(_: int) -> bool:
        try:
            account.reserve("acme", UNIT)
        except Refused as error:
            message = "this request costs 1.00, but only 0.00 of this month's training budget is left"
            return error.status != 402 or message not in error.what
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(took, range(20))) == 4
    account.jobs.release_budget("acme", UNIT)
    assert [took(0), took(0)] == [True, False]
    billed(tenants, trained_name("acme/tinker-b-0"), 3)
    account.jobs.release_budget("acme", UNIT)
    assert [took(0), took(0)] == [True, False]
    billed(tenants, trained_name("acme/tinker-c-0"), 2)  # a bill from another server
    assert not took(0)
    assert TrainingAccount(store, None).reserve("", UNIT) == 0


@in_sqlite
def test_jobs_count_reservations_that_the_ledger_lacks(store: JobStore, tenants: Store) -> None:
    """Clients on two servers reserve 6 of a budget of 9 before the ledger records anything.

    A job that costs 4 is refused; a job that costs 3 is accepted, and leaves nothing for clients."""
    terms = {"price": UNIT, "budget": 9 * UNIT}
    for account in (FixedTerms(store, tenants, **terms), FixedTerms(JobStore(store.library), tenants, **terms)):
        account.reserve("acme", 3 * UNIT)
    store.create("acme", {}, name="support")
    lease = taken(store, state="validating")
    plan = {**PLAN, "tokens": UNIT}
    with pytest.raises(OverBudget, match=r"of this month's budget of 9\.00, only 3\.00 is left"):
        store.queue(lease, plan, price=4 * UNIT, budget=9 * UNIT, spent=0)
    assert store.queue(lease, plan, price=3 * UNIT, budget=9 * UNIT, spent=0).state == "queued"
    with pytest.raises(Refused, match="budget"):
        account.reserve("acme", 1)
    account.jobs.release_budget("acme", UNIT)
    account.reserve("acme", UNIT)


@in_sqlite
def test_terms_follow_changed_settings(store: JobStore, tenants: Store) -> None:
    manage.add_tenant(tenants, "acme", actor="test")
    terms = TrainingAccount(store, tenants).terms
    assert terms("acme") == TrainingTerms()
    manage.change_settings(tenants, "", {"training_price": 5}, actor="test")
    assert terms("acme") == TrainingTerms(price=5)
    own = {"training_price": 3, "training_budget": 7, "training_jobs": 1}
    manage.change_settings(tenants, "acme", own, actor="test")
    assert terms("acme") == TrainingTerms(price=3, budget=7, jobs=1)
    assert terms("") == TrainingTerms()
    assert terms("nobody").jobs == 0
    manage.change_settings(tenants, "acme", {"enabled": False}, actor="test")
    assert terms("acme").jobs == 0
    manage.change_settings(tenants, "acme", dict.fromkeys(own), actor="test")
    manage.remove_tenant(tenants, "acme", actor="test")
    assert TrainingAccount(store, None).terms("acme") == TrainingTerms()
