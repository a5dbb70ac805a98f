"""What a server owes to the ledger, on a disk of its own machine: it outlives a kill, a full disk, and a ledger that is
away.

    FOLDER/SERVER.sqlite     a row for each request from its admission until the ledger's database has its end

An entry is a request as the ledger knows it: what was asked when it was admitted, a line for each part of its mix, and
how it ended. A part's price is its own, whatever stands beside it: each line has its adapter's price for all of the
request's tokens, and the request costs the sum of its lines.

SQLite keeps it (a write-ahead log, one file for one run of one process), and SQLite's own lock says whether that
process lives: it is held from the first statement to the last, and falls with the process at any death. What is
unlocked there was left behind; whoever starts next on the folder settles it.

Committed means in the system's hands: it outlives the process, killed in any way. `synced`: on the disk: it outlives a
loss of power too, for the time of one fsync a group of requests.

A full disk, and a database that is away for long: the file has its whole size from the start, its log has what a group
of requests needs, and neither grows. A row has the place that its end will need. So whatever happens to the disk, the
end of a request that was admitted can be written; where there is no room for one more, it is refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from veneer.errors import ResourceError
from veneer.files.rights import private_folder
from veneer.serve.outage import is_outage
from veneer.serve.request import Usage
from veneer.serve.tenancy.store import Price

_log = logging.getLogger("veneer.serve.tenancy")

# -- a request as the ledger knows it ----------------------------------------------------------------------------------


EntryState = Literal["open", "done", "interrupted"]
_NOTHING = Usage(0, 0, 0)


@dataclass(frozen=True)
class LedgerLine:
    """One part of a mix. `digest` "": the base. `adapter`: what the operator calls it."""

    digest: str
    adapter: str
    strength: float
    price: Price


@dataclass(frozen=True)
class LedgerEntry:
    """What is known of a request when it is admitted. `name`: the client's word for its mix."""

    request: str
    tenant: str
    name: str
    opened: float
    asked_prompt: int
    asked_completion: int
    lines: tuple[LedgerLine, ...]


@dataclass(frozen=True)
class OwedEntry:
    """A request and how far it came. `usage` counts where it is done."""

    entry: LedgerEntry
    state: EntryState = "open"
    closed: float | None = None
    usage: Usage = _NOTHING

    def costs(self) -> list[int]:
        """Of each line, in millionths; 0 unless it is done."""
        took = (self.usage.prompt, self.usage.cached, self.usage.completion)
        return [line.price.cost(*took) if self.state == "done" else 0 for line in self.entry.lines]

    def tokens(self) -> int:
        """What counts in a window of tokens."""
        if self.state == "open":
            return self.entry.asked_prompt + self.entry.asked_completion
        return self.usage.prompt + self.usage.completion


def day_of(opened: float) -> str:
    """The day of a time (seconds since 1970) in UTC, as 2026-11-25."""
    return datetime.fromtimestamp(opened, UTC).strftime("%Y-%m-%d")


def _entry_text(entry: LedgerEntry) -> str:
    return json.dumps(asdict(entry), ensure_ascii=False, separators=(",", ":"))


def _entry_of(text: str) -> LedgerEntry:
    found: dict[str, Any] = json.loads(text)
    lines = tuple(LedgerLine(**{**line, "price": Price(**line["price"])}) for line in found.pop("lines"))
    return LedgerEntry(**found, lines=lines)


def end_text(state: EntryState, closed: float, usage: Usage) -> str:
    return json.dumps([state, closed, *asdict(usage).values()], separators=(",", ":"))


def _owed_of(entry: LedgerEntry, end: str) -> OwedEntry:
    """The entry with its end. `end`: a text of `end_text`, blank while the request is open."""
    if not end.strip():
        return OwedEntry(entry)
    state, closed, *usage = json.loads(end)
    return OwedEntry(entry, state, closed, Usage(*usage))


# -- one thread that commits in groups ---------------------------------------------------------------------------------


_MOST = 1000  # jobs in one transaction

C = TypeVar("C")


_Job = tuple[Callable[[C], Any], "Future[Any]"]
"""What is called in a transaction, perhaps several times, of which one is committed; so it must be idempotent. And what
has its result after the commit, or the error that kept it from being committed."""


