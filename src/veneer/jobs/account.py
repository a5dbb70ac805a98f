"""Tenants' training prices, budgets and limits, for jobs and for Tinker clients.

    account.terms("acme")                      current price, monthly budget and maximum concurrent jobs
    account.spent("acme")                      this month's cost of Tinker clients, from the ledger
    cost = account.reserve("acme", tokens)     before a request is accepted
    account.jobs.release_budget("acme", cost)  after the request has failed

The queue bills a job when the job ends; until then, the job's planned cost counts against the budget. For
Tinker clients, the ledger bills each pass under the name that `trained_name` returns. Amounts of money are in
millionths; months are in UTC.
"""

from __future__ import annotations

import time

from veneer.jobs.store import JobStore, cost_of
from veneer.library.database import reading
from veneer.serve.request import Refused
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Store, TrainingTerms

_TRAINED = "@train"


def trained_name(run: str) -> str:
    """Return the name under which the ledger bills a run's training.

    Requests to the run's adapter are billed separately."""
    return run + _TRAINED


class TrainingAccount:
    """Training terms and budgets of a queue's tenants. Thread-safe.

    tenants: None for a server without tenants; training is then free."""

    def __init__(self, jobs: JobStore, tenants: Store | None) -> None:
        self.jobs, self.tenants = jobs, tenants

    def terms(self, tenant: str) -> TrainingTerms:
        return TrainingTerms() if self.tenants is None else self.tenants.refresh().training_terms(tenant)

    def check_allowed(self, tenant: str) -> None:
        """Raise Refused (403) unless the tenant is allowed to train."""
        if self.terms(tenant).jobs == 0:
            reason = "the tenant does not exist, is disabled, or has a job limit of 0"
            message = f"{tenant or 'this machine'} is not allowed to train: {reason}"
            raise Refused(message, status=403, code="forbidden", where="tenant", fix="the operator can allow it")

    def spent(self, tenant: str) -> int:
        """Return this month's cost of the tenant's Tinker clients, from the ledger."""
        if self.tenants is None or not tenant:
            return 0
        with reading(self.tenants.engine) as c:
            rows = usage(c, by=("adapter",), tenant=tenant, since=time.strftime("%Y-%m-01", time.gmtime()))
        return sum(int(row["cost"]) for row in rows if row["adapter"].endswith(_TRAINED))

    def reserve(self, tenant: str, tokens: int) -> int:
        """Reserve the cost of `tokens` in the tenant's budget, and return the cost.

        The reservation is in the jobs' database until the ledger has the bill, so that concurrent requests
        and jobs count each other's costs. Raises Refused (402) if the budget is too small."""
        terms = self.terms(tenant)
        if terms.budget is None or not (cost := cost_of(tokens, terms.price)):
            return 0
        self.jobs.reserve(tenant, cost, terms.budget, self.spent(tenant))
        return cost
