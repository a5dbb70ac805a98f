"""Cost of the ledger with ten million requests: limit windows, usage, posting and pruning.

    python benchmarks/ledger_window.py [--rows 10000000] [--at postgresql://…]

Inserts the rows of one day, for 100 tenants and 10 adapters, in plain SQL, with the sums and slots that
posting maintains. Then runs a server's queries, and computes the same results from the rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Integer, cast, func, select

from veneer.library.database import reading, write_transaction
from veneer.serve.request import Usage
from veneer.serve.tenancy.entry import LedgerEntry, LedgerLine, OwedEntry
from veneer.serve.tenancy.ledger import Ledger, post, usage
from veneer.serve.tenancy.store import Price, Store, line_table

NOW = 1_800_000_000.0
SERVER = "00000000000000ff"


def fill(store: Store, rows: int) -> None:
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {rows})"
    if store.engine.dialect.name == "postgresql":
        numbers = f"WITH n(i) AS (SELECT generate_series(0, {rows - 1}))"
    columns = (
        "server, request, part, tenant, name, digest, adapter, strength, opened, closed, day, state, asked_prompt, "
        "asked_completion, prompt, cached, completion, queued, prefill, decode, price_prompt, price_cached, "
        "price_completion, cost"
    )
    values = (
        f"'{SERVER}', 'request' || (100000000 + i), 0, 'tenant' || (i % 100), 'a' || (i % 7 + i % 3), "
        "'sha256:d' || (i % 10), "
        f"'adapter' || (i % 10) || '@1', 1.0, {NOW} - 86400.0 * (1 - i * 1.0 / {rows}), {NOW}, '2027-01-15', 'done', "
        "200, 100, 200, 0, 80, 0.1, 0.2, 0.3, 1000000, 0, 2000000, 360"
    )
    sums = "SUM(1), 0, SUM(prompt), SUM(cached), SUM(completion), SUM(queued), SUM(prefill), SUM(decode), SUM(cost)"
    with write_transaction(store.engine) as c:
        c.exec_driver_sql(f"{numbers} INSERT INTO tenant_lines ({columns}) SELECT {values} FROM n")
        for adapter, more, plain in (("''", "", "''"), ("adapter", ", adapter", "REPLACE(adapter, '@1', '')")):
            c.exec_driver_sql(
                f"INSERT INTO tenant_sums SELECT day, tenant, {adapter}, {sums} FROM tenant_lines "
                f"GROUP BY day, tenant{more}"
            )
            slot = "CAST(FLOOR(opened / 1440) AS BIGINT)"
            c.exec_driver_sql(
                f"INSERT INTO tenant_slots SELECT 1440, {slot}, server, tenant, {plain}, SUM(1), "
                f"SUM(prompt + completion) FROM tenant_lines GROUP BY {slot}, server, tenant{more}"
            )


def timed(work: Callable[[], Any], times: int = 5) -> str:
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return f"{statistics.median(took) * 1e3:,.1f} ms"


def from_lines(store: Store) -> list[Any]:
    """Return the usage in a window of one day, summed from the rows."""
    slot = cast(line_table.c.opened / 1440, Integer)
    query = (
        select(
            line_table.c.tenant,
            line_table.c.adapter,
            slot,
            func.count(),
            func.sum(line_table.c.prompt + line_table.c.completion),
        )
        .where(line_table.c.opened > NOW - 87840, line_table.c.server != "other")
        .group_by(line_table.c.tenant, line_table.c.adapter, slot)
    )
    with reading(store.engine) as c:
        return list(c.execute(query))


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rows", type=int, default=10_000_000)
    arguments.add_argument("--at", help="a database, which stays as it was filled")
    arguments.add_argument("--fill", action="store_true", help="fill it and measure nothing")
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(asked.at or str(Path(folder) / "t.sqlite"), patience=3600)
        with reading(store.engine) as c:
            full = c.scalar(select(line_table.c.server).limit(1)) is not None
        if not full:
            fill(store, asked.rows)
        if asked.fill:
            return
        ledger = Ledger(store, Path(folder) / "journals", lambda: NOW)
        print(f"{store.engine.dialect.name}, {asked.rows:,} lines of one day, 100 tenants, 10 adapters")
        for what, named in (("tenants", [""]), ("tenants and one adapter", ["", "adapter1"])):
            print(f"window of a day, limits of {what}  {timed(lambda: ledger.usage_of_other_servers(86400.0, named))}")  # noqa: B023
        print(f"window of a day, from the lines    {timed(lambda: from_lines(store), 1)}")
        print(f"window of a minute                 {timed(lambda: ledger.usage_of_other_servers(60.0))}")

        def used() -> None:
            with reading(store.engine) as c:
                usage(c)

        print(f"usage by tenant, adapter, day      {timed(used)}")
        line = (LedgerLine("sha256:d1", "adapter1@1", 1.0, Price(1_000_000, 0, 2_000_000)),)
        count = iter(range(10**9))

        def posted(many: int) -> None:
            owed = [
                OwedEntry(LedgerEntry(f"x{next(count)}", "tenant1", "a", NOW, 9, 9, line), "done", NOW, Usage(9, 0, 9))
            ]
            owed += [
                OwedEntry(
                    LedgerEntry(f"x{next(count)}", f"tenant{n % 100}", "a", NOW, 9, 9, line),
                    "done",
                    NOW,
                    Usage(9, 0, 9),
                )
                for n in range(many - 1)
            ]
            with write_transaction(store.engine) as c:
                post(c, SERVER, owed, NOW)

        print(f"posting one request                {timed(lambda: posted(1), 50)}")
        print(f"posting a thousand                 {timed(lambda: posted(1000))}")
        began = time.perf_counter()
        gone = ledger.prune(0.99)
        print(f"pruning {gone:,} lines, 10,000 at a time  {time.perf_counter() - began:.1f} s")
        ledger.close()
        store.close()


if __name__ == "__main__":
    main()
