"""Delivers usage to the database, despite failures of process, disk or database.

    Writer     a thread that commits other threads' items, in groups
    Outbox     a queue on a local disk, for a PostgreSQL that can be unavailable: a SQLite file per process
    Sender     a thread that empties a queue into the database, and retries while the database is unavailable
    Reserve    bytes of disk for a ledger in SQLite, which is written directly: freed when the disk is full

A lock on the file of an Outbox or Reserve shows that its process is alive: the lock ends with the process,
however it dies. The next server on the folder settles what an unlocked file contains.

Committed means written to the operating system: a commit survives a killed process. `synced`: written to
disk: a commit also survives a power loss, at the cost of one fsync per group.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

from veneer.errors import ResourceError
from veneer.files.locks import take_lock
from veneer.files.rights import private_folder
from veneer.serve.transient import is_transient

_log = logging.getLogger("veneer.serve.tenancy")

_BATCH = 1000
"""Items in one transaction."""

C = TypeVar("C")
T = TypeVar("T")
Write = Callable[[C, list[Any]], object]
"""Writes items within a transaction. Can be called several times, of which one is committed."""


# -- threads -----------------------------------------------------------------------------------------------------------


class Writer(Generic[C]):
    """A thread that commits items in groups, in order.

    `transaction`: commits at its end.
    """

    def __init__(self, transaction: Callable[[], AbstractContextManager[C]], name: str) -> None:
        self.transaction = transaction
        self._items: queue.SimpleQueue[tuple[Write[C], Any, Future[None]] | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, write: Write[C], item: Any = None) -> Future[None]:
        """Queue an item, from any thread.

        The future completes after the commit, or with the error of `write`.
        """
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        if self._closing:
            done.set_exception(ResourceError("the ledger is closed"))
        else:
            self._items.put((write, item, done))
        return done

    def flush(self, seconds: float = 10.0) -> None:
        """Wait until everything queued before is committed."""
        self.put(lambda c, items: None).result(seconds)

    def close(self, seconds: float = 10.0) -> None:
        """Commit what is queued and stop."""
        self._closing = True
        self._items.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        closing = False
        while not (closing and self._items.empty()):
            batch = [self._items.get()]
            while len(batch) < _BATCH and not self._items.empty():
                batch.append(self._items.get())
            closing = closing or None in batch
            if items := [item for item in batch if item is not None]:
                self._commit(items)

    def _commit(self, batch: Sequence[tuple[Write[C], Any, Future[None]]]) -> None:
        """Commit a batch in one transaction.

        If that fails, each item separately, so only bad items fail.
        """
        try:
            with self.transaction() as c:
                for write, items in groupby(batch, key=lambda each: each[0]):
                    write(c, [item for _, item, _ in items])
        except Exception as error:
            if len(batch) > 1 and not is_transient(error):
                for each in batch:
                    self._commit([each])
                return
            for _, _, done in batch:  # an unavailable database fails all of them
                done.set_exception(error)
            return
        for _, _, done in batch:
            done.set_result(None)


def write_all(
    transaction: Callable[[], AbstractContextManager[C]],
    write: Callable[[C, Sequence[T]], int],
    items: Sequence[T],
    describe: Callable[[T], str],
) -> int:
    """Write items in one transaction; returns the sum of what `write` returns.

    If the database rejects an item, log it as `describe` says and write the others. Raises the error if the database
    is unavailable.
    """
    try:
        with transaction() as c:
            return write(c, items)
    except Exception as error:
        if is_transient(error):
            raise
        if len(items) == 1:
            _log.error("the database refuses %s: %s", describe(items[0]), error)
            return 0
        return sum(write_all(transaction, write, [item], describe) for item in items)


class Sender:
    """A thread that calls `step` until it returns False.

    Runs on each `wake`, and after a pause if `step` raised.
    """

    def __init__(self, step: Callable[[], bool], label: str) -> None:
        """Start the thread. `label`: name for the log, such as "usage"."""
        self.away = False
        self._step, self._what = step, label
        self._lock, self._wake, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"veneer-{label.replace(' ', '-')}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def drain(self) -> None:
        """Call `step` from this thread until it returns False.

        Raises the errors of `step`.
        """
        with self._lock:
            while self._step():
                pass

    def close(self) -> bool:
        """Send what is queued and stop; returns whether the thread ended."""
        self._closing.set()
        self._wake.set()
        self._thread.join(15)
        return not self._thread.is_alive()

    def _run(self) -> None:
        pause = 0.0
        while True:
            self._wake.wait(pause or None)
            self._wake.clear()
            last = self._closing.is_set()  # items queued before it was set are sent below
            try:
                self.drain()
                pause, self.away = 0.0, False
            except Exception as error:  # nothing is lost, whatever the error
                if not self.away:
                    _log.warning("%s stays on this machine until the database responds: %s", self._what, error)
                self.away, pause = True, min(5.0, pause * 2 or 0.2)
                self._closing.wait(pause)
            if last:
                return


# -- the outbox --------------------------------------------------------------------------------------------------------


_TABLE = """CREATE TABLE IF NOT EXISTS owed (
    number INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    body TEXT NOT NULL,
    final INTEGER NOT NULL,
    sent INTEGER NOT NULL
)"""
_PAD = 300
"""Characters by which the last body of an item can be longer than its first."""
_LOG_BYTES = 8 << 20
_CHECKPOINT_PAGES = 256
"""Pages after which SQLite restarts its log."""
_SPARE_PAGES = 16
"""Free pages that SQLite needs to delete rows."""
_EMPTY_SECONDS = 3600.0
_NAME = re.compile(r"[0-9a-f]{16}\.sqlite")


class NoRoom(Exception):
    """Raised for one item; the other items of its group are written."""


class Outbox:
    """A queue on a local disk. Thread-safe; no method waits for the database.

    The file has its full size from the start, its log has the size that a group of items needs, and neither
    grows: a full disk never prevents writing the end of an added item. An item has two bodies: the first from
    `add`, the last from `end`.
    """

    def __init__(self, path: Path, *, size: int, synced: bool = False) -> None:
        """Create the file. Raises ResourceError if the disk does not have `room` bytes.

        `add` fails beyond `room`.
        """
        self.path, self.owed = path, 0
        self._mutex = threading.RLock()
        try:
            private_folder(path.parent)
            path.touch(0o600)
            self.connection = _connect(path, wait=5.0)
            self._create(synced, size)
        except (OSError, sqlite3.Error) as error:
            for each in _files(path):
                with contextlib.suppress(OSError):
                    each.unlink(missing_ok=True)
            raise no_room(path.parent, size + min(size, _LOG_BYTES), error) from error
        self.writer = Writer(self._transaction, "veneer-outbox")

    def add(self, key: str, body: str) -> Future[None]:
        """Add an item; the future completes when it is written.

        The future's error: sqlite3.IntegrityError for a duplicate key, NoRoom or another sqlite3 error if
        there is no room.
        """
        added = self.writer.put(self._insert, (key, body.ljust(len(body) + _PAD)))
        added.add_done_callback(lambda future: self._count(0 if future.exception() else 1))
        return added

    def end(self, key: str, body: str) -> Future[None]:
        """Replace an item's body by its last; the first end counts.

        The future completes when the body is written.
        """
        return self.writer.put(self._update, (body, key))

    def take(self, most: int) -> list[tuple[str, str, bool]]:
        """Up to `most` items to send, oldest first.

        (key, body, whether it is the last body).
        """
        query = "SELECT key, body, final FROM owed WHERE sent = 0 OR final = 1 ORDER BY number LIMIT ?"
        with self._mutex:
            rows = self.connection.execute(query, (most,)).fetchall()
        return [(key, body, bool(final)) for key, body, final in rows]

    def sent(self, keys: Sequence[str], ended: Sequence[str]) -> None:
        """Record that the database has these items; those in `ended` with their last body, so delete them."""
        with self._mutex:
            with self._transaction() as c:
                c.executemany("UPDATE owed SET sent = 1 WHERE key = ?", [(key,) for key in keys])
                c.executemany("DELETE FROM owed WHERE key = ?", [(key,) for key in ended])
            self.owed -= len(ended)

    def close(self) -> None:
        """Stop; what is still owed stays in the file."""
        self.writer.close()
        with self._mutex:
            empty = self.connection.execute("SELECT 1 FROM owed LIMIT 1").fetchone() is None
            self.connection.close()
        for path in _files(self.path) if empty else ():
            path.unlink(missing_ok=True)

    def _insert(self, c: sqlite3.Connection, rows: list[tuple[str, str]]) -> None:
        for row in rows:
            if c.execute("PRAGMA freelist_count").fetchone()[0] < _SPARE_PAGES:
                raise NoRoom("there is no room for one more")
            c.execute("INSERT INTO owed (key, body, final, sent) VALUES (?, ?, 0, 0)", row)

    def _update(self, c: sqlite3.Connection, rows: list[tuple[str, str]]) -> None:
        c.executemany("UPDATE owed SET body = ?, final = 1 WHERE key = ? AND final = 0", rows)

    def _create(self, synced: bool, size: int) -> None:
        """Create the table, and free pages in the file.

        The log gets the size of the first step of these pages.
        """
        c = self.connection
        c.execute("PRAGMA journal_mode = WAL")
        c.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
        c.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        c.execute(_TABLE)
        step = min(size, _LOG_BYTES)
        c.execute("CREATE TABLE room (bytes BLOB NOT NULL)")
        for _ in range(-(-size // step)):
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


def no_room(folder: Path, needed: int, error: Exception) -> ResourceError:
    return ResourceError(
        f"not enough disk space for the ledger: {error}",
        where=str(folder),
        fix=f"{needed >> 20} MiB of free space on a local disk, or a smaller ledger_room",
    )


def outboxes(folder: Path) -> list[Path]:
    """The outboxes in a folder, by name; other files are ignored."""
    return sorted(path for path in folder.glob("*.sqlite") if _NAME.fullmatch(path.name))


@contextlib.contextmanager
def read_dead_outbox(path: Path) -> Iterator[Iterator[list[str]]]:
    """The bodies in a dead process's outbox, in batches.

    Its files are deleted after the block. If the block raises, the files stay. Raises BlockingIOError if the
    process is alive, FileNotFoundError if there is no such outbox.
    """
    try:
        c = _connect(path, wait=0.0)
    except sqlite3.OperationalError as error:
        raise (BlockingIOError if path.exists() else FileNotFoundError)(str(path)) from error
    try:
        if c.execute("SELECT 1 FROM sqlite_master WHERE name = 'owed'").fetchone() is None:
            if time.time() - os.stat(path).st_mtime < _EMPTY_SECONDS:
                raise BlockingIOError(str(path))  # its process can be about to create the table
            yield iter(())
        else:
            yield _batches(c)
        for each in _files(path):  # while locked: no other process finds them
            each.unlink(missing_ok=True)
    finally:
        c.close()


def _batches(c: sqlite3.Connection) -> Iterator[list[str]]:
    cursor = c.execute("SELECT body FROM owed ORDER BY number")
    while rows := cursor.fetchmany(500):
        yield [body for (body,) in rows]


def _connect(path: Path, wait: float) -> sqlite3.Connection:
    """A connection that holds the file's only lock until it is closed."""
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


