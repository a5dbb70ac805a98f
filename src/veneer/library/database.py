"""Open, read and write a SQLite or PostgreSQL database with SQLAlchemy.

The library's index and the server's tenants use this module. A commit is on disk when it returns. A writer
declares at the start of its transaction that it will write, so with SQLite the writer waits for the lock at
the start of the transaction, never in the middle. Every wait has a limit: if PostgreSQL does not respond
(stopped, full or unreachable), the statement raises OperationalError after `patience` seconds and the
connection is closed. (PostgreSQL's own statement_timeout has no effect if the server is unreachable.) This
module defines no tables.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Engine, String, create_engine, event, literal_column, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from veneer.errors import ConfigError, MissingExtraError, ResourceError
from veneer.files.rights import make_private

URL_FIX = "a path for SQLite on a writable disk with free space, or postgresql://user:password@host/database"
PATIENCE = 30.0
"""Default time limit for one statement, in seconds."""
_BUSY_SECONDS = 120
_CONNECT_SECONDS = 5


def Key() -> Any:
    """Return a text type that sorts bytewise, so that a prefix search is a range scan."""
    return String().with_variant(String(collation="C"), "postgresql")


def key_columns(*names: str) -> list[Column[Any]]:
    """Return key columns that together form the primary key."""
    return [Column(name, Key(), primary_key=True) for name in names]


def columns(kind: Any, *names: str, nullable: bool = False, index: bool = False) -> list[Column[Any]]:
    """Return columns that all have the type `kind`."""
    return [Column(name, kind, nullable=nullable, index=index) for name in names]


def open_engine(where: str, label: str, patience: float = PATIENCE) -> Engine:
    """Return an engine for a SQLite file or a database URL, without connecting.

    where: a path, or a URL such as postgresql://user@host/database.
    label: names the database in errors.
    patience: seconds after which an unresponsive PostgreSQL counts as unavailable. If less than the default,
        also the seconds that a writer waits for SQLite's lock.

    Raises ConfigError for an invalid address, MissingExtraError if psycopg is not installed."""
    url = where if "://" in where else f"sqlite:///{where}"
    if url.startswith(("postgresql://", "postgres://")):
        url = "postgresql+psycopg://" + url.partition("://")[2]
    try:
        return _sqlite(url, patience) if url.startswith("sqlite:") else _postgresql(url, patience)
    except ImportError as error:
        if not url.startswith("postgresql"):
            raise ConfigError(f"this is not an address of {label}", where=shown_url(where), fix=URL_FIX) from None
        problem = f"{label} needs {error.name or 'a database driver'}"
        raise MissingExtraError(problem, where=shown_url(where), extra="postgres") from None
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"this is not an address of {label}: {error}", where=shown_url(where), fix=URL_FIX) from None
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        raise ConfigError(
            f"cannot create a folder for {label}: {error.strerror}", where=str(error.filename), fix="another place"
        ) from None


def shown_url(where: str) -> str:
    """Return a database address without its password."""
    head, at, host = where.rpartition("@")
    return f"{head.rpartition(':')[0] if head.count(':') > 1 else head}{at}{host}"


def _sqlite(url: str, patience: float) -> Engine:
    Path(url.removeprefix("sqlite:///")).expanduser().parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": patience if patience < PATIENCE else _BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # veneer begins transactions explicitly (below); the driver does not
        _wal(connection)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("write") else "BEGIN")

    return engine


def _postgresql(url: str, patience: float) -> Engine:
    engine = create_engine(url, pool_pre_ping=True, pool_timeout=patience)
    if engine.dialect.driver != "psycopg":
        return engine
    connection_class = _patient_connection()

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: Any, named: dict[str, Any]) -> Any:
        named.setdefault("connect_timeout", max(2, min(_CONNECT_SECONDS, int(patience))))
        connection = connection_class.connect(*arguments, **named)
        connection.patience = patience
        return connection

    return engine


def _patient_connection() -> Any:
    """Return a psycopg connection class that limits how long it waits for a response."""
    import psycopg

    class Patient(psycopg.Connection[Any]):
        patience = PATIENCE

        def wait(self, gen: Any, *arguments: Any, **named: Any) -> Any:
            try:
                return super().wait(_until(gen, time.monotonic() + self.patience), *arguments, **named)
            except _TimedOut:
                self.pgconn.finish()  # close, so that a late response is not read as another statement's response
                message = f"the database did not answer within {self.patience:g} seconds"
                raise psycopg.OperationalError(message) from None

    return Patient


class _TimedOut(Exception):
    pass


def _until(gen: Any, deadline: float) -> Generator[Any, Any, Any]:
    """Drive psycopg's wait generator and raise _TimedOut after the deadline.

    psycopg wakes the generator every tenth of a second."""
    try:
        event = next(gen)
        while True:
            ready = yield event
            if not ready and time.monotonic() > deadline:
                raise _TimedOut
            event = gen.send(ready)
    except StopIteration as end:
        return end.value


def _wal(connection: Any) -> None:
    """Switch to WAL mode; retry while other connections hold the file."""
    import sqlite3

    give_up = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            if not busy or time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def keep_private(engine: Engine) -> None:
    """Restrict access to a SQLite file and its -wal and -shm files to this user.

    Creates the file if it is missing. See `make_private`. Does nothing for PostgreSQL, which has its own
    access control."""
    if engine.dialect.name == "sqlite" and engine.url.database:
        file = Path(engine.url.database)
        if not file.exists():
            with contextlib.suppress(OSError):  # opening the database reports the error more clearly
                file.touch()
        for each in (file, Path(f"{file}-wal"), Path(f"{file}-shm")):
            if each.is_file():
                make_private(each)


def database_clock(engine: Engine) -> ColumnElement[float]:
    """Return an SQL expression for the database's clock, in seconds since 1970.

    All clients see the same clock."""
    if engine.dialect.name == "postgresql":
        return literal_column("EXTRACT(EPOCH FROM clock_timestamp())::float")
    return literal_column("(julianday('now') - 2440587.5) * 86400.0")


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Yield a connection whose queries all see the same state of the database."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":  # in SQLite, every transaction reads one snapshot
            connection.execution_options(isolation_level="REPEATABLE READ")
        yield connection


@contextlib.contextmanager
def write_transaction(engine: Engine, lock: int | None = None) -> Iterator[Connection]:
    """Run a transaction that is committed at the end, or rolled back on an exception.

    With SQLite, the transaction holds the write lock from its start. With PostgreSQL, the transaction holds
    the advisory lock `lock`, if given. Raises ResourceError if the lock is not available within two minutes,
    or within the engine's patience if that is less than the default."""
    with engine.connect().execution_options(write=True) as connection:
        try:
            connection.begin()
            if lock is not None and connection.dialect.name == "postgresql":
                _take_lock(connection, lock)
        except DBAPIError as error:
            if "locked" not in str(error.orig) and getattr(error.orig, "sqlstate", None) != _LOCK_TIMEOUT:
                raise
            problem = "another process has been writing to the database for too long"
            raise ResourceError(problem, fix="try again; with many writers, use PostgreSQL") from error
        yield connection
        connection.commit()


_LOCK_TIMEOUT = "55P03"


def _take_lock(connection: Connection, lock: int) -> None:
    """Take the advisory lock; wait while another transaction holds it."""
    driver: Any = connection.connection.driver_connection
    patience = driver.patience
    seconds = patience if patience < PATIENCE else _BUSY_SECONDS
    connection.execute(text(f"SET LOCAL lock_timeout = {int(seconds * 1000)}"))
    driver.patience = seconds + patience
    try:
        connection.execute(text(f"SELECT pg_advisory_xact_lock({lock})"))
    finally:
        driver.patience = patience
    connection.execute(text("SET LOCAL lock_timeout = 0"))