class Writer(Generic[C]):
    """Call `put` from any thread; jobs are committed in the order they came. `transaction`: gives what they write with,
    and commits at its end."""

    def __init__(self, transaction: Callable[[], AbstractContextManager[C]], name: str) -> None:
        self.transaction = transaction
        self._jobs: queue.SimpleQueue[_Job[C] | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, write: Callable[[C], Any]) -> Future[Any]:
        """The future's result, that of `write`, comes when the job is committed."""
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()  # from here on nobody can cancel it
        if self._closing:
            done.set_exception(ResourceError("the ledger is closed"))
        else:
            self._jobs.put((write, done))
        return done

    def close(self, seconds: float = 10.0) -> None:
        """Write what has come so far and stop."""
        self._closing = True
        self._jobs.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._commit([job, *self._more(_MOST - 1)])
        while not self._jobs.empty():  # came while it closed
            if (late := self._jobs.get()) is not None:
                late[1].set_exception(ResourceError("the ledger is closed"))

    def _more(self, most: int) -> list[_Job[C]]:
        """What else has come, in its order."""
        found: list[_Job[C]] = []
        while len(found) < most:
            try:
                more = self._jobs.get_nowait()
            except queue.Empty:
                break
            if more is None:
                self._jobs.put(None)  # the end comes again after this batch
                break
            found.append(more)
        return found

    def _commit(self, batch: list[_Job[C]]) -> None:
        """All of it in one transaction; where that cannot be, one by one, so that a job fails for itself alone."""
        try:
            with self.transaction() as c:
                results = [write(c) for write, _ in batch]
        except Exception as error:
            if len(batch) > 1 and not is_outage(error):
                for job in batch:
                    self._commit([job])
                return
            for _, done in batch:  # where the database is away, it is for all of them
                done.set_exception(error)
            return
        for (_, done), result in zip(batch, results, strict=True):
            done.set_result(result)


# -- the outbox --------------------------------------------------------------------------------------------------------


_TABLE = """CREATE TABLE owed (
    number INTEGER PRIMARY KEY,
    request TEXT NOT NULL UNIQUE,
    entry TEXT NOT NULL,
    ending TEXT NOT NULL,  -- blanks while the request is open, so many that its end takes no more room
    closed INTEGER NOT NULL,
    told INTEGER NOT NULL  -- whether the ledger knows that it was admitted
)"""
_END_CHARACTERS = 240
_LOG_BYTES = 8 << 20
_CHECKPOINT_PAGES = 256  # after which the log begins again
_SPARE_PAGES = 16  # for what SQLite may want where rows are deleted
_EMPTY_SECONDS = 3600.0
_SERVER = re.compile(r"[0-9a-f]{16}")


class NoRoom(Exception):
    """Raised for one request, and for it alone: the others of its group are written."""


