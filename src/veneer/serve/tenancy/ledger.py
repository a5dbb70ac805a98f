"""The ledger: one line for each part of each admitted request, settled only once.

The admission and the end of each request are written to a journal on the local disk, and a thread posts both
from the journal to the database. A request runs only after its admission is in the journal, and its last
event is sent only after its usage is in the journal. So a killed process loses no usage. While the database
is unavailable, locked or on a full disk, requests continue until the journal is full; then no more requests
are admitted.

"Exactly once": a request is identified by (server, request), and a server is one run of one process. Posting
sets the state of a request, so posting a request twice has the same result as posting it once. States go from
open to interrupted to done, and never back. The next server that uses the same folder settles the requests of
a dead server with the usage in its journal. Requests whose end is not in the journal become `interrupted` (no
tokens, no cost). If the folder is lost as well, the dead server's open requests become interrupted after ten
minutes; if that server comes back, its usage still counts.

The same transaction adds each change to the daily sums, and to the slots of the last minute and day. The sums
are never recounted from the lines, so their cost does not grow with the number of lines. `usage` reports
usage by tenant, adapter and day, in figures that add up exactly.
"""

from __future__ import annotations

import csv
import io
import logging
import re
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, bindparam, delete, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import SQLAlchemyError

from veneer.errors import ConfigError, ResourceError, one_of
from veneer.library.database import database_clock, reading, write_transaction
from veneer.library.names import name_of
from veneer.serve.access import LedgerState
from veneer.serve.request import Refused, Usage, invalid
from veneer.serve.tenancy import store as db
from veneer.serve.tenancy.entry import LedgerEntry, LedgerLine, OwedEntry, day_of
from veneer.serve.tenancy.journal import Journal, Sender, Writer, dead_journal
from veneer.serve.tenancy.store import ALL, Price, Store
from veneer.serve.transient import is_transient

_log = logging.getLogger("veneer.serve.tenancy")

# -- posting -----------------------------------------------------------------------------------------------------------


_SLOT_WIDTHS = {1: 60.0, 1440: 86400.0}
"""Seconds of a slot -> seconds of the slot's window. A window has 60 slots."""
_FIGURES = ("prompt", "cached", "completion", "queued", "prefill", "decode")
_Deltas = dict[tuple[Any, ...], list[Any]]
_LINE, _SERVER = db.line_table.c, db.server_table.c


def post(c: Connection, server: str, owed: Sequence[OwedEntry], now: float) -> None:
    """Write requests and their states in a transaction."""
    if c.dialect.name == "postgresql":  # one writer per server; SQLite locks the whole database anyway
        c.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": int(server, 16) - (1 << 63)})
    states: dict[str, str] = {}
    first_parts = select(_LINE.request, _LINE.state).where(_LINE.server == server, _LINE.part == 0)
    requests = [each.entry.request for each in owed]
    for i in range(0, len(requests), 500):
        states |= {r.request: r.state for r in c.execute(first_parts.where(_LINE.request.in_(requests[i : i + 500])))}
    fresh: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    by_day: _Deltas = defaultdict(lambda: [0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0])
    by_slot: _Deltas = defaultdict(lambda: [0, 0])
    for each in owed:
        previous_state = states.get(each.entry.request)
        if previous_state in ("done", each.state) or (previous_state is not None and each.state == "open"):
            continue
        states[each.entry.request] = each.state
        (fresh if previous_state is None else changed).extend(_rows(server, each))
        _count_day(by_day, each, previous_state)
        _count_slots(by_slot, server, each, previous_state, now)
    if fresh:
        c.execute(insert(db.line_table), fresh)
    if changed:
        c.execute(_CHANGE, [{f"_{name}": row[name] for name in (*_KEY, *_CHANGING)} for row in changed])
    _add_figures(c, db.sum_table, by_day)
    _add_figures(c, db.slot_table, by_slot)


def _open_entries(c: Connection, server: str) -> list[LedgerEntry]:
    """Return a server's requests that are open in the database."""
    open_lines = select(db.line_table).where(_LINE.server == server, _LINE.state == "open")
    rows = c.execute(open_lines.order_by(_LINE.request, _LINE.part)).all()
    entries = []
    for request, parts in groupby(rows, key=lambda row: row.request):
        lines = []
        for r in parts:
            price = Price(r.price_prompt, r.price_cached, r.price_completion)
            lines.append(LedgerLine(r.digest, r.adapter, r.strength, price))
        shared = (r.tenant, r.name, r.opened, r.asked_prompt, r.asked_completion)
        entries.append(LedgerEntry(request, *shared, tuple(lines)))
    return entries


