"""Questions to the ledger: what was used, by tenant, adapter and day, in figures that add up exactly."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Table, func, select

from veneer.errors import ConfigError, nearest
from veneer.serve.tenancy.store import ALL
from veneer.serve.tenancy.tables import lines, sums

__all__ = ["BY", "FIGURES", "as_csv", "usage"]

BY = ("tenant", "adapter", "day")
FIGURES = (
    "requests", "done", "interrupted", "open", "prompt", "cached", "completion", "queued", "prefill", "decode", "cost",
)  # fmt: skip
"""`requests` is done + interrupted + open; tokens, seconds and cost (in millionths) are of those that are done. Where
adapters are told apart, a request counts for each adapter of its mix, with all of its tokens and with that adapter's
own cost; so costs add up to the whole, in whole millionths, and the others do where nothing was mixed."""
_SECONDS = ("queued", "prefill", "decode")
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
    apart = "adapter" in by or adapter is not None
    found: dict[tuple[Any, ...], dict[str, Any]] = {}

    def ask(table: Table, columns: dict[str, Any], *also: Any) -> None:
        t = table.c
        kept = [t[name] for name in by]
        query = select(*kept, *columns.values()).where(*also).group_by(*kept)
        if tenant is not None:
            query = query.where(t.tenant == tenant)
        if adapter is not None:  # a name stands for all its versions
            query = query.where((t.adapter == adapter) | t.adapter.startswith(f"{adapter}@", autoescape=True))
        for name, value in (("since", since), ("until", until)):
            if value:
                if not _DAY.fullmatch(value):
                    raise ConfigError(f"{value!r} is no day", where=name, fix="as in 2026-11-25, in UTC")
                query = query.where(t.day >= value if name == "since" else t.day <= value)
        for row in c.execute(query):
            kind = found.setdefault(tuple(row[: len(by)]), dict.fromkeys(FIGURES, 0))
            for name, value in zip(columns, row[len(by) :], strict=True):
                kind[name] += float(value or 0) if name in _SECONDS else int(value or 0)

    # PostgreSQL sums bigint as numeric, exactly; SQLite as 64-bit integers, or it raises.
    summed = {name: func.sum(sums.c[name]) for name in FIGURES if name not in ("requests", "open")}
    ask(sums, summed, sums.c.adapter != ALL if apart else sums.c.adapter == ALL)
    ask(lines, {"open": func.count()}, lines.c.state == "open", *(() if apart else (lines.c.part == 0,)))
    out = []
    for key in sorted(found) if by or found else [()]:
        figures = found.get(key) or dict.fromkeys(FIGURES, 0)
        figures["requests"] = figures["done"] + figures["interrupted"] + figures["open"]
        figures |= {name: float(figures[name]) for name in _SECONDS}
        out.append({**dict(zip(by, key, strict=True)), **figures})
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
