"""What tenants may train and what it costs them: one account for jobs and for Tinker clients.

    account.terms("acme")                      price, monthly budget and jobs at once, as the database has them now
    account.spent("acme")                      what the ledger has recorded this month for Tinker clients
    taken = account.reserve("acme", tokens)    before a client's request is accepted; `give_back` if it fails

A job is billed by the queue when it ends; until then its planned cost counts. A Tinker client's passes are billed by
the ledger, one by one, under the name that `trained_name` returns. Amounts are in millionths, months are UTC's.
"""

from __future__ import annotations

import time

from veneer.jobs.store import JobStore, OverBudget
from veneer.library.database import reading
from veneer.serve.request import Refused
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Price, Store, TrainingTerms

_TRAINED = "@train"


def trained_name(run: str) -> str:
    """Return the ledger's name for what was trained of a run, as opposed to requests that its adapter answered."""
    return run + _TRAINED


class TrainingAccount:
    """The accounts of a queue's tenants. Thread-safe. `tenants`: None if the server has none; training is then free."""

    def __init__(self, jobs: JobStore, tenants: Store | None) -> None:
        self.jobs, self.tenants = jobs, tenants

    def terms(self, tenant: str) -> TrainingTerms:
        return TrainingTerms() if self.tenants is None else self.tenants.look().training_terms(tenant)

    def check_allowed(self, tenant: str) -> None:
        """Raises Refused (403) if the tenant's terms allow no training."""
        if self.terms(tenant).jobs == 0:
            raise Refused("this tenant may not train", status=403, code="forbidden", fix="the operator can allow it")

    def spent(self, tenant: str) -> int:
        """Return what the ledger has recorded this month for the tenant's Tinker clients."""
        if self.tenants is None or not tenant:
            return 0
        with reading(self.tenants.engine) as c:
            rows = usage(c, by=("adapter",), tenant=tenant, since=time.strftime("%Y-%m-01", time.gmtime()))
        return sum(int(row["cost"]) for row in rows if row["adapter"].endswith(_TRAINED))

    def reserve(self, tenant: str, tokens: int) -> int:
        """Take the price of these tokens from the tenant's budget and return it. Raises Refused (402).

        The reservation is in the jobs' database before the ledger has the bill, so that simultaneous requests and jobs
        see each other's costs."""
        terms = self.terms(tenant)
        cost = Price(terms.price).cost(tokens, 0, 0) if terms.budget is not None else 0
        if cost and terms.budget is not None:
            try:
                self.jobs.reserve(tenant, cost, terms.budget, self.spent(tenant))
            except OverBudget as error:
                raise Refused(error.what, status=402, code="over_budget", fix=error.fix) from error
        return cost

    def give_back(self, tenant: str, amount: int) -> None:
        """Return a reservation of a request that failed."""
        if amount:
            self.jobs.unreserve(tenant, amount)
