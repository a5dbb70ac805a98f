"""A database in a SQLite file or behind a PostgreSQL URL, through SQLAlchemy: how it is opened, read and written.

The library's index and the server's tenants are both kept like this. Committed means on the disk. Whoever writes says
at the start of the transaction that it will write, so that SQLite waits for the lock there and never in between.
Knows no tables.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, String, create_engine, event, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from veneer.errors import ConfigError, MissingExtraError, ResourceError

__all__ = ["URL_FIX", "Key", "open_engine", "reading", "shown_url", "writing"]

URL_FIX = "a path for SQLite, or postgresql://user:password@host/database"
_BUSY_SECONDS = 120


def Key() -> Any:
    """Text that compares byte by byte, so that a range of it is a prefix, in both databases."""
    return String().with_variant(String(collation="C"), "postgresql")


def open_engine(where: str, what: str) -> Engine:
    """The database in a SQLite file, or behind a URL such as postgresql://user@host/database; it is not touched yet.
    `what` is kept there, for errors. Raises ConfigError for no such address, MissingExtraError without psycopg."""
    url = where if "://" in where else f"sqlite:///{where}"
    if url.startswith(("postgresql://", "postgres://")):
        url = "postgresql+psycopg://" + url.partition("://")[2]
    try:
        return _sqlite(url) if url.startswith("sqlite:") else create_engine(url, pool_pre_ping=True)
    except ImportError as error:
        raise MissingExtraError(
            f"{what} needs {error.name or 'a database driver'}",
            where=shown_url(where),
            fix="pip install 'veneer[postgres]'",
        ) from None
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"this is no address of {what}: {error}", where=shown_url(where), fix=URL_FIX) from None


def shown_url(where: str) -> str:
    """An address without its password."""
    head, at, host = where.rpartition("@")
    return f"{head.rpartition(':')[0] if head.count(':') > 1 else head}{at}{host}"


def _sqlite(url: str) -> Engine:
    Path(url.removeprefix("sqlite:///")).expanduser().parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not where the driver guesses
        _wal(connection)
        connection.execute("PRAGMA synchronous=FULL")  # committed means on the disk
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(c: Connection) -> None:
        c.exec_driver_sql("BEGIN IMMEDIATE" if c.get_execution_options().get("write") else "BEGIN")

    return engine


def _wal(connection: Any) -> None:
    """Switching to WAL does not wait for others who do the same, so it is tried again here."""
    import sqlite3

    give_up = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection for queries."""
    with engine.connect() as c:
        yield c


@contextlib.contextmanager
def writing(engine: Engine, lock: int | None = None) -> Iterator[Connection]:
    """A transaction: committed at the end, or not at all. In SQLite it holds the one write lock from its start; in
    PostgreSQL the advisory lock `lock`, if there is one.

    Raises ResourceError where the lock is not to be had for two minutes."""
    with engine.connect().execution_options(write=True) as c:
        try:
            c.begin()
            if lock is not None and c.dialect.name == "postgresql":
                c.execute(text(f"SELECT pg_advisory_xact_lock({lock})"))
        except DBAPIError as error:
            if "locked" not in str(error.orig):
                raise
            raise ResourceError(
                f"another process has been writing to the database for {_BUSY_SECONDS} seconds",
                fix="try again; with many writers, use PostgreSQL",
            ) from error
        yield c
        c.commit()
