"""Cost and revenue of tenants' adapters, from the ledger and the jobs' bills.

    for row in economics(store, jobs, 2_500_000)["rows"]: …

There is one row per tenant and adapter, for all versions together; requests for the base alone have separate
rows. Amounts of money are in millionths. P is the price per hour of a machine (shared, dedicated or training),
and H is the number of hours in the period. For each row, s is the seconds of prefill and decoding, and n is
the number of answered requests. S = Σ s over all rows of all tenants.

    training            machine-hours of the adapter's jobs (in any final state) × P of a training machine
    training_billed     the tenant's bills for these jobs, at each job's token price
    serving             H · P · s/S: share of the whole cost of the shared machine, including idle hours
    billed              the ledger's charges for the adapter's requests
    dedicated           H · P of a dedicated machine, with the adapter merged into its base
    serving_thousand    1000 · serving/n; dedicated_thousand likewise
    dedicated_from      24 · P of a dedicated machine / (serving/n): requests per day at which a dedicated
                        machine costs as much as serving on the shared machine
    paid_back_after     (training − training_billed) / (billed/n − serving/n): requests after which the
                        adapter has earned its training cost

The last two assume the period's average cost and revenue per request. They ignore requests that a dedicated
machine could not answer or that arrive when the shared machine is full. Both are None if there are no answered
requests; `paid_back_after` is also None if a request earns no more than it costs. A request for a mix counts
for each adapter of the mix: with all of the request's seconds, but only with that adapter's charge.
"""

from __future__ import annotations

import math
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from veneer.errors import ConfigError
from veneer.jobs.store import JobStore
from veneer.library.database import reading
from veneer.library.names import name_of
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Store


def economics(
    store: Store,
    jobs: JobStore | None,
    hour: int,
    *,
    dedicated: int | None = None,
    training: int | None = None,
    tenant: str | None = None,
    since: str = "",
    until: str = "",
    hours: float | None = None,
    now: float | None = None,
) -> dict[str, Any]:
    """Return the cost and revenue of each tenant's adapters.

    Returns {since, until, hours, rows}: `hours` is the paid hours of the shared machine, and the table at the
    top of this module describes `rows` (seconds are machine time).

    jobs: None if nothing is trained
    hour: hourly price of all serving machines together, in millionths
    dedicated: hourly price of a machine for one adapter; default: `hour`
    training: hourly price of a training machine; default: `hour`
    tenant: report only this tenant's rows; other tenants' requests still count as use of the machine
    since, until: first and last day, in UTC; default: from the first day with a request or a bill to now
    hours: paid hours of the serving machines; default: the whole period

    Raises ConfigError."""
    dedicated = hour if dedicated is None else dedicated
    training = hour if training is None else training
    for name, price in (("hour", hour), ("dedicated", dedicated), ("training", training)):
        if not 0 <= price <= 10**12:
            raise ConfigError(f"an hour costs {price} millionths", where=name, fix="from 0 to a million")
    for name, day in (("since", since), ("until", until)):
        if day and not re.fullmatch(r"\d{4}-\d\d-\d\d", day):
            raise ConfigError(f"{day!r} is not a date", where=name, fix="as in 2026-11-25, in UTC")
    with reading(store.engine) as c:
        used = usage(c, since=since, until=until)
    bills = [] if jobs is None else jobs.bills(since=since, until=until)
    first = min((*(r["day"] for r in used if r["done"]), *(bill.day for bill in bills)), default="")
    since = since or first
    hours = _hours(since, until, time.time() if now is None else now) if hours is None else hours

    totals: dict[tuple[str, str], dict[str, Any]] = {}

    def row(tenant: str, adapter: str) -> dict[str, Any]:
        sums = "jobs", "training_seconds", "training_billed", "requests", "serving_seconds", "billed"
        return totals.setdefault((tenant, name_of(adapter)), dict.fromkeys(sums, 0))

    for r in used:
        each = row(r["tenant"], r["adapter"])
        each["requests"] += r["done"]
        each["serving_seconds"] += r["prefill"] + r["decode"]
        each["billed"] += r["cost"]
    for bill in bills:
        each = row(bill.tenant, bill.name)
        each["jobs"] += 1
        each["training_seconds"] += bill.seconds
        each["training_billed"] += bill.cost
    served_seconds = math.fsum(each["serving_seconds"] for each in totals.values()) or 1.0
    rows = [
        _row(key, each, hours * hour * each["serving_seconds"] / served_seconds, hours, dedicated, training)
        for key, each in sorted(totals.items())
        if tenant in (None, key[0]) and (each["requests"] or each["jobs"])
    ]
    return {"since": since, "until": until, "hours": hours, "rows": rows}


def _row(
    key: tuple[str, str], each: dict[str, Any], serving: float, hours: float, dedicated_hour: int, training_hour: int
) -> dict[str, Any]:
    n, billed = each["requests"], each["billed"]
    dedicated, training = hours * dedicated_hour, each["training_seconds"] / 3600 * training_hour
    owed, margin = max(0.0, training - each["training_billed"]), (billed - serving) / n if n else 0.0
    return {
        "tenant": key[0],
        "adapter": key[1],
        "jobs": each["jobs"],
        "training_seconds": float(each["training_seconds"]),
        "training": round(training),
        "training_billed": each["training_billed"],
        "requests": n,
        "serving_seconds": float(each["serving_seconds"]),
        "serving": round(serving),
        "billed": billed,
        "dedicated": round(dedicated),
        "serving_thousand": round(1000 * serving / n) if n else None,
        "dedicated_thousand": round(1000 * dedicated / n) if n else None,
        "dedicated_from": _ceil(24 * dedicated_hour / (serving / n)) if n and serving else None,
        "paid_back_after": 0 if not owed else _ceil(owed / margin) if margin > 0 else None,
    }


def _ceil(number: float) -> int:
    """Round up, but first subtract a relative 1e-9, to tolerate rounding errors."""
    return math.ceil(number - 1e-9 * abs(number))


def _hours(since: str, until: str, now: float) -> float:
    """Return the hours from the start of `since` to the end of `until` or to `now`, if earlier.

    Raises ConfigError for an invalid day."""
    if not since:
        return 0.0
    try:
        begin = datetime.fromisoformat(since).replace(tzinfo=UTC)
        end = datetime.fromtimestamp(now, UTC)
        if until:
            end = min(end, datetime.fromisoformat(until).replace(tzinfo=UTC) + timedelta(days=1))
    except ValueError as error:
        raise ConfigError(f"this day does not exist: {error}", where="since, until", fix="as in 2026-11-25") from error
    return max(0.0, (end - begin).total_seconds() / 3600)