class Outbox:
    """The outbox of this process. Thread-safe; nothing here waits for the ledger's database."""

    def __init__(self, folder: Path, server: str, *, synced: bool = False, room: int = 32 << 20) -> None:
        """`room`: bytes for what is owed, claimed at once; beyond that `open` fails. Raises ResourceError where the
        disk does not have them."""
        self.path = folder / f"{server}.sqlite"
        self._mutex = threading.RLock()
        try:
            private_folder(folder)
            self.connection = _connect(self.path, wait=5.0)
            self._make(synced, room)
        except (OSError, sqlite3.Error) as error:
            for path in _files(self.path):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise ResourceError(
                f"there is no room for the ledger's outbox: {error}",
                where=str(folder),
                fix=f"{room + min(room, _LOG_BYTES) >> 20} MiB of free space on a local disk, or less room",
            ) from error
        self.owed = 0
        self._unwritten: dict[str, str] = {}
        self.writer = Writer(self._transaction, "veneer-outbox")

    def open(self, entry: LedgerEntry) -> Future[None]:
        """The future's result comes when it is kept. Its exception is sqlite3.IntegrityError where a request of that id
        is owed already, NoRoom or sqlite3's where nothing more can be kept."""

        def write(c: sqlite3.Connection) -> None:
            if self._unwritten:
                raise NoRoom("the ends of requests cannot be written")
            if c.execute("PRAGMA freelist_count").fetchone()[0] < _SPARE_PAGES:
                raise NoRoom("there is no room for one more")
            row = (entry.request, _entry_text(entry), " " * _END_CHARACTERS)
            c.execute("INSERT INTO owed (request, entry, ending, closed, told) VALUES (?, ?, ?, 0, 0)", row)

        opened = self.writer.put(write)
        opened.add_done_callback(lambda future: self._count(0 if future.exception() else 1))
        return opened

    def settle(self, request: str, end: str) -> Future[None]:
        """`end`: of `end_text`. The first end of a request holds. The future's result comes when it is kept,
        and has no exception: what cannot be written is kept in memory, said, and goes to the ledger from there."""
        kept: Future[None] = Future()

        def write(c: sqlite3.Connection) -> None:
            row = (end.ljust(_END_CHARACTERS), request)
            c.execute("UPDATE owed SET ending = ?, closed = 1 WHERE request = ? AND closed = 0", row)

        def written(future: Future[Any]) -> None:
            if error := future.exception():
                _log.error("the end of request %s is in memory alone: %s", request, error)
                with self._mutex:
                    self._unwritten.setdefault(request, end)
            kept.set_result(None)

        self.writer.put(write).add_done_callback(written)
        return kept

    def take(self, most: int) -> list[OwedEntry]:
        """Up to `most` requests that the ledger does not have yet, the oldest first."""
        with self._mutex:
            late = dict(self._unwritten)
            marks = ", ".join("?" * len(late))
            query = f"SELECT request, entry, ending FROM owed WHERE told = 0 OR closed = 1 OR request IN ({marks})"
            rows = self.connection.execute(f"{query} ORDER BY number LIMIT ?", (*late, most)).fetchall()
        return [_owed_of(_entry_of(entry), late.get(request, end)) for request, entry, end in rows]

    def told(self, owed: Iterable[OwedEntry]) -> None:
        """Note that the ledger has these; those that ended are deleted here."""
        ended = [(each.entry.request,) for each in owed if each.state != "open"]
        opened = [(each.entry.request,) for each in owed if each.state == "open"]
        with self._transaction() as c:
            c.executemany("DELETE FROM owed WHERE request = ?", ended)
            c.executemany("UPDATE owed SET told = 1 WHERE request = ?", opened)
        with self._mutex:
            for (request,) in ended:
                self._unwritten.pop(request, None)
        self._count(-len(ended))

    def end_all(self, end: str) -> None:
        """End all requests that are open in this way."""
        with self._transaction() as c:
            c.execute("UPDATE owed SET ending = ?, closed = 1 WHERE closed = 0", (end.ljust(_END_CHARACTERS),))

    def flush(self, seconds: float = 10.0) -> None:
        """Wait until all that was put before is written."""
        self.writer.put(lambda c: None).result(seconds)

    def close(self) -> None:
        """What is still owed stays in its file."""
        self.writer.close()
        with self._mutex:
            empty = not self._unwritten and not self.connection.execute("SELECT 1 FROM owed LIMIT 1").fetchone()
            self.connection.close()
        if empty:
            for path in _files(self.path):
                path.unlink(missing_ok=True)

    def _make(self, synced: bool, room: int) -> None:
        """The table, and pages that are free in it; its log is as long as the first step of these."""
        c = self.connection
        c.execute("PRAGMA journal_mode = WAL")
        c.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
        c.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        c.execute("PRAGMA secure_delete = OFF")
        c.execute("BEGIN IMMEDIATE")
        c.execute(_TABLE)
        c.execute("CREATE TABLE room (bytes BLOB NOT NULL)")
        c.execute("COMMIT")
        step = min(room, _LOG_BYTES)
        for _ in range(-(-room // step)):
            c.execute("INSERT INTO room VALUES (randomblob(?))", (step,))
            c.execute("PRAGMA wal_checkpoint(PASSIVE)")
        c.execute("DROP TABLE room")
        c.execute("PRAGMA wal_checkpoint(PASSIVE)")
        (pages,) = c.execute("PRAGMA page_count").fetchone()
        c.execute(f"PRAGMA max_page_count = {pages}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def _count(self, change: int) -> None:
        with self._mutex:
            self.owed += change


def outboxes(folder: Path) -> list[Path]:
    """The files in a folder that are named like outboxes; all others are left alone."""
    return sorted(path for path in folder.glob("*.sqlite") if _SERVER.fullmatch(path.stem))


@contextlib.contextmanager
def left_behind(path: Path) -> Iterator[Iterator[list[OwedEntry]]]:
    """What a dead process owed, some at a time; its files go when the caller comes to the end of the block, and stay
    where the block raises. Raises BlockingIOError where the process lives, FileNotFoundError where there is nothing."""
    try:
        c = _connect(path, wait=0.0)
    except sqlite3.OperationalError as error:
        raise (BlockingIOError if path.exists() else FileNotFoundError)(str(path)) from error
    try:
        if c.execute("SELECT 1 FROM sqlite_master WHERE name = 'owed'").fetchone() is None:
            if time.time() - os.stat(path).st_mtime < _EMPTY_SECONDS:
                raise BlockingIOError(str(path))  # it may be about to be made
            yield iter(())
        else:
            yield _batches(c)
        for each in _files(path):  # while the lock is held: nobody else finds them
            each.unlink(missing_ok=True)
    finally:
        c.close()


def _batches(c: sqlite3.Connection) -> Iterator[list[OwedEntry]]:
    cursor = c.execute("SELECT entry, ending FROM owed ORDER BY number")
    while rows := cursor.fetchmany(500):
        yield [_owed_of(_entry_of(entry), end) for entry, end in rows]


def _connect(path: Path, wait: float) -> sqlite3.Connection:
    """A connection that holds the file's one lock until it is closed."""
    if wait == 0.0 and not path.exists():
        raise sqlite3.OperationalError("no such file")
    c = sqlite3.connect(path, timeout=wait, isolation_level=None, check_same_thread=False)
    try:
        c.execute("PRAGMA locking_mode = EXCLUSIVE")
        c.execute("BEGIN EXCLUSIVE")
        c.execute("COMMIT")
    except BaseException:
        c.close()
        raise
    return c


def _files(path: Path) -> list[Path]:
    return [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))]
