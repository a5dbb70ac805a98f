"""A tenant's budget of training, which jobs and Tinker's clients spend together: of a calendar month in UTC.

    spent_by_clients(tenants, "acme")          what the queue counts beside its jobs, before it takes another
    budget.take("acme", cost, most)            for a client's request; give_back where it comes to nothing

A job is billed by the queue when it ends, and until then counts with what it is planned to cost; a client's passes are
billed by the ledger, one by one, under the name that `trained_name` gives. Money is in millionths.
"""

from __future__ import annotations

import threading
import time

from veneer.jobs.store import JobStore, OverBudget, money
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
    """As one server's clients spend it. Thread-safe. A request counts from the moment that it is taken, not from when
    the ledger has it: many that are sent at once do not pass each other by."""

    def __init__(self, jobs: JobStore, tenants: Store | None) -> None:
        self.jobs, self.tenants = jobs, tenants
        self._lock = threading.Lock()
        self._spent: dict[tuple[str, str], int] = {}  # what was in the ledger, and what was taken here since

    def take(self, tenant: str, cost: int, most: int) -> None:
        """Raises OverBudget where there is no room for so much."""
        posted, key = spent_by_clients(self.tenants, tenant), (tenant, _month())
        by_jobs = self.jobs.committed(tenant)
        with self._lock:
            spent = max(posted, self._spent.get(key, 0))  # other servers' come with the ledger
            if by_jobs + spent + cost > most:
                left = money(max(0, most - by_jobs - spent))
                what = f"this request costs {money(cost)}, and of this month's budget of training {left} are left"
                raise OverBudget(what, where="budget", fix="a larger budget, or next month")
            self._spent = {key: spent for key, spent in self._spent.items() if key[1] == _month()}
            self._spent[key] = spent + cost

    def give_back(self, tenant: str, cost: int) -> None:
        with self._lock:
            key = tenant, _month()
            self._spent[key] = max(0, self._spent.get(key, 0) - cost)


def _month() -> str:
    return time.strftime("%Y-%m", time.gmtime())
