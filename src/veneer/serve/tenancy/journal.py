"""Delivery of usage to the database, even if the process, disk or database fails.

    Writer     a thread that commits items from other threads, in groups
    Journal    a file on a local disk, with the lines that the database does not have yet
    Sender     a thread that empties the journal into the database; retries if the database is unavailable

Each process locks its journal, and the lock ends with the process, however the process dies. The next server
that uses the folder settles the requests in unlocked journals.

A commit writes to the operating system, so it survives a killed process. With `synced`, a commit writes to
disk, so it also survives a power loss, at the cost of one fsync per group.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

from veneer.errors import ResourceError
from veneer.files.locks import POSIX, take_lock
from veneer.files.rights import private_folder
from veneer.serve.transient import is_transient

_log = logging.getLogger("veneer.serve.tenancy")

_BATCH = 1000
"""Maximum items in one transaction."""

C = TypeVar("C")
Write = Callable[[C, list[Any]], object]
"""A function that writes items in a transaction; called again if the commit fails."""


# -- threads -----------------------------------------------------------------------------------------------------------


class Writer(Generic[C]):
    """A thread that commits items in groups, in order.

    `transaction`: returns a context manager that commits at the end of its block.
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
        done.set_running_or_notify_cancel()  # from here on, the future cannot be cancelled
        if self._closing:
            done.set_exception(ResourceError("the ledger is closed"))
        else:
            self._items.put((write, item, done))
        return done

    def flush(self, seconds: float = 10.0) -> None:
        """Wait until all items queued before this call are committed."""
        self.put(lambda c, items: None).result(seconds)

    def close(self, seconds: float = 10.0) -> None:
        """Commit all queued items and stop."""
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

        If that fails, commit each item separately, so that only bad items fail.
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
            for _, _, done in batch:  # the one bad item, or all items if the database is unavailable
                done.set_exception(error)
            return
        for _, _, done in batch:
            done.set_result(None)


class Sender:
    """A thread that calls `step` until `step` returns False.

    The thread does so after each `wake`, and again after a pause if `step` raised an error.
    """

    def __init__(self, step: Callable[[], bool]) -> None:
        """Start the thread."""
        self.away, self._step = False, step
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="veneer-usage", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def close(self) -> None:
        """Send all queued items and stop."""
        self._closing.set()
        self._wake.set()
        self._thread.join(15)

    def _run(self) -> None:
        pause = 0.0
        while True:
            self._wake.wait(pause or None)
            self._wake.clear()
            last = self._closing.is_set()  # read before the steps, so that the last steps send all items
            try:
                while self._step():
                    pass
                pause, self.away = 0.0, False
            except Exception as error:  # whatever the error, the items stay queued
                if not self.away:
                    _log.warning("usage stays on this machine until the database responds: %s", error)
                self.away, pause = True, min(5.0, pause * 2 or 0.2)
                self._closing.wait(pause)
            if last:
                return


# -- the journal -------------------------------------------------------------------------------------------------------


class NoRoom(Exception):
    """Raised for an item that does not fit in the journal; the rest of its group is written."""


@dataclass
class _Group:
    """Lines of one write. `reserved`: request -> bytes kept free for the request's end."""

    free: int
    reserved: dict[str, int]
    lines: list[bytes] = field(default_factory=list)


class Journal:
    """The lines that the database does not have yet, in memory and in a file.

    Thread-safe; no method waits for the database. The file has its full size from the start, and each
    admission reserves space for the end of its request. So even on a full disk, the end of an admitted
    request can be written. `lines`: the lines, oldest first. The file also contains zeros, and older lines
    that the database already has.
    """

    def __init__(self, folder: Path, server: str, size: int, *, synced: bool = False) -> None:
        """Create the file. Raises ResourceError if the disk does not have `size` bytes."""
        if not POSIX:
            fix = "run the server in WSL or a container, or without --tenants"
            raise ResourceError("the ledger of tenants needs Linux or macOS, which lock its files", fix=fix)
        self.path, self.lines, self._size, self._synced = folder / f"{server}.journal", list[bytes](), size, synced
        self._end, self._reserved, self._mutex = 0, dict[str, int](), threading.Lock()
        private_folder(folder)
        new = self.path.with_suffix(".new")
        self._fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            take_lock(self._fd)
            for at in range(0, size, 1 << 20):
                self._write_at(bytes(min(1 << 20, size - at)), at)
            new.replace(self.path)  # other processes never see the file without its lock
        except OSError as error:
            os.close(self._fd)
            new.unlink(missing_ok=True)
            message, fix = f"not enough disk space for the ledger: {error}", f"{size >> 20} MiB of free space on a "
            raise ResourceError(message, where=str(folder), fix=f"{fix}local disk, or a smaller ledger_room") from error
        self.writer = Writer(self._group, "veneer-journal")

    def add(self, request: str, line: bytes, end_bytes: int = 0) -> Future[None]:
        """Add a line for the admission or the end of a request.

        `end_bytes`: for an admission, bytes to reserve for the line of the request's end; 0 for an end. The
        future completes when the line is written. Its error is NoRoom, or the disk's error.
        """
        return self.writer.put(self._add, (request, line, end_bytes))

    def remove(self, count: int) -> None:
        """Remove the `count` oldest lines, after the database has received them."""
        with self._mutex:
            del self.lines[:count]
            end = self._end
            if 2 * sum(map(len, self.lines)) <= end:  # a copy fits before the old lines, so a kill loses nothing
                rest = b"".join(self.lines)
                self._write_at(rest, 0)
                self._write_at(bytes(end - len(rest)), len(rest))
                self._end = len(rest)

    def close(self) -> None:
        """Stop, and delete the file if the database has all of its lines."""
        self.writer.close()
        if not self.lines:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def _add(self, group: _Group, items: Sequence[tuple[str, bytes, int]]) -> None:
        for request, line, end_bytes in items:
            kept = group.reserved.pop(request, None)
            if not end_bytes and kept is None:
                continue  # the request's admission did not fit
            group.free += (kept or 0) - len(line) - end_bytes
            if end_bytes:
                if group.free < 0:
                    raise NoRoom("the journal has no space for another request")
                group.reserved[request] = end_bytes
            group.lines.append(line)

    @contextmanager
    def _group(self) -> Iterator[_Group]:
        with self._mutex:
            group = _Group(self._size - self._end - sum(self._reserved.values()), dict(self._reserved))
            yield group
            data = b"".join(group.lines)
            self._write_at(data, self._end)
            self.lines += group.lines
            self._end += len(data)
            self._reserved = group.reserved

    def _write_at(self, data: bytes, at: int) -> None:
        if os.pwrite(self._fd, data, at) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._synced:
            os.fsync(self._fd)


@contextmanager
def dead_journal(path: Path) -> Iterator[list[bytes]]:
    """Yield the lines of a dead process's journal.

    The database can already have some of the lines. After the block, the file is deleted, unless the block
    raises. Raises BlockingIOError if the process is alive, and FileNotFoundError if the file does not exist.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        take_lock(fd)
        yield [line for line in path.read_bytes().replace(b"\0", b"").split(b"\n") if line]
        path.unlink(missing_ok=True)
    finally:
        os.close(fd)
