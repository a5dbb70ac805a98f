"""The tables of the library's index, in SQLite or PostgreSQL, with SQLAlchemy.

    names 1─n versions n─1 entries 1─n files n─1 objects        names 1─n aliases ─1 versions        versions 1─n tags
                           entries 1─n triggers, parents, checks          entries 1─1 figures

An entry is an adapter's content (a manifest of its files); a version gives an entry a name and a number. An
object is a file in the store; manifests are objects too. Every write transaction holds the index's single
write lock (SQLite's own lock, or an advisory lock in PostgreSQL), so only one process writes at a time.
`library.library` and `library.maintenance` use this module and document the order of their writes.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    delete,
    insert,
    select,
    update,
)

from veneer.library import database
from veneer.library.database import Key, columns, key_columns, open_engine
from veneer.library.migrate import Schema, migrate

CHANNEL = "veneer_library_names"
"""PostgreSQL notification channel that announces changed names."""
CONDEMNED = ""
"""Generation that marks an object for deletion by garbage collection."""

_LOCK = 0x76656E656572  # "veneer" in ASCII: the key of PostgreSQL's advisory lock

_INDEX_TABLES = MetaData()


def _table(name: str, *parts: Any) -> Table:
    return Table(f"library_{name}", _INDEX_TABLES, *parts)


def _entry() -> Column[str]:
    """Return the key column `entry` of a table that holds details of entries."""
    return Column("entry", Key(), ForeignKey(entries.c.id, ondelete="CASCADE"), primary_key=True)


def _version(**options: Any) -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["name", "version"], [versions.c.name, versions.c.version], **options)


_meta = _table("meta", *key_columns("key"), *columns(Text, "value"))
objects = _table(
    "objects",
    *key_columns("path"),
    *columns(BigInteger, "size"),
    *columns(Float, "touched"),  # when a process last claimed the object, in seconds since 1970
    *columns(String, "generation"),  # a changed generation means that the object may have been deleted
)
entries = _table(
    "entries",
    *key_columns("id"),  # hexadecimal sha256 of the manifest
    Column("manifest", Key(), ForeignKey(objects.c.path), nullable=False, index=True),
    *columns(Key(), "digest", index=True),  # the adapter's digest, "sha256:…"; "" if its format is unknown
    *columns(String, "format", "kind"),
    # base_name: the last part of the base's name, in lower case
    *columns(Key(), "base", "base_name", "fingerprint", index=True),
    *columns(String, "licence", "created"),
    *columns(BigInteger, "size"),
    *columns(Text, "card", "words"),  # card: JSON; words: searchable text, in lower case
)
figures = _table(  # one row per entry; a separate table, because columns stored after the long card are slow to read
    "figures",
    _entry(),
    *columns(Integer, "rank"),  # 0 if the adapter's modules have different ranks or no rank
    *columns(Float, "gain", nullable=True),  # `describe.Gain.share`
)
files = _table(
    "files",
    _entry(),
    *key_columns("name"),
    Column("object", Key(), ForeignKey(objects.c.path), nullable=False, index=True),
    *columns(String, "sha256"),
    *columns(BigInteger, "size"),
)
triggers = _table("triggers", _entry(), *key_columns("word"), *columns(Key(), "lower", index=True))
checks = _table(  # results of the last check of each entry
    "checks",
    _entry(),
    *key_columns("name"),
    *columns(Boolean, "ok", nullable=True),  # NULL if the check could not run
    *columns(Text, "detail"),
    *columns(String, "at"),
)
parents = _table("parents", _entry(), Column("parent", Key(), primary_key=True, index=True))
names = _table(
    "names",
    *key_columns("name"),
    *columns(Integer, "latest", nullable=True),  # NULL if all versions were removed
    *columns(Integer, "next"),  # numbers of removed versions are never reused
)
versions = _table(
    "versions",
    Column("name", Key(), ForeignKey(names.c.name), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("entry", Key(), ForeignKey(entries.c.id), nullable=False, index=True),
    *columns(String, "added", "source"),
)
name_aliases = _table(
    "aliases",
    *key_columns("name", "alias"),
    *columns(Integer, "version"),
    _version(),
    Index("library_aliases_version", "name", "version"),
)
tags = _table(
    "tags",
    *key_columns("name"),
    Column("version", Integer, primary_key=True),
    *key_columns("tag"),
    _version(ondelete="CASCADE"),
    Index("library_tags_tag", "tag"),
)


def connect(where: str) -> Engine:
    """Open the index in a SQLite file or database; create or migrate its tables.

    where: a path, or a URL such as postgresql://user@host/database.

    Raises ConfigError if the database cannot be opened, MissingExtraError if psycopg is not installed."""
    engine = open_engine(where, "an index")
    migrate(engine, INDEX_SCHEMA, where)
    return engine


INDEX_SCHEMA = Schema(
    "the index",
    _INDEX_TABLES,
    Path(__file__).parent / "versions",
    "library_version",
    _LOCK,
    older="move it away, then `veneer library verify --rebuild` recreates it from the adapters' files",
)


@contextlib.contextmanager
def index_transaction(engine: Engine) -> Iterator[Connection]:
    """Run a transaction that holds the index's write lock from its start.

    The transaction is committed at the end, or rolled back on an exception. Raises ResourceError if the lock
    is not available within two minutes.
    """
    with database.write_transaction(engine, _LOCK) as connection:
        yield connection


def store_id(connection: Connection) -> str | None:
    """Return the id of the store that this index belongs to; None for a new index."""
    store: str | None = connection.scalar(select(_meta.c.value).where(_meta.c.key == "store"))
    return store


def set_store_id(connection: Connection, store: str) -> None:
    """Record the id of the store that this index belongs to."""
    connection.execute(delete(_meta).where(_meta.c.key == "store"))
    connection.execute(insert(_meta), {"key": "store", "value": store})


def announce_changes(connection: Connection) -> None:
    """Announce changed names, so that other processes reload their copies.

    Call this in the transaction that changes the names."""
    is_revision = _meta.c.key == "revision"
    revision = int(connection.scalar(select(_meta.c.value).where(is_revision)) or 0) + 1
    connection.execute(delete(_meta).where(is_revision))
    connection.execute(insert(_meta), {"key": "revision", "value": str(revision)})
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"NOTIFY {CHANNEL}")


def claim(connection: Connection, sizes: Mapping[str, int]) -> dict[str, str]:
    """Mark objects as in use now; return each path's generation.

    Call this in a write transaction. If an object's generation is the same later, the object was not deleted
    in between."""
    now, out = time.time(), {}
    for path, size in sorted(sizes.items()):
        row = connection.execute(select(objects.c.generation).where(objects.c.path == path)).first()
        generation = secrets.token_hex(8) if row is None or row.generation == CONDEMNED else str(row.generation)
        values = {"size": size, "touched": now, "generation": generation}
        if row is None:
            connection.execute(insert(objects), {"path": path, **values})
        else:
            connection.execute(update(objects).where(objects.c.path == path).values(**values))
        out[path] = generation
    return out


def clear(connection: Connection) -> None:
    """Delete all rows except the store's id and the revision."""
    for table in reversed(_INDEX_TABLES.sorted_tables):
        if table is not _meta:
            connection.execute(delete(table))


def insert_rows(connection: Connection, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
    """Insert rows; do nothing if there are none."""
    values = [dict(r) for r in rows]
    if values:
        connection.execute(insert(table), values)


def now_text() -> str:
    """Return the current time in the index's format: 2026-11-25T10:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def add_checks(connection: Connection, results: Iterable[tuple[str, str, bool | None, str]]) -> None:
    """Record check results (entry, name, ok, detail) with the current time."""
    at = now_text()
    insert_rows(
        connection, checks, ({"entry": e, "name": n, "ok": ok, "detail": d, "at": at} for e, n, ok, d in results)
    )
