"""A tenant's budget of training, which jobs and Tinker's clients spend together: of a calendar month in UTC.

    spent_by_clients(tenants, "acme")          what the queue counts beside its jobs, before it takes another
    budget.take("acme", cost, most)            for a client's request; give_back where it comes to nothing

A job is billed by the queue when it ends, and until then counts with what it is planned to cost; a client's passes are
billed by the ledger, one by one, under the name that `trained_name` gives. Money is in millionths.
"""

from __future__ import annotations

import time

from veneer.jobs.store import JobStore
from veneer.library.database import reading
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Store

_TRAINED = "@train"


def trained_name(run: str) -> str:
    """What a run is called in the ledger for what was trained of it, not asked of it."""
    return run + _TRAINED


def spent_by_clients(tenants: Store | None, tenant: str) -> int:
    """What the ledger has of Tinker's clients; 0 where there are no tenants."""
    if tenants is None or not tenant:
        return 0
    with reading(tenants.engine) as c:
        rows = usage(c, by=("adapter",), tenant=tenant, since=f"{_month()}-01")
    return sum(int(row["cost"]) for row in rows if row["adapter"].endswith(_TRAINED))


class ClientBudget:
    """A tenant's budget as Tinker clients spend it. Thread-safe.

    A request is charged in the jobs database when it is accepted, before the ledger records it, so that simultaneous
    requests and jobs see each other's charges."""

    def __init__(self, jobs: JobStore, tenants: Store | None) -> None:
        self.jobs, self.tenants = jobs, tenants

    def take(self, tenant: str, cost: int, most: int) -> None:
        """Raises OverBudget where there is no room for so much."""
        self.jobs.reserve(tenant, cost, most, spent_by_clients(self.tenants, tenant))

    def give_back(self, tenant: str, cost: int) -> None:
        if cost:
            self.jobs.unreserve(tenant, cost)


def _month() -> str:
    return time.strftime("%Y-%m", time.gmtime())