def _add_figures(c: Connection, table: Table, deltas: Mapping[tuple[Any, ...], Sequence[Any]]) -> None:
    """Add `deltas` (key -> figures) to the rows of a table.

    Rows are written in key order, so that writers cannot deadlock.
    """
    if not deltas:
        return
    keys = [column.name for column in table.primary_key]
    figures = [column.name for column in table.columns if column.name not in keys]
    statement = (postgresql_insert if c.dialect.name == "postgresql" else sqlite_insert)(table)
    totals = {name: table.c[name] + statement.excluded[name] for name in figures}
    statement = statement.on_conflict_do_update(index_elements=keys, set_=totals)
    rows = [dict(zip((*keys, *figures), (*key, *deltas[key]), strict=True)) for key in sorted(deltas)]
    c.execute(statement, rows)


_KEY = ("server", "request", "part")
_CHANGING = ("state", "closed", *_FIGURES, "cost")
_CHANGE = (
    update(db.line_table)
    .where(*(db.line_table.c[name] == bindparam(f"_{name}") for name in _KEY))
    .values({name: bindparam(f"_{name}") for name in _CHANGING})
)


def _rows(server: str, owed: OwedEntry) -> list[dict[str, Any]]:
    entry = owed.entry
    shared_columns = {name: value for name, value in vars(entry).items() if name != "lines"}
    shared_columns |= {"server": server, "closed": owed.closed, "day": day_of(entry.opened), "state": owed.state}
    shared_columns |= {name: getattr(owed.usage, name) for name in _FIGURES}
    return [
        shared_columns
        | {"part": part, "digest": line.digest, "adapter": line.adapter, "strength": line.strength, "cost": cost}
        | {f"price_{name}": getattr(line.price, name) for name in ("prompt", "cached", "completion")}
        for part, (line, cost) in enumerate(zip(entry.lines, owed.costs(), strict=True))
    ]


def _count_day(by_day: _Deltas, owed: OwedEntry, previous_state: str | None) -> None:
    """Add a request to the daily sums, in total and for each of its adapters."""
    if owed.state == "open":
        return
    changes = [int(owed.state == "done"), int(owed.state == "interrupted") - int(previous_state == "interrupted")]
    changes += [getattr(owed.usage, name) for name in _FIGURES]
    costs: Counter[str] = Counter()
    for line, cost in zip(owed.entry.lines, owed.costs(), strict=True):
        costs[ALL] += cost
        costs[line.adapter] += cost
    for adapter, cost in costs.items():
        key = (day_of(owed.entry.opened), owed.entry.tenant, adapter)
        by_day[key] = [total + change for total, change in zip(by_day[key], [*changes, cost], strict=True)]


