"""Usage pages over a ledger with 10,000,000 lines, on SQLite and optionally on PostgreSQL.

    python benchmarks/ledger_rows.py [--quick] [--rows 10000000] [--postgresql URL] [--json]

SQL statements insert the lines, evenly over 400 days and 1,000 tenants with three adapters each, and compute
the daily sums from the lines. 200 requests are open. Each row has the p50 and p95 of one page: the time of the
function that a route or the Studio calls, with a pooled connection. --quick uses 100,000 lines. If a database
already has lines, the benchmark only measures; otherwise, the database must be empty. Pages have a time limit;
reports over the whole ledger have none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from _report import bar, lines_of, report, row
from sqlalchemy import Connection, select, text

from veneer.library.database import write_transaction
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import Store, line_table

BAR_MS = 100.0
DAYS, TENANTS, ADAPTERS = 400, 1000, 3
FIRST = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=DAYS - 1)

_SERIES = {
    "postgresql": "generate_series({first}, {last}) AS g(n)",
    "sqlite": "(WITH RECURSIVE g(n) AS (SELECT {first} UNION ALL SELECT n + 1 FROM g WHERE n < {last})"
    " SELECT n FROM g)",
}
_DAY = {
    "postgresql": "to_char(date '{first}' + (n::bigint * {days} / {rows})::int, 'YYYY-MM-DD')",
    "sqlite": "date('{first}', '+' || (n * {days} / {rows}) || ' days')",
}
_LINES = """
INSERT INTO tenant_lines (server, request, part, tenant, name, digest, adapter, strength, opened, closed, day, state,
  asked_prompt, asked_completion, prompt, cached, completion, queued, prefill, decode,
  price_prompt, price_cached, price_completion, cost)
SELECT 'benchmark', 'r' || n, 0, 't' || (CAST(n AS BIGINT) * 7919 % {tenants}), 'support', '',
  'a' || (n / {tenants} % {adapters}), 1, {start} + (n * CAST({days} AS BIGINT) / {rows}) * 86400.0 + n % 86400,
  CASE WHEN n < 200 THEN NULL ELSE {start} END, {day},
  CASE WHEN n < 200 THEN 'open' ELSE 'done' END, 500, 100, 500, 100, 80, 0.1, 0.2, 0.3, 150000, 15000, 600000, 108
FROM {series}
"""
_SUMS = """
INSERT INTO tenant_sums (day, tenant, adapter, done, interrupted, prompt, cached, completion, queued, prefill,
  decode, cost)
SELECT day, tenant, {adapter}, count(*), 0, sum(prompt), sum(cached), sum(completion), sum(queued), sum(prefill),
  sum(decode), sum(cost)
FROM tenant_lines WHERE state = 'done' GROUP BY {group}
"""


def fill(store: Store, rows: int) -> None:
    dialect = store.engine.dialect.name
    values: dict[str, Any] = {"tenants": TENANTS, "adapters": ADAPTERS, "days": DAYS, "start": FIRST.timestamp()}
    values["day"] = _DAY[dialect].format(first=FIRST.date(), days=DAYS, rows=rows)
    values["rows"] = rows
    for n in range(TENANTS):
        if n % 100 == 0:
            manage.add_tenant(store, f"t{n}", actor="benchmark")
    for first in range(0, rows, 1_000_000):
        series = _SERIES[dialect].format(first=first, last=min(first + 1_000_000, rows) - 1)
        with write_transaction(store.engine) as c:
            patient(c)
            c.execute(text(_LINES.format(series=series, **values)))
    with write_transaction(store.engine) as c:
        patient(c)
        c.execute(text(_SUMS.format(adapter="''", group="day, tenant")))
        c.execute(text(_SUMS.format(adapter="adapter", group="day, tenant, adapter")))
    with write_transaction(store.engine) as c:
        patient(c)
        c.exec_driver_sql("ANALYZE")


def patient(c: Connection) -> None:
    """Allow long statements, which a server's connections do not."""
    driver: Any = c.connection.driver_connection
    if hasattr(driver, "patience"):
        driver.patience = 3600.0


def pages(store: Store) -> dict[str, Callable[[int], Any]]:
    def page(**filters: Any) -> Callable[[int], Any]:
        def read(i: int) -> Any:
            given = {name: value(i) if callable(value) else value for name, value in filters.items()}
            with store.reading() as c:
                return usage(c, **given)

        return read

    def ago(days: int) -> str:
        return str((FIRST + timedelta(days=DAYS - days)).date())

    def tenant(i: int) -> str:
        return f"t{i * 31 % TENANTS}"

    month = ago(30)
    return {
        "Studio: by tenant and adapter, 7 days": page(by=("tenant", "adapter"), since=ago(7)),
        "by tenant, 30 days": page(by=("tenant",), since=month),
        "by tenant, adapter and day, 1 day": page(since=ago(1)),
        "by day, 30 days": page(by=("day",), since=month),
        "totals, 30 days": page(by=(), since=month),
        "one tenant, by adapter and day, 400 days": page(by=("adapter", "day"), tenant=tenant),
        "one tenant, by adapter, 400 days": page(by=("adapter",), tenant=tenant),
        "one tenant, by day, 30 days": page(by=("day",), tenant=tenant, since=month),
        "audit log, 100 lines": lambda i: read_audit(store),
        "report: by tenant and adapter, 30 days": page(by=("tenant", "adapter"), since=month),
        "report: by tenant, 400 days": page(by=("tenant",)),
        "report: by tenant and adapter, 400 days": page(by=("tenant", "adapter")),
    }


def read_audit(store: Store) -> Any:
    with store.reading() as c:
        return manage.audit_lines(c)


def timed(act: Callable[[int], Any], times: int) -> tuple[float, float]:
    act(0)
    taken = []
    for n in range(times):
        start = time.perf_counter()
        act(n)
        taken.append((time.perf_counter() - start) * 1000)
    return statistics.median(taken), statistics.quantiles(taken, n=20)[-1]


def measure(name: str, where: str, count: int, say: Callable[[str], None]) -> tuple[list, list]:
    store, rows, bars = Store(where), [], []
    with store.reading() as c:
        filled = c.scalar(select(line_table.c.request).limit(1)) is not None
    if not filled:
        start = time.perf_counter()
        fill(store, count)
        say(f"{name}: {count:,} lines in {time.perf_counter() - start:.0f} s")
    for what, act in pages(store).items():
        p50, p95 = timed(act, 5 if what.startswith("report") else 20)
        rows += [row(f"{name}: {what}", metric, value, "ms") for metric, value in (("p50", p50), ("p95", p95))]
        if not what.startswith("report"):
            bars.append(bar(f"{name}: {what}, p95 in ms", BAR_MS, p95, at_least=False))
    store.close()
    return rows, bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 lines")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--sqlite", metavar="FILE", help="the SQLite database; default: a temporary file")
    parser.add_argument("--postgresql", metavar="URL", help="also measure with the ledger there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    count = 100_000 if options.quick else options.rows
    say = (lambda _: None) if options.json else (lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory() as folder:
        rows, bars = measure("SQLite", options.sqlite or str(Path(folder) / "tenants.sqlite"), count, say)
    if options.postgresql:
        more, further = measure("PostgreSQL", options.postgresql, count, say)
        rows, bars = rows + more, bars + further
    result = report(rows, bars, {"lines": count})
    print(json.dumps(result, indent=2) if options.json else "\n".join(lines_of(result)))


if __name__ == "__main__":
    main()
