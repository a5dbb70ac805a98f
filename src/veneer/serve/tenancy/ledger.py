"""The ledger: a line for each part of each request that was admitted, settled once.

    admitted      kept in the outbox, on this machine's disk, before the request is served
    used          its end is in the outbox before the last word goes to the client
    posted        a thread puts what the outbox owes into the ledger's database, and only then forgets it there
    died          whoever starts next on the same folder settles what the outbox of the dead has; what has no end there
                  is `interrupted`: no tokens, no cost, only what was asked for

So requests wait for the local disk alone, never for the ledger's database: while that is away the outbox keeps what is
owed, up to its bound, and beyond that nobody is admitted. What "exactly once" means: a request is known by (server,
request), where a server is one run of one process. Posting sets how far it has come, never adds it a second time, so it
may be repeated at any point. Outboxes on a disk that is gone: their servers are not seen any more, and what they had
open is interrupted after ten minutes. Should such a server come back, its word is the last: done replaces interrupted.

Posting says how far a request has come: open, interrupted, done, and never back. What is there already changes nothing.
Sums by day, and slots of the last minute and day, move in the same transaction by exactly what changed: they are never
counted from the lines, and cost the same however many of these there are. `usage` asks what was used, by tenant,
adapter and day, in figures that add up exactly.
"""

from __future__ import annotations

import csv
import io
import logging
import re
import secrets
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Connection,
    Table,
    bindparam,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import SQLAlchemyError

from veneer.errors import ConfigError, ResourceError, nearest
from veneer.library.database import database_clock, reading, write_transaction
from veneer.library.names import name_of
from veneer.serve.access import LedgerState
from veneer.serve.outage import is_outage
from veneer.serve.request import Refused, Usage, invalid
from veneer.serve.tenancy.outbox import (
    EntryState,
    LedgerEntry,
    LedgerLine,
    Outbox,
    OwedEntry,
    Writer,
    day_of,
    end_text,
    left_behind,
    outboxes,
)
from veneer.serve.tenancy.store import ALL, Price, Store, line_table, server_table, slot_table, sum_table

_log = logging.getLogger("veneer.serve.tenancy")

# -- from the outbox into the database ---------------------------------------------------------------------------------


_SLOT_WIDTHS = {1: 60.0, 1440: 86400.0}
"""Seconds of a slot -> of its window: sixty to a window."""
_FIGURES = ("prompt", "cached", "completion", "queued", "prefill", "decode")
_Deltas = dict[tuple[Any, ...], list[Any]]


def post(c: Connection, server: str, owed: Sequence[OwedEntry], now: float) -> int:
    """Put what is owed into the database, within a transaction. Returns how many requests became done."""
    if c.dialect.name == "postgresql":  # whoever speaks for a server does so alone; SQLite's write lock is one for all
        c.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": int(server, 16) - (1 << 63)})
    known = _known(c, server, [each.entry.request for each in owed])
    fresh: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    by_day: _Deltas = defaultdict(lambda: [0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0])
    by_slot: _Deltas = defaultdict(lambda: [0, 0])
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
        c.execute(insert(line_table), fresh)
    if changed:
        c.execute(_CHANGE, [{f"_{name}": row[name] for name in (*_KEY, *_CHANGING)} for row in changed])
    _add_figures(c, sum_table, by_day)
    _add_figures(c, slot_table, by_slot)
    return done


def _open_entries(c: Connection, server: str) -> list[LedgerEntry]:
    """The requests of a server that are open in the database."""
    here = (line_table.c.server == server) & (line_table.c.state == "open")
    rows = c.execute(select(line_table).where(here).order_by(line_table.c.request, line_table.c.part)).all()
    found = []
    for request, parts in groupby(rows, key=lambda row: row.request):
        listed = list(parts)
        first = listed[0]
        own = tuple(
            LedgerLine(r.digest, r.adapter, r.strength, Price(r.price_prompt, r.price_cached, r.price_completion))
            for r in listed
        )
        asked = (first.asked_prompt, first.asked_completion)
        found.append(LedgerEntry(request, first.tenant, first.name, first.opened, *asked, own))
    return found


def _add_figures(c: Connection, table: Table, deltas: Mapping[tuple[Any, ...], Sequence[Any]]) -> None:
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
    update(line_table)
    .where(*(line_table.c[name] == bindparam(f"_{name}") for name in _KEY))
    .values({name: bindparam(f"_{name}") for name in _CHANGING})
)


def _known(c: Connection, server: str, requests: Sequence[str]) -> dict[str, str]:
    """Request -> its state, of those that are there."""
    found: dict[str, str] = {}
    for i in range(0, len(requests), 500):
        here = (
            (line_table.c.server == server) & (line_table.c.part == 0) & line_table.c.request.in_(requests[i : i + 500])
        )
        found |= {
            row.request: row.state for row in c.execute(select(line_table.c.request, line_table.c.state).where(here))
        }
    return found


