"""All names of a library in memory, for servers that cannot query per request.

    with NameIndex(library) as names:
        names.now.find(parse_reference("support@prod"))        immediate, even if the database does not respond
        await names.fresh()                                    usually includes every commit before this call

A thread reloads the names when they change. With SQLite, a caller that needs current names wakes the
thread, which compares `data_version`, a number that changes when another connection commits. With PostgreSQL
the thread listens for notifications: every change of names increments the index's revision and sends a
notification, and the thread also checks the revision each second. While the database does not respond, the
last loaded names stay in use and no call waits.

A reload takes 0.5 s for 100,000 versions; the thread then pauses for as long as the reload took. The names do
not include cards. This module uses the index, not the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, select

from veneer.library import index as ix
from veneer.library.database import reading
from veneer.library.library import Library
from veneer.library.names import Reference

_log = logging.getLogger("veneer.library")

PATIENCE = 0.5
"""Maximum seconds that `fresh` waits for the database."""
_EVERY = 1.0


@dataclass(frozen=True, slots=True)
class NamedVersion:
    """One version of a name.

    digest: the adapter's digest, "" if the adapter could not be read.
    entry: the sha256 of the version's manifest. size: bytes of its files."""

    name: str
    version: int
    entry: str
    added: str
    digest: str
    format: str
    fingerprint: str
    base: str
    size: int = 0

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


class Names:
    """The names at one point in time; `find` works like `queries.find_versions`."""

    def __init__(
        self, versions: Iterable[NamedVersion] = (), latest: Iterable[tuple[str, int]] = (), aliases: Iterable[Any] = ()
    ) -> None:
        self._kept = {(k.name, k.version): k for k in versions}
        self._latest = dict(latest)
        self._aliases: dict[tuple[str, str], int] = {(name, alias): version for name, alias, version in aliases}

    def find(self, reference: Reference) -> NamedVersion | None:
        """Return a version, or None if no version matches or a digest prefix is ambiguous."""
        if reference.prefix:
            return self._by_digest(reference.prefix)
        if reference.alias:
            version = self._aliases.get((reference.name, reference.alias))
        else:
            version = self._latest.get(reference.name) if reference.version is None else reference.version
        return None if version is None else self._kept.get((reference.name, version))

    def latest(self, fingerprint: str) -> list[NamedVersion]:
        """Return each name's latest version if it is for this base, sorted by name."""
        versions = (self._kept.get(key) for key in self._latest.items())
        return sorted((k for k in versions if k is not None and k.fingerprint == fingerprint), key=lambda k: k.name)

    def _by_digest(self, prefix: str) -> NamedVersion | None:
        keys, fits = self._digests, set[NamedVersion]()
        at = bisect_left(keys, (prefix,))
        while at < len(keys) and keys[at][0].startswith(prefix) and len(fits) < 2:
            fits.add(keys[at][1])
            at += 1
        return fits.pop() if len(fits) == 1 else None

    @cached_property
    def _digests(self) -> list[tuple[str, NamedVersion]]:
        """Return sorted (digest, version) pairs; an entry's id also counts as a digest.

        If several versions have the same adapter, the pair has the version that was added last."""
        newest: dict[str, NamedVersion] = {}
        by_name = sorted(self._kept.values(), key=lambda k: (k.name, -k.version))
        for k in sorted(by_name, key=lambda k: k.added, reverse=True):
            newest.setdefault(k.digest or k.entry, k)
        pairs = {(key, newest[k.digest or k.entry]) for k in by_name for key in (k.digest, f"sha256:{k.entry}") if key}
        return sorted(pairs, key=lambda pair: pair[0])


def read(connection: Connection) -> Names:
    """Read the current names from the index."""
    v, e, a, n = ix.versions.c, ix.entries.c, ix.name_aliases.c, ix.names.c
    columns = (v.name, v.version, v.entry, v.added, e.digest, e.format, e.fingerprint, e.base, e.size)
    versions = [
        NamedVersion(*row)
        for row in connection.execute(select(*columns).join_from(ix.versions, ix.entries, v.entry == e.id))
    ]
    latest = [
        (row.name, row.latest) for row in connection.execute(select(n.name, n.latest).where(n.latest.is_not(None)))
    ]
    return Names(versions, latest, [tuple(row) for row in connection.execute(select(a.name, a.alias, a.version))])