# -- the reserve -------------------------------------------------------------------------------------------------------


class Reserve:
    """A locked file of `room` bytes on the disk of a ledger in SQLite.

    Freeing it makes space for the ends of requests that were admitted before the disk was full.
    """

    def __init__(self, folder: Path, server: str, size: int) -> None:
        """Create the file. Raises ResourceError if the disk does not have the room."""
        self.path, self.freed, self._room = folder / f"{server}.lock", True, size
        private_folder(folder)
        new = folder / f"{server}.new"
        self._fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            take_lock(self._fd)
            self.claim()
            new.replace(self.path)  # the file never appears without its lock
        except OSError as error:
            os.close(self._fd)
            new.unlink(missing_ok=True)
            raise no_room(folder, size, error) from error

    def claim(self) -> None:
        """Allocate the bytes. Raises OSError if the disk does not have them."""
        try:
            for at in range(0, self._room, 1 << 20):
                os.pwrite(self._fd, bytes(min(1 << 20, self._room - at)), at)
        except OSError:
            self.free()
            raise
        self.freed = False

    def free(self) -> None:
        self.freed = True
        os.ftruncate(self._fd, 0)

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._fd)


@contextlib.contextmanager
def hold_dead_reserve(path: Path) -> Iterator[None]:
    """Hold a dead process's reserve.

    It is deleted after the block, unless the block raises. Raises BlockingIOError if the process is alive,
    FileNotFoundError if there is no such file.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        take_lock(fd)
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def reserves(folder: Path) -> list[Path]:
    """The reserves in a folder, by name; other files are ignored."""
    return sorted(path for path in folder.glob("*.lock") if re.fullmatch(r"[0-9a-f]{16}", path.stem))