def _count_slots(by_slot: _Deltas, server: str, owed: OwedEntry, previous_state: str | None, now: float) -> None:
    """Add a request to the slots, in total and for each of its adapter names."""
    entry = owed.entry
    tokens = owed.tokens() - (OwedEntry(entry).tokens() if previous_state == "open" else 0)
    for width, window in _SLOT_WIDTHS.items():
        if entry.opened > now - window - width:
            for adapter in {ALL, *(name_of(line.adapter) for line in entry.lines)}:
                row = by_slot[(width, int(entry.opened // width), server, entry.tenant, adapter)]
                row[0] += previous_state is None
                row[1] += tokens


# -- the ledger --------------------------------------------------------------------------------------------------------


_BATCH = 1000
"""Maximum requests in one transaction."""
_GONE_SECONDS = 600.0
_LATE_SECONDS = 2.0
_PAD = 300
"""Maximum bytes by which the end's line is longer than the admission's line."""


class Ledger:
    """The ledger of one run of one process. Thread-safe."""

    def __init__(
        self, store: Store, folder: Path, wall: Callable[[], float], *, synced: bool = False, room: int = 32 << 20
    ) -> None:
        """Open the ledger, and settle the requests of dead servers in `folder`.

        `folder`: folder for journals, on a local disk. `room`: size of this server's journal in bytes.
        `synced`: whether usage also survives a power loss. Raises ResourceError if the disk is full.
        """
        self.store, self.wall, self.folder = store, wall, folder
        self.server = secrets.token_hex(8)
        self.journal = Journal(folder, self.server, room, synced=synced)
        self._open: dict[str, LedgerEntry] = {}  # running requests
        self._ended: dict[str, float] = {}  # request -> end time, until the database has the end; oldest first
        self._sending_since, self._logged = 0.0, -10.0
        try:
            self.beat()
            self.recover()
        except BaseException:
            self.journal.close()
            raise
        self.writer: Writer[Connection] = Writer(lambda: write_transaction(store.engine), "veneer-ledger")
        """A writer for other tables of the same database."""
        self._sender = Sender(self._send)

    def open(self, entry: LedgerEntry) -> Future[None]:
        """Record an admission; the future completes when the admission is written.

        The future's error is Refused: 400 if a request with the same id is running, 503 if the journal cannot
        record the admission.
        """
        opened: Future[None] = Future()
        if entry.request in self._open:
            message = f"the id {entry.request} is used by a running request"
            opened.set_exception(invalid(message, fix="a new id for each request"))
            return opened

        def written(future: Future[None]) -> None:
            if error := future.exception():
                self._log_refusal(error)
                self._open.pop(entry.request, None)
                message = "usage cannot be recorded at the moment"
                opened.set_exception(Refused(message, status=503, code="overloaded", retry_after=5.0))
            else:
                self._sender.wake()
                opened.set_result(None)

        self._open[entry.request] = entry
        line = OwedEntry(entry).to_line()
        self.journal.add(entry.request, line, len(line) + _PAD).add_done_callback(written)
        return opened

    def _log_refusal(self, error: BaseException) -> None:
        """Log that requests are rejected, at most once in ten seconds."""
        if time.monotonic() - self._logged > 10.0:
            self._logged = time.monotonic()
            pending = self.state().pending
            _log.error("requests are refused because the ledger cannot record them: %s (%d pending)", error, pending)

    def settle(self, request: str, usage: Usage | None) -> Future[None]:
        """Record a request's usage; None for a request that was interrupted, which ends without a bill.

        The future completes once the usage would survive the process, and never fails.
        """
        recorded: Future[None] = Future()
        entry = self._open.pop(request, None)
        if entry is None:  # only the first end counts
            recorded.set_result(None)
            return recorded
        owed = self._interrupted(entry) if usage is None else OwedEntry(entry, "done", self.wall(), usage)
        line = owed.to_line()
        self._ended[request] = self.wall()

        def written(future: Future[None]) -> None:
            if error := future.exception():
                self._ended.pop(request, None)
                _log.error("the end of a request is recorded only in this log: %s: %s", error, line.decode())
            self._sender.wake()
            recorded.set_result(None)

        self.journal.add(request, line).add_done_callback(written)
        return recorded

    # -- into the database ---------------------------------------------------------------------------------------------

    def _send(self) -> bool:
        """Post a batch of the journal's lines; return False if there were none."""
        owed = [OwedEntry.from_line(line) for line in self.journal.lines[:_BATCH]]
        if not owed:
            return False
        self._sending_since = time.monotonic()
        self._post(self.server, owed)
        self._sending_since = 0.0
        self.journal.remove(len(owed))
        for each in owed:
            if each.state != "open":
                self._ended.pop(each.entry.request, None)
        return True

    def _post(self, server: str, owed: Sequence[OwedEntry]) -> None:
        """Post a server's requests. A request that the database rejects is only logged."""
        try:
            with write_transaction(self.store.engine) as c:
                post(c, server, owed, self.wall())
        except Exception as error:
            if is_transient(error):
                raise
            if len(owed) == 1:
                lost = "the database refuses a request, which is recorded only in this log: %s: %s"
                _log.error(lost, owed[0], error)
                return
            for each in owed:
                self._post(server, [each])

    def flush(self, seconds: float = 10.0) -> bool:
        """Wait until the database has all recorded entries; return False on a timeout."""
        deadline = time.monotonic() + seconds
        self.journal.writer.flush(seconds)
        while self.journal.lines:
            if time.monotonic() > deadline:
                return False
            self._sender.wake()
            time.sleep(0.005)
        return True

    def state(self) -> LedgerState:
        """Return how far the database is behind, for metrics. Does not block."""
        late = self._sending_since != 0.0 and time.monotonic() - self._sending_since > _LATE_SECONDS
        now = self.wall()
        lag = max(0.0, now - next(iter(self._ended.copy().values()), now))
        return LedgerState(len(self._ended), lag, self._sender.away or late)

    # -- recovery of dead servers --------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Settle the requests of dead servers: as their journals say, all others as interrupted."""
        for path in sorted(self.folder.glob("[0-9a-f]" * 16 + ".journal")):
            if path != self.journal.path:
                with suppress(BlockingIOError, FileNotFoundError), dead_journal(path) as lines:
                    self._recover_lines(path.stem, lines)
                    self._interrupt_all(path.stem)
        alive = select(_SERVER.server).where(_SERVER.seen > database_clock(self.store.engine) - _GONE_SECONDS)
        dead = select(_LINE.server).where(
            _LINE.state == "open", _LINE.server != self.server, _LINE.server.not_in(alive)
        )
        with reading(self.store.engine) as c:
            servers = list(c.scalars(dead.distinct()))
        for server in servers:
            self._interrupt_all(server)

    def _recover_lines(self, server: str, lines: Sequence[bytes]) -> None:
        last: dict[str, OwedEntry] = {}
        for line in lines:
            try:
                owed = OwedEntry.from_line(line)
            except (ValueError, LookupError, TypeError):
                _log.warning("the journal of %s has a line that was not completely written", server)
                continue
            if owed.state != "open":
                last[owed.entry.request] = owed
            else:
                last.setdefault(owed.entry.request, self._interrupted(owed.entry))
        ended = list(last.values())
        for i in range(0, len(ended), _BATCH):
            self._post(server, ended[i : i + _BATCH])

    def _interrupt_all(self, server: str) -> None:
        with write_transaction(self.store.engine) as c:
            post(c, server, [self._interrupted(entry) for entry in _open_entries(c, server)], self.wall())
            c.execute(delete(db.server_table).where(_SERVER.server == server))

    def _interrupted(self, entry: LedgerEntry) -> OwedEntry:
        return OwedEntry(entry, "interrupted", self.wall())

    # -- maintenance ---------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """Record that this server is alive.

        Without a call for ten minutes, other servers settle this server's requests.
        """
        with write_transaction(self.store.engine) as c:
            c.execute(delete(db.server_table).where(_SERVER.server == self.server))
            seen = c.scalar(select(database_clock(self.store.engine)))
            c.execute(insert(db.server_table), {"server": self.server, "seen": seen})

    def prune(self, days: float, most: int = 10_000) -> int:
        """Delete rows that are older than `days`, and slots that no window needs.

        Daily sums are kept. Returns the number of deleted rows.
        """
        cutoff, count, slot = self.wall() - days * 86400, 0, db.slot_table.c
        expired = (_LINE.opened < cutoff) & (_LINE.state != "open")
        beyond = select(_LINE.opened).where(expired).order_by(_LINE.opened).offset(most).limit(1)
        while True:
            with write_transaction(self.store.engine) as c:
                last = c.scalar(beyond)
                batch = expired if last is None else expired & (_LINE.opened <= last)
                count += c.execute(delete(db.line_table).where(batch)).rowcount
                for width, window in _SLOT_WIDTHS.items():
                    oldest = int((self.wall() - window) // width) - 1
                    c.execute(delete(db.slot_table).where(slot.width == width, slot.slot < oldest))
            if last is None:
                return count

    def usage_of_other_servers(
        self, window: float, adapters: Iterable[str] | None = None
    ) -> list[tuple[str, str, float, int, int]]:
        """Return other servers' usage in the last `window` seconds.

        The other servers include earlier runs of this server. Rows are (tenant, adapter or "" for whole
        requests, seconds ago, requests, tokens). `adapters`: return rows for these adapters only.
        """
        now, s = self.wall(), db.slot_table.c
        (width,) = (w for w, seconds in _SLOT_WIDTHS.items() if seconds == window)
        query = (
            select(s.tenant, s.adapter, s.slot, func.sum(s.requests).label("n"), func.sum(s.tokens).label("tokens"))
            .where(s.width == width, s.slot >= int((now - window) // width), s.server != self.server)
            .group_by(s.tenant, s.adapter, s.slot)
        )
        if adapters is not None:
            query = query.where(s.adapter.in_(sorted(adapters)))
        with reading(self.store.engine) as c:
            # A slot is as old as its newest possible entry, so an entry can count for slightly too long, but never
            # for too short a time.
            return [
                (r.tenant, r.adapter, max(0.0, now - (r.slot + 1) * width), int(r.n), int(r.tokens))
                for r in c.execute(query)
            ]

    def running_on_other_servers(self, seconds: float) -> list[tuple[str, str, int]]:
        """Return the running requests of other servers that were alive in the last `seconds`.

        Rows are (tenant, adapter or "" for whole requests, requests).
        """
        alive = select(_SERVER.server).where(_SERVER.seen > database_clock(self.store.engine) - seconds)
        key = (_LINE.tenant, _LINE.adapter, _LINE.part)
        query = select(*key, func.count().label("n")).where(_LINE.state == "open", _LINE.server.in_(alive))
        with reading(self.store.engine) as c:
            rows = c.execute(query.where(_LINE.server != self.server).group_by(*key)).all()
        whole = [(r.tenant, ALL, int(r.n)) for r in rows if r.part == 0]
        return whole + [(r.tenant, name_of(r.adapter), int(r.n)) for r in rows]

    def close(self) -> None:
        """Interrupt running requests, and send pending entries.

        Entries that cannot be sent now are sent after the next start.
        """
        for request in list(self._open):
            self.settle(request, None)
        self.writer.close()
        self.journal.writer.close()
        self._sender.close()
        if self.journal.lines:
            _log.error(
                "%d finished requests are not in the database yet; the next start records them", self.state().pending
            )
        else:
            with suppress(SQLAlchemyError, ResourceError), write_transaction(self.store.engine) as c:
                c.execute(delete(db.server_table).where(db.server_table.c.server == self.server))
        self.journal.close()


# -- usage reports -----------------------------------------------------------------------------------------------------


BY = ("tenant", "adapter", "day")
_SUMMED = ("requests", "done", "interrupted", "open", *_FIGURES, "cost")
"""The figures of a report.

`requests` is done + interrupted + open. Tokens, seconds and cost (in millionths) count done requests only. In
a report by adapter, a request counts for each adapter of its mix, with all of its tokens but only that
adapter's cost. So costs add up to the total, in whole millionths; the other figures add up only if no request
uses a mix.
"""
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
    """Return usage, with one row for each combination of the keys in `by`, sorted.

    If `by` is empty, returns one row with the totals. `since`, `until`: first and last UTC day of admission.
    """
    for name in by:
        one_of(name, BY, "a grouping of usage", "by")
    for where, day in (("since", since), ("until", until)):
        if day and not _DAY.fullmatch(day):
            raise ConfigError(f"{day!r} is not a date", where=where, fix="as in 2026-11-25, in UTC")
    apart = "adapter" in by or adapter is not None
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}

    def add_up(table: Table, columns: dict[str, Any], *also: Any) -> None:
        t = table.c
        keys = [t[name] for name in by]
        query = select(*keys, *columns.values()).where(*also).group_by(*keys)
        if tenant is not None:
            query = query.where(t.tenant == tenant)
        if adapter is not None:  # a name matches all its versions
            query = query.where((t.adapter == adapter) | t.adapter.startswith(f"{adapter}@", autoescape=True))
        if since:
            query = query.where(t.day >= since)
        if until:
            query = query.where(t.day <= until)
        for row in c.execute(query):
            figures = groups.setdefault(tuple(row[: len(by)]), dict.fromkeys(_SUMMED, 0))
            for name, value in zip(columns, row[len(by) :], strict=True):
                figures[name] += float(value or 0) if name in _SECONDS else int(value or 0)

    # Sums are exact: PostgreSQL adds bigint as numeric, and SQLite raises an error on 64-bit overflow.
    summed = {name: func.sum(db.sum_table.c[name]) for name in _SUMMED if name not in ("requests", "open")}
    of_adapter = db.sum_table.c.adapter != ALL
    add_up(db.sum_table, summed, of_adapter if apart else ~of_adapter)
    add_up(db.line_table, {"open": func.count()}, _LINE.state == "open", *(() if apart else (_LINE.part == 0,)))
    out = []
    for key in sorted(groups) if by or groups else [()]:
        figures = groups.get(key) or dict.fromkeys(_SUMMED, 0)
        figures["requests"] = figures["done"] + figures["interrupted"] + figures["open"]
        figures |= {name: float(figures[name]) for name in _SECONDS}
        out.append({**dict(zip(by, key, strict=True)), **figures})
    return out


def as_csv(rows: Sequence[dict[str, Any]], by: Sequence[str] = BY) -> str:
    """Return rows of `usage` as CSV with a header.

    Names that a spreadsheet would run as formulas are quoted."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*by, *_SUMMED], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        formulas = {k: f"'{v}" for k, v in row.items() if isinstance(v, str) and v[:1] in ("=", "+", "-", "@")}
        writer.writerow(row | formulas)
    return text.getvalue()
