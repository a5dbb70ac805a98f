"""Questions to the ledger: what was used, by tenant, adapter and day, in figures that add up exactly."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, Connection, case, cast, func, select

from veneer.errors import ConfigError, nearest
from veneer.serve.tenancy.store import ledger

__all__ = ["BY", "FIGURES", "as_csv", "usage"]

BY = ("tenant", "adapter", "day")
FIGURES = (
    "requests", "done", "interrupted", "open", "prompt", "cached", "completion", "queued", "prefill", "decode", "cost",
)  # fmt: skip
"""`requests` is done + interrupted + open; tokens, seconds and cost (in millionths) are of those that are done."""
_DAY = re.compile(r"\d{4}-\d\d-\d\d")


def usage(
    c: Connection,
    *,
    by: Sequence[str] = BY,
    tenant: str | None = None,
    adapter: str | None = None,
    since: str = "",
    until: str = "",
) -> list[dict[str, Any]]:
    """A row for each combination of `by`, in its order; () for one row of everything. `since`, `until`: days in UTC,
    both included, when requests were admitted."""
    for name in by:
        if name not in BY:
            near = nearest(name, BY)
            fix = f"did you mean {near[0]}?" if near else f"of {', '.join(BY)}"
            raise ConfigError(f"usage cannot be counted by {name!r}", where="by", fix=fix)
    t = ledger.c
    states = [cast(func.sum(case((t.state == s, 1), else_=0)), BigInteger) for s in ("done", "interrupted", "open")]
    # PostgreSQL sums bigint as numeric, exactly; SQLite as 64-bit integers, or it raises.
    sums = [func.sum(t[name]) for name in FIGURES[4:]]
    columns = [t[name] for name in by]
    query = select(*columns, func.count(), *states, *sums).group_by(*columns).order_by(*columns)
    if tenant is not None:
        query = query.where(t.tenant == tenant)
    if adapter is not None:  # a name stands for all its versions
        query = query.where((t.adapter == adapter) | t.adapter.startswith(f"{adapter}@", autoescape=True))
    for name, value in (("since", since), ("until", until)):
        if value:
            if not _DAY.fullmatch(value):
                raise ConfigError(f"{value!r} is no day", where=name, fix="as in 2026-11-25, in UTC")
            query = query.where(t.day >= value if name == "since" else t.day <= value)
    out = []
    for row in c.execute(query):
        figures: dict[str, Any] = dict(zip(FIGURES, row[len(columns) :], strict=True))
        for name, value in figures.items():
            figures[name] = float(value or 0) if name in ("queued", "prefill", "decode") else int(value or 0)
        out.append({**dict(zip(by, row, strict=False)), **figures})
    return out


def as_csv(rows: Sequence[dict[str, Any]], by: Sequence[str] = BY) -> str:
    """With a header; names that a spreadsheet would take for a formula are quoted."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*by, *FIGURES], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: f"'{v}" if isinstance(v, str) and v[:1] in ("=", "+", "-", "@") else v for k, v in row.items()}
        )
    return text.getvalue()