class NameIndex:
    """The names of one library, and the thread that reloads them.

    The constructor loads the names once, and raises the database's errors."""

    def __init__(self, library: Library, *, patience: float = PATIENCE) -> None:
        self.engine, self.patience = library.engine, patience
        self.listens = self.engine.dialect.name == "postgresql"
        self.away = False
        """Whether the database failed to respond to the last query."""
        self._mark: object = None
        self._lock, self._stop, self._wake = threading.Lock(), threading.Event(), threading.Event()
        self._waiting: list[Future[None]] = []
        with reading(self.engine) as connection:
            self._names = read(connection)
        self._thread = threading.Thread(target=self._run, name="veneer-names", daemon=True)
        self._thread.start()

    def __enter__(self) -> NameIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def now(self) -> Names:
        """The last loaded names."""
        return self._names

    async def fresh(self) -> Names:
        """Check for changed names, then return the names.

        Returns the last loaded names if the database does not respond within `patience`. With PostgreSQL,
        which announces changes, returns at once without a check."""
        if (checked := self._request_check()) is not None:
            try:
                async with asyncio.timeout(self.patience):
                    await asyncio.wrap_future(checked)
            except TimeoutError:
                self.away = True
        return self._names

    def refreshed(self) -> Names:
        """Check for changed names, then return the names; for threads that can block.

        Unlike `fresh`, also checks with PostgreSQL, because the caller may already know of a name that
        PostgreSQL has not announced yet."""
        if (checked := self._request_check(postgresql_too=True)) is not None:
            try:
                checked.result(self.patience)
            except TimeoutError:
                self.away = True
        return self._names

    def _request_check(self, postgresql_too: bool = False) -> Future[None] | None:
        if self.away or self._stop.is_set() or (self.listens and not postgresql_too):
            return None
        request: Future[None] = Future()
        with self._lock:
            self._waiting.append(request)
        self._wake.set()
        return request

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join(5)  # a thread that is blocked on the database ends with the process

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        logged = False
        while not self._stop.is_set():
            try:
                with self._connected() as driver:
                    while not self._stop.is_set():
                        self._refresh(driver)
                        if logged:
                            _log.warning("the library's index responds again")
                        self.away = logged = False
                        self._wait(driver)
            except Exception as error:  # whatever the driver raised: keep the last loaded names
                self.away = True
                if not logged and not self._stop.is_set():
                    _log.warning("the library's index does not respond; using the last loaded names: %s", error)
                    logged = True
                self._complete()
                self._stop.wait(_EVERY)
        self._complete()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """Yield a driver connection that is neither in the pool nor in a transaction."""
        raw = self.engine.raw_connection()
        self._mark = None  # SQLite's data_version is per connection
        driver: Any = raw.driver_connection
        raw.detach()
        try:
            if self.listens:
                driver.autocommit = True
                driver.execute(f"LISTEN {ix.CHANNEL}")
            yield driver
        finally:
            raw.close()

    def _wait(self, driver: Any) -> None:
        """Wait for a request, a notification or one second."""
        if not self.listens:
            self._wake.wait(_EVERY)
            return
        until = time.monotonic() + _EVERY
        while time.monotonic() < until and not self._wake.is_set():
            for _ in driver.notifies(timeout=0.05, stop_after=1):
                return

    def _refresh(self, driver: Any) -> None:
        self._wake.clear()
        with self._lock:
            requests, self._waiting = self._waiting, []
        try:
            version = self._version(driver)
            if version != self._mark:
                began = time.monotonic()
                with reading(self.engine) as connection:
                    self._names = read(connection)
                self._mark = version
                self._complete(requests)
                self._stop.wait(min(time.monotonic() - began, 5.0))
        finally:
            self._complete(requests)

    def _version(self, driver: Any) -> object:
        """Return a value that changes when the names change."""
        if self.listens:
            row = driver.execute("SELECT value FROM library_meta WHERE key = 'revision'").fetchone()
            return None if row is None else row[0]
        return driver.execute("PRAGMA data_version").fetchone()[0]

    def _complete(self, requests: list[Future[None]] | None = None) -> None:
        if requests is None:
            with self._lock:
                requests, self._waiting = self._waiting, []
        for future in requests:
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_result(None)