def _rows(server: str, owed: OwedEntry) -> list[dict[str, Any]]:
    entry = owed.entry
    whole = {name: value for name, value in vars(entry).items() if name != "lines"}
    whole |= {"server": server, "closed": owed.closed, "day": day_of(entry.opened), "state": owed.state}
    whole |= {name: getattr(owed.usage, name) for name in _FIGURES}
    return [
        whole
        | {"part": part, "digest": line.digest, "adapter": line.adapter, "strength": line.strength, "cost": cost}
        | {f"price_{name}": getattr(line.price, name) for name in ("prompt", "cached", "completion")}
        for part, (line, cost) in enumerate(zip(entry.lines, owed.costs(), strict=True))
    ]


def _count_day(by_day: _Deltas, owed: OwedEntry, before: str | None) -> None:
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


def _count_slots(by_slot: _Deltas, server: str, owed: OwedEntry, before: str | None, now: float) -> None:
    """The request as a whole, and each adapter that a limit may name."""
    entry = owed.entry
    tokens = owed.tokens() - (OwedEntry(entry).tokens() if before == "open" else 0)
    for width, window in _SLOT_WIDTHS.items():
        if entry.opened > now - window - width:
            for adapter in {ALL, *(name_of(line.adapter) for line in entry.lines)}:
                row = by_slot[(width, int(entry.opened // width), server, entry.tenant, adapter)]
                row[0] += before is None
                row[1] += tokens


# -- the ledger --------------------------------------------------------------------------------------------------------


_MOST = 1000  # requests in one transaction
_GONE_SECONDS = 600.0
_LATE_SECONDS = 2.0


class Ledger:
    """The ledger of one run of one process. Thread-safe."""

    def __init__(
        self, store: Store, folder: Path, wall: Callable[[], float], *, synced: bool = False, room: int = 32 << 20
    ) -> None:
        """`folder`: where outboxes are, on a disk of this machine. `synced`, `room`: see `Outbox`. Settles what the
        dead left there. Raises ResourceError where the disk is full."""
        self.store, self.wall = store, wall
        self.server = secrets.token_hex(8)
        self.folder = folder
        self.outbox = Outbox(folder, self.server, synced=synced, room=room)
        self._wake, self._closing = threading.Event(), False
        self._ended: dict[str, float] = {}  # when requests ended that the database does not have, the oldest first
        self._away, self._asked, self._said = False, 0.0, -10.0
        try:
            self.beat()
            self.recovered = self.recover()
        except BaseException:
            self.outbox.close()
            raise
        self.writer: Writer[Connection] = Writer(lambda: write_transaction(store.engine), "veneer-shadows")
        self._sender = threading.Thread(target=self._send, name="veneer-ledger", daemon=True)
        self._sender.start()

    def open(self, entry: LedgerEntry) -> Future[None]:
        """The future's result comes when the outbox has it. Its exception is Refused: 400 where a request of that id is
        there, 503 where no more can be kept."""
        opened: Future[None] = Future()

        def kept(future: Future[None]) -> None:
            error = future.exception()
            if error is None:
                self._wake.set()
                opened.set_result(None)
            elif isinstance(error, sqlite3.IntegrityError):
                what = f"the id {entry.request} was used by an earlier request"
                opened.set_exception(invalid(what, fix="a new id for each request"))
            else:
                self._refuse(error)
                opened.set_exception(
                    Refused("usage cannot be recorded at the moment", status=503, code="overloaded", retry_after=5.0)
                )

        self.outbox.open(entry).add_done_callback(kept)
        return opened

    def _refuse(self, error: BaseException) -> None:
        """Say so, once in ten seconds."""
        if time.monotonic() - self._said > 10.0:
            self._said = time.monotonic()
            _log.error("requests are refused, for the ledger cannot keep them: %s (%d owed)", error, self.outbox.owed)

    def settle(self, request: str, usage: Usage) -> Future[None]:
        """The future's result comes when the usage outlives this process; it has no exception."""
        return self._end(request, "done", usage)

    def interrupt(self, request: str) -> Future[None]:
        """Record that the request ended without a bill. The future is that of `settle`."""
        return self._end(request, "interrupted", Usage(0, 0, 0))

    def _end(self, request: str, state: EntryState, usage: Usage) -> Future[None]:
        now = self.wall()
        self._ended.setdefault(request, now)
        kept = self.outbox.settle(request, end_text(state, now, usage))
        kept.add_done_callback(lambda future: self._wake.set())
        return kept

    # -- into the database ---------------------------------------------------------------------------------------------

    def _send(self) -> None:
        pause = 0.0
        while True:
            self._wake.wait(pause or None)
            self._wake.clear()
            last = self._closing  # what was owed when it was set is taken below
            try:
                while self._post_some():
                    pass
                pause, self._away = 0.0, False
            except Exception as error:  # whatever it is, what is owed stays owed
                if not self._away:
                    _log.warning("the ledger keeps what it owes until its database answers: %s", error)
                self._away, self._asked = isinstance(error, SQLAlchemyError | ResourceError), 0.0
                pause = min(5.0, pause * 2 or 0.2)
                if not last:
                    time.sleep(pause)
            if last:
                return

    def _post_some(self) -> bool:
        owed = self.outbox.take(_MOST)
        if not owed:
            return False
        self._asked = time.monotonic()
        self._post(self.server, owed)
        self._asked = 0.0
        self.outbox.told(owed)
        for each in owed:
            if each.state != "open":
                self._ended.pop(each.entry.request, None)
        return True

    def _post(self, server: str, owed: list[OwedEntry]) -> int:
        """All in one transaction; where one of them cannot be posted, the others without it."""
        try:
            with write_transaction(self.store.engine) as c:
                return post(c, server, owed, self.wall())
        except Exception as error:
            if is_outage(error):  # away, or locked: all of them stay owed
                raise
            if len(owed) == 1:
                _log.error("the database refuses a request, which is in this log alone: %s: %s", owed[0], error)
                return 0
            return sum(self._post(server, [each]) for each in owed)

    def flush(self, seconds: float = 10.0) -> bool:
        """Wait until the database has all that was recorded. Returns whether it has."""
        deadline = time.monotonic() + seconds
        self.outbox.flush(seconds)
        while self.outbox.take(1):
            if time.monotonic() > deadline:
                return False
            self._wake.set()
            time.sleep(0.005)
        return True

    def state(self) -> LedgerState:
        """How far the database is behind, for metrics. Does not block."""
        oldest = next(iter(self._ended.copy().values()), None)
        lag = 0.0 if oldest is None else max(0.0, self.wall() - oldest)
        late = self._asked != 0.0 and time.monotonic() - self._asked > _LATE_SECONDS
        return LedgerState(self.outbox.owed, lag, self._away or late)

    # -- what the dead left --------------------------------------------------------------------------------------------

    def recover(self) -> dict[str, int]:
        """Settle what dead servers left: {"done": as their outboxes say, "interrupted": the rest}."""
        counts = {"done": 0, "interrupted": 0}
        for path in outboxes(self.folder):
            if path != self.outbox.path:
                self._recover_outbox(path, counts)
        seen = select(server_table.c.server).where(
            server_table.c.seen > database_clock(self.store.engine) - _GONE_SECONDS
        )
        with reading(self.store.engine) as c:
            gone = list(
                c.scalars(
                    select(line_table.c.server)
                    .where(
                        line_table.c.state == "open",
                        line_table.c.server != self.server,
                        line_table.c.server.not_in(seen),
                    )
                    .distinct()
                )
            )
        for server in gone:
            counts["interrupted"] += self._interrupt_all(server)
        return counts

    def _recover_outbox(self, path: Path, counts: dict[str, int]) -> None:
        try:
            with left_behind(path) as found:
                for owed in found:
                    ended = [each if each.state != "open" else self._interrupted(each.entry) for each in owed]
                    counts["done"] += self._post(path.stem, ended)
                    counts["interrupted"] += sum(each.state == "interrupted" for each in ended)
        except (BlockingIOError, FileNotFoundError):
            return  # its process lives, or another has just settled it
        except sqlite3.DatabaseError as error:
            _log.error("%s cannot be read: %s; its requests that are open are interrupted", path, error)
            path.replace(path.with_suffix(".damaged"))
        counts["interrupted"] += self._interrupt_all(path.stem)

    def _interrupt_all(self, server: str) -> int:
        with write_transaction(self.store.engine) as c:
            owed = [self._interrupted(entry) for entry in _open_entries(c, server)]
            post(c, server, owed, self.wall())
            c.execute(delete(server_table).where(server_table.c.server == server))
        return len(owed)

    def _interrupted(self, entry: LedgerEntry) -> OwedEntry:
        return OwedEntry(entry, "interrupted", self.wall())

    # -- upkeep --------------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Say that this server runs; to be called more often than every ten minutes."""
        with write_transaction(self.store.engine) as c:
            c.execute(delete(server_table).where(server_table.c.server == self.server))
            c.execute(
                insert(server_table),
                {"server": self.server, "seen": c.scalar(select(database_clock(self.store.engine)))},
            )

    def prune(self, days: float, most: int = 10_000) -> int:
        """Delete lines that are older, and slots that no window needs; sums stay. Returns how many lines went."""
        before, gone = self.wall() - days * 86400, 0
        old = (line_table.c.opened < before) & (line_table.c.state != "open")
        while True:
            with write_transaction(self.store.engine) as c:
                last = c.scalar(
                    select(line_table.c.opened).where(old).order_by(line_table.c.opened).offset(most).limit(1)
                )
                here = old if last is None else old & (line_table.c.opened <= last)
                gone += c.execute(delete(line_table).where(here)).rowcount
                for width, window in _SLOT_WIDTHS.items():
                    late = int((self.wall() - window) // width) - 1
                    c.execute(delete(slot_table).where(slot_table.c.width == width, slot_table.c.slot < late))
            if last is None:
                return gone

    def seen_elsewhere(
        self, window: float, adapters: Iterable[str] | None = None
    ) -> list[tuple[str, str, float, int, int]]:
        """What other servers, and this one's earlier runs, admitted in the last `window` seconds, in sixty slots:
        (tenant, adapter or "" for whole requests, seconds ago, requests, tokens). `adapters`: of these alone."""
        now, s = self.wall(), slot_table.c
        (width,) = (w for w, seconds in _SLOT_WIDTHS.items() if seconds == window)
        query = (
            select(s.tenant, s.adapter, s.slot, func.sum(s.requests).label("n"), func.sum(s.tokens).label("tokens"))
            .where(s.width == width, s.slot >= int((now - window) // width), s.server != self.server)
            .group_by(s.tenant, s.adapter, s.slot)
        )
        if adapters is not None:
            query = query.where(s.adapter.in_(sorted(adapters)))
        with reading(self.store.engine) as c:
            # A slot is as young as its youngest: it counts a little longer, never shorter.
            return [
                (r.tenant, r.adapter, max(0.0, now - (r.slot + 1) * width), int(r.n), int(r.tokens))
                for r in c.execute(query)
            ]

    def close(self) -> None:
        """Post what has come; what is still open is interrupted. What cannot be posted waits for the next start."""
        self.outbox.flush()
        self.outbox.end_all(end_text("interrupted", self.wall(), Usage(0, 0, 0)))
        self.writer.close()
        self._closing = True
        self._wake.set()
        self._sender.join(15)
        if self._sender.is_alive() or not self._leave():
            _log.error("%d requests wait in the outbox for the next start", self.outbox.owed)
        self.outbox.close()

    def _leave(self) -> bool:
        try:
            with write_transaction(self.store.engine) as c:
                c.execute(delete(server_table).where(server_table.c.server == self.server))
        except (SQLAlchemyError, ResourceError):
            return False
        return not self.outbox.take(1)


# -- what was used -----------------------------------------------------------------------------------------------------


BY = ("tenant", "adapter", "day")
_SUMMED = (
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
            raise ConfigError(f"usage cannot be grouped by {name!r}", where="by", fix=fix)
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
                    raise ConfigError(f"{value!r} is not a date", where=name, fix="as in 2026-11-25, in UTC")
                query = query.where(t.day >= value if name == "since" else t.day <= value)
        for row in c.execute(query):
            kind = found.setdefault(tuple(row[: len(by)]), dict.fromkeys(_SUMMED, 0))
            for name, value in zip(columns, row[len(by) :], strict=True):
                kind[name] += float(value or 0) if name in _SECONDS else int(value or 0)

    # PostgreSQL sums bigint as numeric, exactly; SQLite as 64-bit integers, or it raises.
    summed = {name: func.sum(sum_table.c[name]) for name in _SUMMED if name not in ("requests", "open")}
    ask(sum_table, summed, sum_table.c.adapter != ALL if apart else sum_table.c.adapter == ALL)
    ask(line_table, {"open": func.count()}, line_table.c.state == "open", *(() if apart else (line_table.c.part == 0,)))
    out = []
    for key in sorted(found) if by or found else [()]:
        figures = found.get(key) or dict.fromkeys(_SUMMED, 0)
        figures["requests"] = figures["done"] + figures["interrupted"] + figures["open"]
        figures |= {name: float(figures[name]) for name in _SECONDS}
        out.append({**dict(zip(by, key, strict=True)), **figures})
    return out


def as_csv(rows: Sequence[dict[str, Any]], by: Sequence[str] = BY) -> str:
    """Rows of `usage` as CSV with a header. Names that a spreadsheet would take for a formula are quoted."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*by, *_SUMMED], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: f"'{v}" if isinstance(v, str) and v[:1] in ("=", "+", "-", "@") else v for k, v in row.items()}
        )
    return text.getvalue()
