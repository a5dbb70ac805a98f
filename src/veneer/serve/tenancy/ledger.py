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
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, delete, func, insert, literal_column, select
from sqlalchemy.exc import SQLAlchemyError

from veneer.errors import ResourceError
from veneer.library.database import reading, write_transaction
from veneer.serve.access import LedgerState
from veneer.serve.outage import is_outage
from veneer.serve.request import Refused, Usage
from veneer.serve.tenancy.entries import Entry, Line, Owed, State, end_text
from veneer.serve.tenancy.old_journals import settle_old_journals
from veneer.serve.tenancy.outbox import Outbox, left_behind, outboxes
from veneer.serve.tenancy.posting import SLOT_WIDTHS, open_entries, post
from veneer.serve.tenancy.store import Store
from veneer.serve.tenancy.tables import lines, servers, slots
from veneer.serve.tenancy.writer import Writer

__all__ = ["Entry", "Ledger", "Line"]

_MOST = 1000  # requests in one transaction
_GONE_SECONDS = 600.0
_LATE_SECONDS = 2.0
_log = logging.getLogger("veneer.serve.tenancy")


class Ledger:
    """The ledger of one run of one process. Thread-safe."""

    def __init__(
        self, store: Store, folder: Path, wall: Callable[[], float], *, synced: bool = False, room: int = 32 << 20
    ) -> None:
        """`folder`: where outboxes are, on a disk of this machine. `synced`, `room`: see `Outbox`. Settles what the
        dead left there. Raises ResourceError where the disk is full."""
        self.store, self.wall = store, wall
        self.server = secrets.token_hex(8)
        self._folder = folder
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

    def open(self, entry: Entry) -> Future[None]:
        """The future's result comes when the outbox has it. Its exception is Refused: 400 where a request of that id is
        there, 503 where no more can be kept."""
        opened: Future[None] = Future()

        def kept(future: Future[None]) -> None:
            error = future.exception()
            if error is None:
                self._wake.set()
                opened.set_result(None)
            elif isinstance(error, sqlite3.IntegrityError):
                opened.set_exception(
                    Refused(
                        f"there was a request {entry.request} before", status=400, code="invalid_request",
                        fix="an id of its own for each request",
                    )
                )  # fmt: skip
            else:
                self._refuse(error)
                opened.set_exception(
                    Refused("what requests take cannot be recorded now", status=503, code="overloaded", retry_after=5.0)
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
        """The request ended, and nobody said what it took."""
        return self._end(request, "interrupted", Usage(0, 0, 0))

    def _end(self, request: str, state: State, usage: Usage) -> Future[None]:
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

    def _post(self, server: str, owed: list[Owed]) -> int:
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
        """Wait until the database has whatever has come; whether it does."""
        deadline = time.monotonic() + seconds
        self.outbox.flush(seconds)
        while self.outbox.take(1):
            if time.monotonic() > deadline:
                return False
            self._wake.set()
            time.sleep(0.005)
        return True

    def state(self) -> LedgerState:
        """For metrics; waits for nothing."""
        oldest = next(iter(self._ended.copy().values()), None)
        lag = 0.0 if oldest is None else max(0.0, self.wall() - oldest)
        late = self._asked != 0.0 and time.monotonic() - self._asked > _LATE_SECONDS
        return LedgerState(self.outbox.owed, lag, self._away or late)

    # -- what the dead left --------------------------------------------------------------------------------------------

    def recover(self) -> dict[str, int]:
        """Settle what dead servers left: {"done": as their outboxes say, "interrupted": the rest}."""
        counts = {"done": 0, "interrupted": 0}
        for path in outboxes(self._folder):
            if path != self.outbox.path:
                self._recover_outbox(path, counts)
        for server, notes in settle_old_journals(self._folder):
            with write_transaction(self.store.engine) as c:
                entries = {entry.request: entry for entry in open_entries(c, server, notes)}
                owed = [Owed(entries[r], "done", closed, usage) for r, (closed, usage) in notes.items() if r in entries]
                counts["done"] += post(c, server, owed, self.wall())
            counts["interrupted"] += self._interrupt_all(server)
        seen = select(servers.c.server).where(servers.c.seen > _now(self.store) - _GONE_SECONDS)
        with reading(self.store.engine) as c:
            gone = list(
                c.scalars(
                    select(lines.c.server)
                    .where(lines.c.state == "open", lines.c.server != self.server, lines.c.server.not_in(seen))
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
            owed = [self._interrupted(entry) for entry in open_entries(c, server)]
            post(c, server, owed, self.wall())
            c.execute(delete(servers).where(servers.c.server == server))
        return len(owed)

    def _interrupted(self, entry: Entry) -> Owed:
        return Owed(entry, "interrupted", self.wall())

    # -- upkeep --------------------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """This server is there. To be called more often than every ten minutes."""
        with write_transaction(self.store.engine) as c:
            c.execute(delete(servers).where(servers.c.server == self.server))
            c.execute(insert(servers), {"server": self.server, "seen": c.scalar(select(_now(self.store)))})

    def prune(self, days: float, most: int = 10_000) -> int:
        """Delete lines that are older, and slots that no window needs; sums stay. Returns how many lines went."""
        before, gone = self.wall() - days * 86400, 0
        old = (lines.c.opened < before) & (lines.c.state != "open")
        while True:
            with write_transaction(self.store.engine) as c:
                last = c.scalar(select(lines.c.opened).where(old).order_by(lines.c.opened).offset(most).limit(1))
                here = old if last is None else old & (lines.c.opened <= last)
                gone += c.execute(delete(lines).where(here)).rowcount
                for width, window in SLOT_WIDTHS.items():
                    late = int((self.wall() - window) // width) - 1
                    c.execute(delete(slots).where(slots.c.width == width, slots.c.slot < late))
            if last is None:
                return gone

    def seen_elsewhere(
        self, window: float, adapters: Iterable[str] | None = None
    ) -> list[tuple[str, str, float, int, int]]:
        """What other servers, and this one's earlier runs, admitted in the last `window` seconds, in sixty slots:
        (tenant, adapter or "" for whole requests, seconds ago, requests, tokens). `adapters`: of these alone."""
        now, s = self.wall(), slots.c
        (width,) = (w for w, seconds in SLOT_WIDTHS.items() if seconds == window)
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
                c.execute(delete(servers).where(servers.c.server == self.server))
        except (SQLAlchemyError, ResourceError):
            return False
        return not self.outbox.take(1)


def _now(store: Store) -> ColumnElement[float]:
    """Seconds since 1970 by the database's clock."""
    if store.engine.dialect.name == "postgresql":
        return literal_column("EXTRACT(EPOCH FROM clock_timestamp())::float")
    return literal_column("(julianday('now') - 2440587.5) * 86400.0")
