"""What is owed to the ledger, put into its database: lines, and the sums that are kept beside them.

A request's lines are known by (server, request). Posting says how far a request has come: open, interrupted, done, and
never back. What is there already changes nothing, so the same may be posted any number of times. Sums by day and slots
of the last minute and day move in the same transaction, by exactly what changed: they are never counted from the lines,
and cost the same however many of these there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Table, bindparam, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from veneer.library.names import name_of
from veneer.serve.request import Usage
from veneer.serve.tenancy.entries import Entry, Line, Owed, day_of
from veneer.serve.tenancy.store import ALL, Price
from veneer.serve.tenancy.tables import lines, slots, sums

__all__ = ["SLOT_WIDTHS", "add", "open_entries", "post"]

SLOT_WIDTHS = {1: 60.0, 1440: 86400.0}
"""Seconds of a slot -> of its window: sixty to a window."""
_FIGURES = ("prompt", "cached", "completion", "queued", "prefill", "decode")
Deltas = dict[tuple[Any, ...], list[Any]]


def post(c: Connection, server: str, owed: Sequence[Owed], now: float) -> int:
    """In a transaction. Returns how many requests became done."""
    if c.dialect.name == "postgresql":  # whoever speaks for a server does so alone; SQLite's write lock is one for all
        c.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": int(server, 16) - (1 << 63)})
    known = _known(c, server, [each.entry.request for each in owed])
    fresh: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    by_day: Deltas = defaultdict(lambda: [0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0])
    by_slot: Deltas = defaultdict(lambda: [0, 0])
    done = 0
    for each in owed:
        before = known.get(each.entry.request)
        if before in ("done", each.state) or (before is not None and each.state == "open"):
            continue
        known[each.entry.request] = each.state
        done += each.state == "done"
        (fresh if before is None else changed).extend(_rows(server, each))
        _count_day(by_day, each, before)
        _count_slots(by_slot, server, each, before, now)
    if fresh:
        c.execute(insert(lines), fresh)
    if changed:
        c.execute(_CHANGE, [{f"_{name}": row[name] for name in (*_KEY, *_CHANGING)} for row in changed])
    add(c, sums, by_day)
    add(c, slots, by_slot)
    return done


def open_entries(c: Connection, server: str, requests: Iterable[str] | None = None) -> list[Entry]:
    """Requests of a server that are open there: all of them, or of these."""
    here = (lines.c.server == server) & (lines.c.state == "open")
    if requests is not None:
        here &= lines.c.request.in_(list(requests))
    rows = c.execute(select(lines).where(here).order_by(lines.c.request, lines.c.part)).all()
    found = []
    for request, parts in groupby(rows, key=lambda row: row.request):
        listed = list(parts)
        first = listed[0]
        own = tuple(
            Line(r.digest, r.adapter, r.strength, Price(r.price_prompt, r.price_cached, r.price_completion))
            for r in listed
        )
        asked = (first.asked_prompt, first.asked_completion)
        found.append(Entry(request, first.tenant, first.name, first.opened, *asked, own))
    return found


def add(c: Connection, table: Table, deltas: Mapping[tuple[Any, ...], Sequence[Any]]) -> None:
    """Add figures to the rows of a table by their keys; in the keys' order, so that two who add cannot wait for each
    other."""
    if not deltas:
        return
    keys = [column.name for column in table.primary_key]
    figures = [column.name for column in table.columns if column.name not in keys]
    make = postgresql_insert if c.dialect.name == "postgresql" else sqlite_insert
    statement = make(table)
    statement = statement.on_conflict_do_update(
        index_elements=keys, set_={name: table.c[name] + statement.excluded[name] for name in figures}
    )
    rows = [dict(zip((*keys, *figures), (*key, *deltas[key]), strict=True)) for key in sorted(deltas)]
    c.execute(statement, rows)


_KEY = ("server", "request", "part")
_CHANGING = ("state", "closed", *_FIGURES, "cost")
_CHANGE = (
    update(lines)
    .where(*(lines.c[name] == bindparam(f"_{name}") for name in _KEY))
    .values({name: bindparam(f"_{name}") for name in _CHANGING})
)


def _known(c: Connection, server: str, requests: Sequence[str]) -> dict[str, str]:
    """Request -> its state, of those that are there."""
    found: dict[str, str] = {}
    for i in range(0, len(requests), 500):
        here = (lines.c.server == server) & (lines.c.part == 0) & lines.c.request.in_(requests[i : i + 500])
        found |= {row.request: row.state for row in c.execute(select(lines.c.request, lines.c.state).where(here))}
    return found


def _rows(server: str, owed: Owed) -> list[dict[str, Any]]:
    entry = owed.entry
    whole = {
        "server": server,
        "request": entry.request,
        "tenant": entry.tenant,
        "name": entry.name,
        "opened": entry.opened,
        "closed": owed.closed,
        "day": day_of(entry.opened),
        "state": owed.state,
        "asked_prompt": entry.asked_prompt,
        "asked_completion": entry.asked_completion,
        **{name: getattr(owed.usage, name) for name in _FIGURES},
    }
    return [
        whole
        | {"part": part, "digest": line.digest, "adapter": line.adapter, "strength": line.strength, "cost": cost}
        | {f"price_{name}": getattr(line.price, name) for name in ("prompt", "cached", "completion")}
        for part, (line, cost) in enumerate(zip(entry.lines, owed.costs(), strict=True))
    ]


def _count_day(by_day: Deltas, owed: Owed, before: str | None) -> None:
    """The request as a whole, and each of its adapters."""
    if owed.state == "open":
        return
    costs: dict[str, int] = {ALL: sum(owed.costs())}
    for line, cost in zip(owed.entry.lines, owed.costs(), strict=True):
        costs[line.adapter] = costs.get(line.adapter, 0) + cost
    usage: Usage = owed.usage
    for adapter, cost in costs.items():
        row = by_day[(day_of(owed.entry.opened), owed.entry.tenant, adapter)]
        changes = [int(owed.state == "done"), int(owed.state == "interrupted") - int(before == "interrupted")]
        changes += [getattr(usage, name) for name in _FIGURES]
        for i, change in enumerate([*changes, cost]):
            row[i] += change


def _count_slots(by_slot: Deltas, server: str, owed: Owed, before: str | None, now: float) -> None:
    """The request as a whole, and each adapter that a limit may name."""
    entry = owed.entry
    tokens = owed.tokens() - (Owed(entry).tokens() if before == "open" else 0)
    for width, window in SLOT_WIDTHS.items():
        if entry.opened > now - window - width:
            for adapter in {ALL, *(name_of(line.adapter) for line in entry.lines)}:
                row = by_slot[(width, int(entry.opened // width), server, entry.tenant, adapter)]
                row[0] += before is None
                row[1] += tokens
