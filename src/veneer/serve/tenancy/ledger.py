"""The ledger: one row for each request that was admitted, settled once.

    admitted      a row `open`, in the database before the request is served
    used          a note in the journal before `used` returns, so before the last word goes to the client;
                  then the row is `done`, with its tokens, times and cost
    died          whoever starts next reads the journals of the dead (their rows are `done`), and what is then still
                  open is `interrupted`: no tokens, no cost, only what was asked for

What "exactly once" means: a row is known by (server, request), where a server is one run of one process. Opening it
twice is refused. Settling sets figures, never adds any, and a row that is done stays as it is: notes may be read any
number of times. So a request whose last word went out is in the ledger with what it took, and none is there twice. A
server that another took for dead (its link to PostgreSQL was cut) still has the last word on its own rows: done
replaces interrupted. With a journal on a disk that is gone, requests that had ended in the last moments before a kill,
and were not yet in the database, are interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Integer, case, cast, func, select, text, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from veneer.library.database import reading, writing
from veneer.serve.request import Refused, Usage
from veneer.serve.tenancy.journal import Journal, left_behind, lock_file
from veneer.serve.tenancy.store import Price, Store, ledger
from veneer.serve.tenancy.writer import Writer

__all__ = ["Entry", "Ledger"]

_log = logging.getLogger("veneer.serve.tenancy")


@dataclass(frozen=True)
class Entry:
    """What is known of a request when it is admitted."""

    request: str
    tenant: str
    name: str
    adapter: str
    opened: float
    asked_prompt: int
    asked_completion: int
    price: Price


class Ledger:
    """The ledger of one run of one process. Thread-safe."""

    def __init__(self, store: Store, folder: Path, wall: Callable[[], float]) -> None:
        """`folder`: where journals are, on a disk of this machine. Settles what the dead left there."""
        self.store, self.wall = store, wall
        self.server = secrets.token_hex(8)
        self._folder = folder
        self._presence = contextlib.ExitStack()
        if (
            store.engine.dialect.name == "postgresql"
        ):  # a lock that falls with the process; beside SQLite, the journal's
            c = self._presence.enter_context(store.engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
            c.execute(text(f"SELECT pg_advisory_lock({_number(self.server)})"))
        self.recovered = self.recover()
        self.journal = Journal(folder, self.server)
        self.writer = Writer(store.engine)

    def open(self, entry: Entry) -> Future[None]:
        """The row; the future's result comes when it is in the database. Its exception is Refused where this server
        had a request of that id before."""
        row = {
            **{k: v for k, v in asdict(entry).items() if k != "price"},
            **{f"price_{k}": v for k, v in asdict(entry.price).items()},
            "server": self.server,
            "day": datetime.fromtimestamp(entry.opened, UTC).strftime("%Y-%m-%d"),
            "state": "open",
            "cost": 0,
            **dict.fromkeys(("prompt", "cached", "completion"), 0),
            **dict.fromkeys(("queued", "prefill", "decode"), 0.0),
        }

        def write(c: Connection) -> None:
            make = postgresql_insert if c.dialect.name == "postgresql" else sqlite_insert
            if c.scalar(make(ledger).on_conflict_do_nothing().returning(ledger.c.request), row) is None:
                raise Refused(
                    f"there was a request {entry.request} before", status=400, code="invalid_request",
                    fix="an id of its own for each request",
                )  # fmt: skip

        return self.writer.put(write, patient=False)

    def settle(self, request: str, usage: Usage, price: Price) -> Future[None]:
        """When this returns, the usage outlives a SIGKILL; the future's result comes when it is in the database."""
        line = {"request": request, "closed": self.wall(), "usage": asdict(usage), "price": asdict(price)}
        try:
            part = self.journal.write(line)
        except OSError:  # a full disk, say: the database has its own
            _log.exception("no note of request %s; its row will be done with the next commit", request)
            part = 0

        def write(c: Connection) -> None:
            _settle(c, self.server, [line])

        done = self.writer.put(write)
        done.add_done_callback(lambda future: None if future.exception() else self.journal.settled(part))
        return done

    def interrupt(self, request: str) -> Future[None]:
        """The request ended, and nobody said what it took."""
        closed = self.wall()

        def write(c: Connection) -> None:
            _interrupt(c, self.server, closed, request)

        return self.writer.put(write)

    def recover(self) -> dict[str, int]:
        """Settle what dead servers left: {"done": from their journals, "interrupted": the rest}."""
        counts = {"done": 0, "interrupted": 0}
        for server, lines in left_behind(self._folder):
            with writing(self.store.engine) as c:
                counts["done"] += _settle(c, server, lines)
                counts["interrupted"] += _interrupt(c, server, self.wall())
        with reading(self.store.engine) as c:
            query = select(ledger.c.server).where(ledger.c.state == "open", ledger.c.server != self.server).distinct()
            servers = list(c.scalars(query))
        for server in servers:
            with writing(self.store.engine) as c:
                if self._dead(c, server):
                    counts["interrupted"] += _interrupt(c, server, self.wall())
        return counts

    def _dead(self, c: Connection, server: str) -> bool:
        """PostgreSQL knows who is there, on any machine. Beside a SQLite file all are on this one, and whoever died has
        just lost its lock file in `left_behind`."""
        if c.dialect.name == "postgresql":
            return bool(c.scalar(text(f"SELECT pg_try_advisory_xact_lock({_number(server)})")))
        return not lock_file(self._folder, server).exists()

    def seen_elsewhere(self, window: float) -> list[tuple[str, str, float, int, int]]:
        """What other servers, and this one's earlier runs, admitted in the last `window` seconds:
        (tenant, adapter, seconds ago, requests, tokens), in sixty slots."""
        now, width, t = self.wall(), window / 60, ledger.c
        floor = func.floor if self.store.engine.dialect.name == "postgresql" else lambda x: cast(x, Integer)
        slot = floor(t.opened / width)
        tokens = case((t.state == "done", t.prompt + t.completion), (t.state == "open", _ASKED), else_=0)
        query = (
            select(t.tenant, t.adapter, slot.label("slot"), func.count().label("n"), func.sum(tokens).label("tokens"))
            .where(t.opened > now - window - width, t.server != self.server)
            .group_by(t.tenant, t.adapter, slot)
        )
        with reading(self.store.engine) as c:
            # A slot is as young as its youngest: it counts a little longer, never shorter.
            return [
                (r.tenant, r.adapter, max(0.0, now - (float(r.slot) + 1) * width), int(r.n), int(r.tokens))
                for r in c.execute(query)
            ]

    def close(self) -> None:
        """Write what has come; what is still open is interrupted."""

        def end(c: Connection) -> None:
            _interrupt(c, self.server, self.wall())

        self.writer.put(end)
        complete = self.writer.close()
        self.journal.close(keep=not complete)
        self._presence.close()


_ASKED = ledger.c.asked_prompt + ledger.c.asked_completion


def _settle(c: Connection, server: str, lines: Iterable[dict[str, Any]]) -> int:
    """Rows become done; those that are done stay as they are. Returns how many became so."""
    changed = 0
    for line in lines:
        usage = line["usage"]
        row = {**usage, "closed": line["closed"]}
        row["cost"] = Price(**line["price"]).cost(usage["prompt"], usage["cached"], usage["completion"])
        here = (ledger.c.server == server) & (ledger.c.request == line["request"]) & (ledger.c.state != "done")
        changed += c.execute(update(ledger).where(here).values(state="done", **row)).rowcount
    return changed


def _interrupt(c: Connection, server: str, closed: float, request: str | None = None) -> int:
    here = (ledger.c.server == server) & (ledger.c.state == "open")
    if request is not None:
        here &= ledger.c.request == request
    return c.execute(update(ledger).where(here).values(state="interrupted", closed=closed)).rowcount


def _number(server: str) -> int:
    """A server as the key of an advisory lock."""
    return int.from_bytes(bytes.fromhex(server), "big", signed=True)
